"""The slide model: an optional standardisation of the features, then a pooler chosen by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

import attention
from attention.pooling import PooledBags, Pooler

DEFAULT_ATTENTION = "acmil"


class SlideModel(nn.Module):
    """Packed bags to :class:`attention.pooling.PooledBags`.

    Args:
        dim: feature size D.
        num_outputs: number of logits.
        pooler: ``{"name": ..., parameters...}`` as in ``conf/attention``; the name may be a dotted path.
        standardise: hold a mean and scale per feature, set from the training instances by :meth:`fit_scaler`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, num_outputs: int, pooler: Mapping[str, Any], standardise: bool = False) -> None:
        super().__init__()
        params = {key: value for key, value in pooler.items() if key != "name"}
        self.dim = dim
        self.standardise = standardise
        self.pooler = cast(
            Pooler, attention.create(pooler["name"], kind="pooling", dim=dim, num_classes=num_outputs, **params)
        )
        if standardise:
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("scale", torch.ones(dim))

    def fit_scaler(self, features: Tensor) -> None:
        """Set mean and scale from ``features (N, D)`` of the training bags; constant features keep scale 1."""
        deviation = features.double().std(0, correction=0)
        self.mean.copy_(features.double().mean(0))
        self.scale.copy_(torch.where(deviation > 1e-8, 1 / deviation.clamp_min(1e-8), torch.ones_like(deviation)))

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        """Pool ``features (T, D)``, any floating type, with boundaries ``cu_seqlens (B + 1,)``."""
        if self.standardise:
            features = (features.to(self.mean.dtype) - self.mean) * self.scale
        return cast(PooledBags, self.pooler(features, cu_seqlens))
