"""Losses of segmentation networks: functions of logits (B, K, *spatial) and labels (B, *spatial).

Sources: Milletari et al., V-Net, 3DV 2016, arXiv 1606.04797 (Dice with squares); Bouget et al., Frontiers in Radiology
2021, arXiv 2101.07715 (Dice averaged over the classes without the background, summed over the levels of the decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.errors import InputError, unknown_name

IGNORE = -1
"""Label of a place that counts in no loss, such as one outside the field of view."""


Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A scalar, from logits (B, K, *spatial) and shares of the classes (B, K, *spatial); all 0: not counted."""


def shares_of(label: Tensor, classes: int, size: Sequence[int] | None = None) -> Tensor:
    """Labels (B, *spatial) as shares of the classes (B, K, *size), in float32.

    Reduced to a coarser grid, a cell holds how much of it each class fills, so that small structures do not vanish.
    Places labelled :data:`IGNORE` hold 0 for all classes.
    """
    counted = label != IGNORE
    one_hot = F.one_hot(torch.where(counted, label, 0).long(), classes).movedim(-1, 1).float()
    shares = one_hot * counted[:, None]
    if size is None or tuple(size) == tuple(label.shape[1:]):
        return shares
    pool: Callable[[Tensor, list[int]], Tensor] = getattr(F, f"adaptive_avg_pool{len(size)}d")
    return pool(shares, list(size))


def foreground_dice(probabilities: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 minus the Dice averaged over the foreground classes, with squares, summed over the whole batch (AGUNet's).

    Args:
        probabilities: (B, K, *spatial).
        target: shares of the classes (B, K, *spatial).
        smooth: added to numerator and denominator.
    """
    p, y = probabilities[:, 1:], target[:, 1:]
    axes = [0, *range(2, p.ndim)]
    overlap, both = (p * y).sum(axes), p.square().sum(axes) + y.square().sum(axes)
    return 1 - ((2 * overlap + smooth) / (both + smooth)).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits with shares of the classes, over the places that count."""
    losses = -(target * logits.log_softmax(1)).sum(1)
    return losses.sum() / target.sum().clamp_min(1)


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy that surely classified places hardly enter (Lin et al., ICCV 2017, arXiv 1708.02002)."""
    log_p = logits.log_softmax(1)
    losses = -(target * (1 - log_p.exp()).pow(gamma) * log_p).sum(1)
    return losses.sum() / target.sum().clamp_min(1)


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    counted = target.sum(1, keepdim=True)
    return foreground_dice(logits.softmax(1) * (counted > 0), target)


LOSSES: dict[str, Loss] = {
    "dice": _dice,
    "dice_ce": lambda logits, target: _dice(logits, target) + cross_entropy(logits, target),
    "dice_focal": lambda logits, target: _dice(logits, target) + focal(logits, target),
    "ce": cross_entropy,
}


class DeepSupervision:
    """A loss summed over the levels of a decoder, whose reference is reduced to each level's grid.

    Args:
        loss: one of :data:`LOSSES`, or a function of the same form.
        classes: K.
        weights: of the levels, finest first; all 1, the plain sum of AGUNet's paper, when left out.

    Raises:
        InputError: the loss is not known, or a weight is negative.
    """

    def __init__(self, loss: str | Loss, classes: int, weights: Sequence[float] | None = None) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise unknown_name("training.loss", loss, LOSSES)
        if weights is not None and (not len(weights) or min(weights) < 0):
            raise InputError(f"training.level_weights={list(weights)} must be numbers of 0 or more, the finest first.")
        self.loss: Loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.classes, self.weights = classes, weights

    def __call__(self, levels: Sequence[Tensor], label: Tensor) -> Tensor:
        """A scalar, from logits (B, K, *spatial) of each level, finest first, and labels (B, *spatial).

        Raises:
            InputError: there are not as many weights as levels.
        """
        weights = self.weights if self.weights is not None and len(levels) > 1 else [1.0] * len(levels)
        if len(weights) != len(levels):
            raise InputError(
                f"training.level_weights has {len(weights)} weights; this network has {len(levels)} levels."
            )
        total = levels[0].new_zeros((), dtype=torch.float32)
        for logits, weight in zip(levels, weights, strict=True):
            if weight:
                total = total + weight * self.loss(logits.float(), shares_of(label, self.classes, logits.shape[2:]))
        return total
