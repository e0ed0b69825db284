"""What 2-D and 3-D segmentation share: losses, training, inference, metrics with intervals, pictures.

A segmentation network maps images (B, C, *spatial) to logits (B, K, *spatial) of K classes, of which class 0 is the
background. One that is trained at several resolutions has ``forward_levels`` too, which returns a list of logits,
finest first, whose first element is what ``forward`` returns; one with losses of its own has ``forward_training``,
which returns that list and a dictionary of scalars to add.
"""
