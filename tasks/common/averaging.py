"""Averages of the weights during training, kept instead of the last ones."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class AverageLateWeights(WeightAveraging):
    """Equal average of the weights after each epoch from ``first`` on (SWA, arXiv 1803.05407)."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the average takes in the weights now."""
        return epoch_idx is not None and epoch_idx >= self.first


class ExponentialAverage(WeightAveraging):
    """Exponential moving average of weights and buffers after every step.

    The decay is ``min(decay, (1 + n) / (10 + n))`` at step n, so that a short run is not left with its first weights.
    """

    def __init__(self, decay: float) -> None:
        def average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
            if not old.is_floating_point():
                return new
            step = float(count)
            return torch.lerp(new, old, min(decay, (1 + step) / (10 + step)))

        super().__init__(avg_fn=average)
