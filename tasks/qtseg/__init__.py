"""Segmentation of 2-D images: lesions, polyps, nuclei, vessels, with any decoder and any backbone."""
