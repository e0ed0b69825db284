"""Whole-slide-image classification by multiple instance learning: from slides to heat maps."""
