"""The embedded demo: small pictures of lesions, nuclei or vessels, made on first use, kept outside the repository."""

from tasks.qtseg.demo.make import KINDS, make_images

__all__ = ["KINDS", "make_images"]
