"""The losses of QTSeg and of self-guided attention.

Sources: Tran et al., QTSeg, arXiv 2412.17241; Sinha and Dolz, JBHI 2020, arXiv 1906.02849. QTSeg's released Dice for
more than two classes adds up the classes, the background among them, so that it weighs more the more classes there are;
``form="mean"`` takes the mean over the classes other than the background.

All take logits (B, K, H, W), targets (B, H, W) of whole numbers below K, and optionally ``valid`` (B, H, W), false
where a pixel is to count for nothing, such as outside of the field of view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.errors import InputError, unknown_name

SMOOTH = 1e-6
FORMS = ("released", "mean")


class QTSegLoss(nn.Module):
    """Cross entropy plus Dice: binary for two classes, over the classes for more.

    Args:
        form: of the Dice for more than two classes, ``"released"`` or ``"mean"``.
        weights: of cross entropy and Dice.

    Raises:
        InputError: the form is not known or a weight is negative.
    """

    def __init__(
        self, form: Literal["released", "mean"] = "released", weights: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise unknown_name("loss.form", form, FORMS)
        if len(weights) != 2 or min(weights) < 0:
            raise InputError(
                f"loss.weights={list(weights)} must be two numbers of at least 0, for cross entropy and Dice."
            )
        self.form = form
        self.weights = tuple(weights)

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        if logits.shape[1] == 2:
            dice = binary_dice(logits, target, valid)
        else:
            dice = categorical_dice(logits, target, valid, self.form)
        return self.weights[0] * cross_entropy(logits, target, valid) + self.weights[1] * dice


class SelfGuidedLoss(nn.Module):
    """Cross entropy of every prediction, and the network's auxiliary losses, all added up."""

    def forward(
        self, levels: Iterable[Tensor], auxiliary: Mapping[str, Tensor], target: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar, of what :meth:`SelfGuided.forward_training` gives."""
        entropies = [cross_entropy(logits, target, valid) for logits in levels]
        return torch.stack([*entropies, *auxiliary.values()]).sum()


def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the pixels; with one channel of logits, the binary form."""
    if logits.shape[1] == 1:
        each = F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype), reduction="none")
    else:
        each = F.cross_entropy(logits, target.long(), reduction="none")
    return _mean(each, valid)


def focal(
    logits: Tensor, target: Tensor, valid: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Binary focal loss of one channel of logits (Lin et al., ICCV 2017), ``alpha`` for the foreground."""
    truth = target.to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits[:, 0], truth, reduction="none")
    missed = 1 - torch.exp(-entropy)
    return _mean((alpha * truth + (1 - alpha) * (1 - truth)) * missed**gamma * entropy, valid)


def binary_dice(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 minus the Dice of class 1, of each image, averaged; of one channel by the sigmoid, of more by the softmax."""
    shares = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(1)[:, 1]
    return _dice(shares, (target == 1).to(shares.dtype), valid).mean()


def categorical_dice(
    logits: Tensor, target: Tensor, valid: Tensor | None = None, form: Literal["released", "mean"] = "released"
) -> Tensor:
    """1 minus the Dice of each class and image: summed over all classes, or the mean over those but the background."""
    shares = logits.softmax(1)
    truth = F.one_hot(target.long(), logits.shape[1]).movedim(-1, 1).to(shares.dtype)
    each = _dice(shares, truth, None if valid is None else valid[:, None])
    return each.sum(1).mean() if form == "released" else each[:, 1:].mean()


def _dice(shares: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
    """1 minus the Dice of every map (..., H, W)."""
    if valid is not None:
        shares, truth = shares * valid, truth * valid
    overlap = (shares * truth).sum((-2, -1))
    total = shares.sum((-2, -1)) + truth.sum((-2, -1))
    return 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)


def _mean(each: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return each.mean()
    return (each * valid).sum() / valid.sum().clamp_min(1)
