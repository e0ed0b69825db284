"""What 2-D and 3-D segmentation share: losses, training, inference, metrics and pictures."""
