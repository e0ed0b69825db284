"""Meningioma segmentation in contrast-enhanced T1 volumes."""
