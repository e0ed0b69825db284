"""CLAM: attention pooling whose attention is taught by an instance loss on the highest and lowest scored instances.

Source: Lu, Williamson, Chen, Chen, Barbieri and Mahmood, Data-efficient and weakly supervised computational pathology
on whole-slide images, Nature Biomedical Engineering 2021, arXiv 2004.09666. This file holds the form with a single
attention branch, and what it shares with the multi-branch form of :mod:`attention.clam_mb`.

Deviations from the released code: a bag with fewer than ``num_samples`` instances uses those it has in place of
failing; instances are ranked by the score, which orders them as its softmax does but without ties where that
underflows; several true classes (multi-label targets) have their losses averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.abmil import attention_cost, attention_weights
from attention.about import About
from attention.cost import Part, projection
from attention.parameters import NotNegative, Positive, Probability
from attention.pooling import (
    Objective,
    PooledBags,
    Pooler,
    check_features,
    join,
    numbered,
    rename,
    strip_wrappers,
)
from attention.registry import register
from kernels.dense import linear
from kernels.errors import InputError, unknown_name
from kernels.gated_attention_pool.embedded import AttentionPool, attention_pool, embedded_attention_pool
from kernels.segment import segment_top_k

_ATTENTION_DIM = {"small": 256, "big": 384}
_GATE_DROPOUT = 0.25  # fixed in the released code; on whenever dropout is


class CLAM(Pooler):
    """What both forms share: embedding, attention, instance classifiers and the loss.

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        num_rows: attention branches, 1 or C.
        hidden_dim: size H of the embedding.
        attention_dim: inner size of the score; None for that of ``size``.
        size: ``"small"`` (256) or ``"big"`` (384) inner size of the score.
        gate: whether the score is gated.
        dropout: probability on the embedding while training; above 0 it also switches on 0.25 in the score.
        num_samples: instances taken from either end for the instance loss; smaller bags use those they have.
        subtyping: classes exclude each other: the top instances of every other class count as negatives.
        bag_weight: share of the bag loss in the total; the instance loss has the rest.
        instance_loss: ``"ce"`` or ``"svm"`` (smooth top-1 SVM: Berrada, Zisserman and Kumar, ICLR 2018, with margin and
            temperature 1).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_rows: int,
        hidden_dim: int,
        attention_dim: int | None,
        size: str,
        gate: bool,
        dropout: float,
        num_samples: int,
        subtyping: bool,
        bag_weight: float,
        instance_loss: str,
    ) -> None:
        super().__init__()
        if size not in _ATTENTION_DIM:
            raise unknown_name("attention.size", size, _ATTENTION_DIM)
        if instance_loss not in ("ce", "svm"):
            raise unknown_name("attention.instance_loss", instance_loss, ("ce", "svm"))
        if num_samples < 1 or not 0 <= bag_weight <= 1:
            raise InputError(
                f"attention.num_samples={num_samples} must be 1 or more and attention.bag_weight={bag_weight} must lie "
                "between 0 and 1."
            )
        self.dim = dim
        self.num_classes = num_classes
        self.dropout = dropout
        self.num_samples = num_samples
        self.subtyping = subtyping
        self.bag_weight = bag_weight
        self.instance_loss = instance_loss
        attention_dim = attention_dim or _ATTENTION_DIM[size]
        self.embed = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(hidden_dim, (2 if gate else 1) * attention_dim)
        self.score = nn.Linear(attention_dim, num_rows)
        bound = 1 / math.sqrt(hidden_dim)  # as nn.Linear draws them
        self.instance_weight = nn.Parameter(torch.empty(num_classes, 2, hidden_dim).uniform_(-bound, bound))
        self.instance_bias = nn.Parameter(torch.empty(num_classes, 2).uniform_(-bound, bound))

    def attend(self, features: Tensor, cu_seqlens: Tensor) -> tuple[AttentionPool, dict[str, Tensor]]:
        """Pool with every attention row; the extras hold what the instance loss needs when there will be one."""
        check_features(features, self.dim, self.name)
        params = attention_weights(self.embed, self.gate, self.score)
        if self.bag_weight == 1 and not (self.training and self.dropout):
            attended = embedded_attention_pool(features, params, cu_seqlens)
            return attended, {"weights": attended.weights}
        hidden = F.dropout(linear(features, self.embed.weight, self.embed.bias, "relu"), self.dropout, self.training)
        gate_dropout = _GATE_DROPOUT if self.training and self.dropout else 0.0
        attended = attention_pool(hidden, params, cu_seqlens, gate_dropout=gate_dropout)
        return attended, {"weights": attended.weights, "hidden": hidden}

    def loss(self, bags: PooledBags, target: Tensor, cu_seqlens: Tensor, objective: Objective) -> dict[str, Tensor]:
        """``bag_weight`` x bag loss + the rest x instance loss, both means over the bags."""
        bag = objective.loss(bags.logits, target).mean()
        if self.bag_weight == 1:
            return {"bag": bag, "total": bag}
        instance = self.instance_losses(bags, cu_seqlens, objective.active(target)).mean()
        return {"bag": bag, "instance": instance, "total": self.bag_weight * bag + (1 - self.bag_weight) * instance}

    def cost(self, shape: Sequence[int]) -> list[Part]:
        """The bag's logits; the instance loss, of a few instances a bag, is not in it."""
        bags, instances = shape
        return [
            *attention_cost(self.embed, self.gate, self.score, bags, instances),
            projection("classifier", bags, self.embed.out_features, self.num_classes),
        ]

    def instance_losses(self, bags: PooledBags, cu_seqlens: Tensor, active: Tensor) -> Tensor:
        """Instance loss of each bag, (B,), where ``active (B, C)`` marks its true classes; 0 for an empty bag."""
        logits, valid = self.sampled_logits(bags, cu_seqlens)  # (C, B, 2, k, 2), (B, k)
        top, bottom = self._instance_loss(logits[:, :, 0], 1), self._instance_loss(logits[:, :, 1], 0)  # (C, B, k)
        count = valid.sum(1).clamp_min(1)
        true_class = ((top + bottom) * valid).sum(2) / (2 * count)
        mine = active.t().to(true_class.dtype)
        total = (true_class * mine).sum(0)
        if self.subtyping:
            other_class = (self._instance_loss(logits[:, :, 0], 0) * valid).sum(2) / count
            return (total + (other_class * (1 - mine)).sum(0)) / self.num_classes
        return total / mine.sum(0).clamp_min(1)

    def sampled_logits(self, bags: PooledBags, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Every class's instance classifier on the instances of highest and lowest score.

        Returns:
            logits: (C, B, 2, k, 2): class, bag, top or bottom, place, negative or positive.
            valid: (B, k), false past the end of a small bag.
        """
        hidden = bags.extras["hidden"]
        scores = bags.attention.detach()
        top, valid = segment_top_k(scores, cu_seqlens, self.num_samples)
        bottom, _ = segment_top_k(scores, cu_seqlens, self.num_samples, largest=False)
        chosen = torch.stack([top, bottom], 2)  # (R, B, 2, k)
        if len(hidden):
            sampled = hidden[chosen.clamp_max(len(hidden) - 1)].flatten(1, 3)  # (R, B * 2 * k, H)
        else:
            sampled = hidden.new_zeros(len(chosen), chosen[0].numel(), hidden.shape[1])
        logits = torch.matmul(sampled, self.instance_weight.transpose(1, 2)) + self.instance_bias[:, None]
        return logits.unflatten(1, chosen.shape[1:]), valid

    def _instance_loss(self, logits: Tensor, label: int) -> Tensor:
        """Loss of ``logits (..., 2)`` whose true class is ``label`` in every place."""
        if self.instance_loss == "svm":
            margin = logits.new_tensor([float(label != 0), float(label != 1)])
            return (logits + margin - logits[..., label, None]).logsumexp(-1)
        return logits.logsumexp(-1) - logits[..., label]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the paper's released ``CLAM_SB`` and ``CLAM_MB`` to ours, gated or not."""
        state = {
            key.replace("attention_net.2.", "attention_net.3.").replace(
                "attention_net.3.module.", "attention_net.3."
            ): value
            for key, value in strip_wrappers(state).items()
        }
        for kind in ("weight", "bias"):
            join(state, f"gate.{kind}", [f"attention_net.3.attention_{gate}.0.{kind}" for gate in "ab"])
            join(state, f"instance_{kind}", numbered(state, f"instance_classifiers.{{}}.{kind}"), stack=True)
            join(state, f"classifier_{kind}", numbered(state, f"classifiers.{{}}.{kind}"))
            state = rename(
                state,
                {
                    f"attention_net.0.{kind}": f"embed.{kind}",
                    f"attention_net.3.0.{kind}": f"gate.{kind}",
                    f"attention_net.3.attention_c.{kind}": f"score.{kind}",
                    f"classifiers.{kind}": f"classifier.{kind}",
                },
            )
        # Without the gate the score follows the tanh, after a dropout where there is one.
        for place in ("2", "3"):
            state = rename(state, {f"attention_net.3.{place}.{kind}": f"score.{kind}" for kind in ("weight", "bias")})
        return state


@register("clam_sb", kind="pooling")
class CLAMSingleBranch(CLAM):
    """CLAM-SB: gated attention taught by an instance loss, one branch (Lu et al. 2021).

    Arguments as :class:`CLAM`.
    """

    about = About("Lu et al., Nature BME 2021, 2004.09666", "O(N)", "gated_attention_pool", "GPL-3.0")

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
            1,
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
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        attended, extras = self.attend(features, cu_seqlens)
        embeddings = attended.pooled[:, 0]
        return PooledBags(self.classifier(embeddings), embeddings, attended.scores, extras)
