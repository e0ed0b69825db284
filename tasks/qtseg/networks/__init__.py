"""Networks of 2-D segmentation: images (B, C, H, W) of any size to logits (B, classes, H, W)."""
