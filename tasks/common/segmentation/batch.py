"""What a loader of a segmentation task hands to training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        image: (B, C, *spatial) float32.
        label: (B, *spatial) int64 classes; -1 where a place does not count.
        position: (B,) of each in its data set.
    """

    image: Tensor
    label: Tensor
    position: Tensor


def collate(items: Sequence[Batch]) -> Batch:
    """A batch of items without the batch axis."""
    return Batch(*(torch.stack(parts) for parts in zip(*items, strict=True)))
