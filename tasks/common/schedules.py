"""Learning rates as functions of training progress."""

from __future__ import annotations

import math


def half_cosine(progress_epoch: float, epochs: float, warmup: float, lr: float, min_lr: float) -> float:
    """Learning rate after ``progress_epoch`` epochs (fractional within one): linear warm-up from 0, then half a cosine.

    Args:
        epochs: length of training, the cosine's end.
        warmup: epochs of warm-up, counted in ``epochs``; 0 for none.
        lr: highest learning rate.
        min_lr: the rate at the end and beyond.

    >>> [round(half_cosine(epoch, 10, 2, 1.0, 0.0), 3) for epoch in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress_epoch < warmup:
        return lr * progress_epoch / warmup
    share = min(1.0, (progress_epoch - warmup) / max(epochs - warmup, 1e-12))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * share))
