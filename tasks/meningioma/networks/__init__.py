"""Segmentation networks for volumes, by name.

>>> from tasks.meningioma.networks.build import available_networks
>>> available_networks()[:3]
['agunet', 'attention_unet', 'dagunet']
"""
