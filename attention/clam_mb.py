"""CLAM with an attention branch and a classifier of its own for every class.

Source: Lu et al., Nature Biomedical Engineering 2021, arXiv 2004.09666; see :mod:`attention.clam_sb`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from attention.about import About
from attention.clam_sb import CLAM
from attention.parameters import NotNegative, Positive, Probability
from attention.pooling import PooledBags
from attention.registry import register


@register("clam_mb", kind="pooling")
class CLAMMultiBranch(CLAM):
    """CLAM-MB: one gated attention branch per class, taught by an instance loss (Lu et al. 2021).

    Arguments as :class:`attention.clam_sb.CLAM`. The bag feature holds the classes' features one after the other.
    """

    about = About("Lu et al., Nature BME 2021, 2004.09666", "O(N)", "gated_attention_pool", "GPL-3.0")

    attention_rows = "class"

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive = 512,
        attention_dim: Positive | None = None,
        size: Literal["small", "big"] = "small",
        gate: bool = True,
        dropout: Probability = 0.25,
        num_samples: Positive = 8,
        subtyping: bool = False,
        bag_weight: NotNegative = 0.7,
        instance_loss: Literal["ce", "svm"] = "ce",
    ) -> None:
        super().__init__(
            dim,
            num_classes,
            num_classes,
            hidden_dim,
            attention_dim,
            size,
            gate,
            dropout,
            num_samples,
            subtyping,
            bag_weight,
            instance_loss,
        )
        bound = 1 / math.sqrt(hidden_dim)
        self.classifier_weight = nn.Parameter(torch.empty(num_classes, hidden_dim).uniform_(-bound, bound))
        self.classifier_bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        attended, extras = self.attend(features, cu_seqlens)
        logits = (attended.pooled * self.classifier_weight).sum(-1) + self.classifier_bias
        return PooledBags(logits, attended.pooled.flatten(1), attended.scores, extras)
