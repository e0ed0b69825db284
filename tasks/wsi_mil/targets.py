"""The four kinds of slide target: what a model puts out for each, its loss and its probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.errors import InputError, unknown_name
from tasks.common.weighted_metrics import Kind


@dataclass(frozen=True)
class Target:
    """Classes of a cohort and how logits relate to them; fulfils ``attention.pooling.Objective``.

    Binary and multi-class targets use one output per class and cross-entropy. Multi-label targets use one output per
    label and binary cross-entropy. Ordinal targets of C classes use C - 1 outputs, P(y > k | y > k - 1), so that their
    product is a proper distribution (CORN: Shi, Cao and Raschka, 2021, arXiv 2111.08851).

    Attributes:
        kind: which of the four.
        classes: names, in order (of severity when ordinal).
        weights: loss weight of each class, mean 1 over the training bags, or None.
    """

    kind: Kind
    classes: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown_name("data.target", self.kind, get_args(Kind))
        if len(self.classes) < (1 if self.kind == "multilabel" else 2):
            raise InputError(
                f"a {self.kind} target needs two classes at least; the labels hold only {list(self.classes)}."
            )

    @property
    def num_outputs(self) -> int:
        """Number of logits a model needs."""
        return len(self.classes) - 1 if self.kind == "ordinal" else len(self.classes)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each row, (M,), for ``logits (M, outputs)`` and class indices (M,) or a 0/1 matrix (M, labels)."""
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device, dtype=logits.dtype)
        if self.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(
                logits, target.to(logits.dtype), weight=weights, reduction="none"
            ).mean(1)
        if self.kind == "ordinal":
            passed = self.active(target)
            reached = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)
            loss = F.binary_cross_entropy_with_logits(logits, passed.to(logits.dtype), reduction="none")
            loss = (loss * reached).sum(1) / reached.sum(1)
            return loss if weights is None else loss * weights[target]
        return F.cross_entropy(logits, target, weight=weights, reduction="none")

    def active(self, target: Tensor) -> Tensor:
        """Outputs that are on for each row, (M, outputs) bool; for ordinal targets the thresholds passed."""
        if self.kind == "multilabel":
            return target > 0.5
        if self.kind == "ordinal":
            return target[:, None] > torch.arange(self.num_outputs, device=target.device)
        return F.one_hot(target, self.num_outputs).bool()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities (M, C); rows sum to one except for multi-label targets."""
        if self.kind == "multilabel":
            return logits.sigmoid()
        if self.kind == "ordinal":
            above = logits.sigmoid().cumprod(1)
            above = torch.cat([torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])], 1)
            return above[:, :-1] - above[:, 1:]
        return logits.softmax(1)

    def predicted(self, probabilities: Tensor) -> Tensor:
        """Predicted class index (M,), or a 0/1 matrix (M, C) at the threshold 0.5 for multi-label targets."""
        return (probabilities > 0.5).long() if self.kind == "multilabel" else probabilities.argmax(1)


def infer_kind(requested: str, classes: Sequence[str], num_label_columns: int) -> Kind:
    """The kind of target: as requested, or from the labels when ``requested`` is 'auto'."""
    if requested != "auto":
        if requested not in get_args(Kind):
            raise unknown_name("data.target", requested, ["auto", *get_args(Kind)])
        return cast(Kind, requested)
    if num_label_columns > 1:
        return "multilabel"
    return "binary" if len(classes) == 2 else "multiclass"
