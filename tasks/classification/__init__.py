"""Image classification: any backbone with any attention module, compared on your own images."""
