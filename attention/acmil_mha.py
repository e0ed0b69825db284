"""The multi-head form of ACMIL: one learned query per branch attends to the bag with eight heads.

Source: Zhang et al., Attention-Challenging Multiple Instance Learning, ECCV 2024, arXiv 2311.07125, and its released
code (``ACMIL_MHA``).

The queries do not depend on the bag, so the key projection moves from the instances to the queries, and, the weights of
a bag adding up to one, the value projection from the instances to the pooled bag: the same numbers for K * heads inner
products per instance in place of 2 K + 1 full projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.acmil import ChallengedPooler
from attention.cost import Part, projection
from attention.parameters import Count, NotNegative, Positive, Probability
from attention.pooling import PooledBags, check_features, join, numbered, rename, strip_wrappers, weighted_sums
from attention.registry import register
from kernels.dense import linear
from kernels.errors import InputError
from kernels.gated_attention_pool import MASKED
from kernels.segment import segment_lengths, segment_softmax, segment_weighted_sum

_EPS = 1e-6  # of the layer norms, as released


@register("acmil_mha", kind="pooling")
class ACMILMultiHead(ChallengedPooler):
    """ACMIL with multi-head attention: one learned query per branch (Zhang et al. 2024).

    ``num_heads`` must divide the inner size; ``dropout`` falls on each attention block's output. The other arguments
    are those of :class:`attention.acmil.ChallengedPooler`. ``attention`` is the logarithm of the softmax averaged over
    heads; the raw scores (heads, K, T) are in ``extras["head_scores"]``.
    """

    about = About("Zhang et al., ECCV 2024, 2311.07125", "O(N)", "", "MIT")

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive | None = None,
        num_heads: Positive = 8,
        num_branches: Positive = 5,
        num_masked: Count = 10,
        mask_drop: Probability = 0.6,
        semantic_weight: NotNegative = 1.0,
        diversity_weight: NotNegative = 1.0,
        bag_weight: NotNegative = 1.0,
        entropy_weight: NotNegative = 0.0,
        entropy_top_k: Positive | None = None,
        dropout: Probability = 0.1,
    ) -> None:
        super().__init__(
            dim,
            num_classes,
            hidden_dim,
            num_branches,
            num_masked,
            mask_drop,
            semantic_weight,
            diversity_weight,
            bag_weight,
            entropy_weight,
            entropy_top_k,
        )
        if self.hidden_dim % num_heads:
            raise InputError(f"attention.hidden_dim={self.hidden_dim} must be a multiple of num_heads={num_heads}.")
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(dim, self.hidden_dim, bias=False)
        self.queries = nn.Parameter(torch.randn(num_branches, self.hidden_dim) * 1e-6)
        self.q = Projections(num_branches, self.hidden_dim)
        self.k = Projections(num_branches, self.hidden_dim)
        self.v = Projections(num_branches, self.hidden_dim)
        self.out = Projections(num_branches, self.hidden_dim)
        self.norm_weight = nn.Parameter(torch.ones(num_branches, self.hidden_dim))
        self.norm_bias = nn.Parameter(torch.zeros(num_branches, self.hidden_dim))
        self.bag_v = Projections(1, self.hidden_dim)
        self.bag_out = Projections(1, self.hidden_dim)
        self.bag_norm = nn.LayerNorm(self.hidden_dim, eps=_EPS)

    def forward(self, features: Tensor, cu_seqlens: Tensor, mask_noise: Tensor | None = None) -> PooledBags:
        """As :class:`Pooler`; ``mask_noise (K * heads, B, num_masked)`` replaces the draw of hidden instances."""
        check_features(features, self.dim, self.name)
        branches, heads = self.num_branches, self.num_heads
        hidden = linear(features, self.embed.weight, activation="relu")
        scores = self._scores(hidden)
        if self.hides:
            scores = scores.masked_fill(self.hide_top(scores.detach(), cu_seqlens, mask_noise), MASKED)
        weights = segment_softmax(scores, cu_seqlens)  # (K * heads, T)
        pooled = segment_weighted_sum(weights, hidden, cu_seqlens).unflatten(1, (branches, heads))  # (B, K, heads, H)
        full = (segment_lengths(cu_seqlens) > 0)[:, None, None]  # the weights of an empty bag add up to zero, not one
        parts = self.out(self.v.of_heads(pooled, full))
        parts = F.layer_norm(self.dropout(parts), (self.hidden_dim,), eps=_EPS) * self.norm_weight + self.norm_bias
        bag = self.bag_out(self.bag_v.of_heads(pooled.mean(1, keepdim=True), full))[:, 0]
        embeddings = self.bag_norm(self.dropout(bag))
        by_branch = weights.unflatten(0, (branches, heads))
        extras = {
            "branch_logits": self.classify_branches(parts),
            "weights": weights,
            "head_scores": scores.unflatten(0, (branches, heads)).transpose(0, 1),
        }
        attention = by_branch.detach().mean(1).clamp_min(torch.finfo(weights.dtype).tiny).log()
        return PooledBags(self.classifier(embeddings), embeddings, attention, extras)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        hidden, branches, rows = self.hidden_dim, self.num_branches, self.num_branches * self.num_heads
        queries = 2 * branches * hidden**2
        pooled = bags * (branches + 1)  # the branches and the bag, each through two layers
        weights = (branches + 1) * hidden**2
        return [
            projection("embedding", instances, self.dim, hidden),
            Part("queries through the keys", 2 * queries, queries + (branches + rows) * hidden),
            projection("scores", instances, hidden, rows),
            weighted_sums("bag features", bags, instances, rows, hidden),
            Part("values", 2 * pooled * hidden**2, pooled * (self.num_heads + 1) * hidden + weights),
            Part("outputs", 2 * pooled * hidden**2, 2 * pooled * hidden + weights),
            *self.classifier_cost(bags),
        ]

    def _scores(self, hidden: Tensor) -> Tensor:
        """Raw scores (K * heads, T) of every branch's query against the keys of ``hidden (T, H)``."""
        width = self.hidden_dim // self.num_heads
        queries = self.q(self.queries).unflatten(-1, (self.num_heads, width)) / math.sqrt(width)
        keys = self.k.weight.unflatten(1, (self.num_heads, width))  # (K, heads, width, H)
        through_keys = torch.einsum("kad,kadh->kah", queries, keys).flatten(0, 1)
        offset = (queries * self.k.bias.unflatten(1, (self.num_heads, width))).sum(-1).flatten()
        scores = F.linear(hidden, through_keys, offset).t()
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the paper's released ``ACMIL_MHA`` to ours."""
        state = strip_wrappers(state)
        if "q" in state:
            state["queries"] = state.pop("q")[0]
        for kind in ("weight", "bias"):
            for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj")):
                parts = numbered(state, f"sub_attention.{{}}.{theirs}.{kind}")
                join(state, f"{ours}.{kind}", parts, stack=True)
                join(state, f"bag_{ours}.{kind}", [f"bag_attention.{theirs}.{kind}"], stack=True)
            join(state, f"norm_{kind}", numbered(state, f"sub_attention.{{}}.layer_norm.{kind}"), stack=True)
            join(state, f"branch_{kind}", numbered(state, f"classifier.{{}}.fc.{kind}"), stack=True)
            state = rename(
                state,
                {
                    f"dimreduction.fc1.{kind}": f"embed.{kind}",
                    f"bag_attention.layer_norm.{kind}": f"bag_norm.{kind}",
                    f"Slide_classifier.fc.{kind}": f"classifier.{kind}",
                },
            )
        return state


class Projections(nn.Module):
    """One H to H linear layer per branch, drawn as ``nn.Linear`` draws its own."""

    def __init__(self, branches: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(branches, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(branches, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Each branch's layer on its own row of ``x (..., K, H)``."""
        return torch.einsum("...kh,kgh->...kg", x, self.weight) + self.bias

    def of_heads(self, pooled: Tensor, full: Tensor) -> Tensor:
        """Each head's own outputs of its own input ``(B, K, heads, H)``, heads side by side, (B, K, H).

        The bias counts where ``full (B, 1, 1)`` says that there was anything to pool.
        """
        weight = self.weight.unflatten(1, (pooled.shape[2], -1))
        return torch.einsum("bkah,kadh->bkad", pooled, weight).flatten(2) + self.bias * full
