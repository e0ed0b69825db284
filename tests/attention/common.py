"""Small poolers, packed bags and objectives for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from attention.pooling import Pooler

DIM, CLASSES = 12, 3
SMALL: dict[str, dict[str, Any]] = {
    "abmil": {"hidden_dim": 8, "attention_dim": 4},
    "acmil": {"hidden_dim": 8, "attention_dim": 4, "num_branches": 3, "num_masked": 4, "entropy_weight": 0.1},
    "acmil_mha": {"hidden_dim": 8, "num_heads": 2, "num_branches": 3, "num_masked": 4, "dropout": 0.0},
    "clam_mb": {"hidden_dim": 8, "attention_dim": 4, "dropout": 0.0, "num_samples": 3, "subtyping": True},
    "clam_sb": {"hidden_dim": 8, "attention_dim": 4, "dropout": 0.0, "num_samples": 3},
    "dsmil": {"query_dim": 6, "passing_v": True},
    "efficient_probing": {"num_queries": 4, "norm": None},
    "gated_abmil": {"hidden_dim": 8, "attention_dim": 4},
    "low_rank": {"num_heads": 3},
    "max": {"hidden_dim": 8, "dropout": 0.0},
    "mean": {"hidden_dim": 8, "dropout": 0.0},
    "transmil": {"hidden_dim": 16, "num_heads": 4, "num_landmarks": 4, "dropout": 0.0},
}


class CrossEntropy:
    """One of ``CLASSES`` classes per bag."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    def active(self, target: Tensor) -> Tensor:
        return F.one_hot(target, CLASSES).bool()


class MultiLabel:
    """Any number of ``CLASSES`` labels per bag."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)

    def active(self, target: Tensor) -> Tensor:
        return target > 0.5


def make(name: str, seed: int = 0, **changes: Any) -> Pooler:
    """A small pooler with weights that follow from ``seed``."""
    torch.manual_seed(seed)
    pooler = attention.create(name, kind="pooling", dim=DIM, num_classes=CLASSES, **{**SMALL.get(name, {}), **changes})
    assert isinstance(pooler, Pooler)
    return pooler


def bounds(sizes: list[int]) -> Tensor:
    """cu_seqlens of bags of ``sizes``."""
    return torch.tensor([0, *sizes]).cumsum(0)
