"""The embedded demo: small pictures of lesions, nuclei or vessels, made on first use, kept outside the repository."""

from tasks.qtseg.demo.make import KINDS, class_name, make_images

__all__ = ["KINDS", "class_name", "make_images"]
