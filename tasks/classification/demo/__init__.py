"""The embedded demo: small pictures of four tissues, made on first use and kept outside the repository."""

from tasks.classification.demo.paint import CLASSES, make_images, paint

__all__ = ["CLASSES", "make_images", "paint"]
