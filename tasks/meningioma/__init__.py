"""Meningioma segmentation in T1-weighted volumes."""
