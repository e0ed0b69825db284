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


def steps_down(progress_epoch: float, every: float, factor: float, lr: float) -> float:
    """``lr`` times ``factor`` for every ``every`` whole epochs that are done.

    >>> [steps_down(epoch, 50, 0.5, 1.0) for epoch in (0, 49.9, 50, 100)]
    [1.0, 1.0, 0.5, 0.25]
    """
    return float(lr * factor ** math.floor(progress_epoch / every))


def polynomial(progress_epoch: float, epochs: float, power: float, lr: float) -> float:
    """``lr`` times (1 - share of the whole epochs done) to the ``power``, which falls once per epoch.

    >>> [round(polynomial(epoch, 10, 0.9, 1.0), 3) for epoch in (0, 0.5, 5, 10)]
    [1.0, 1.0, 0.536, 0.0]
    """
    return float(lr * max(0.0, 1 - math.floor(progress_epoch) / epochs) ** power)
