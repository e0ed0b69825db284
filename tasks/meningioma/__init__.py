"""Segmentation of meningiomas in T1-weighted volumes: ``python -m tasks.meningioma``."""
