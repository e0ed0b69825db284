"""Weights of the loss and of the draw that make up for classes of unequal size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import InputError
from tasks.common.weighted_metrics import Kind


def balanced_weights(kind: Kind, targets: Tensor, num_classes: int) -> tuple[float, ...]:
    """Class weights inversely proportional to frequency, with mean 1 over the given targets.

    ``targets`` are class indices (n,), or a 0/1 matrix (n, labels), whose labels are weighted by their own rarity.
    """
    counts = targets.sum(0) if kind == "multilabel" else torch.bincount(targets, minlength=num_classes)
    counts = counts.double().clamp_min(1)
    weights = counts.sum() / counts
    weights = weights / ((weights * counts).sum() / counts.sum())
    return tuple(weights.tolist())


def sampling_weights(setting: str, kind: Kind, labels: Tensor) -> list[float] | None:
    """Weight with which each sample is drawn: None for ``shuffle``, 1 / frequency of its class for ``weighted``.

    Raises:
        InputError: ``setting`` is neither.
    """
    if setting == "shuffle":
        return None
    if setting != "weighted":
        raise InputError(f"training.sampling={setting} is not known; use shuffle or weighted.")
    if kind == "multilabel":
        _, labels = torch.unique(labels, dim=0, return_inverse=True)
    counts = torch.bincount(labels).double()
    return list((1 / counts[labels]).tolist())
