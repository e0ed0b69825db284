"""LAMA: scores of many heads from two vectors per head, a bilinear form of rank one.

Source: Mehta, Rangwala and Ramakrishnan, Low Rank Factorization for Compact Multi-Head Self-Attention, arXiv
1912.00835. With c the mean of a bag's instances, head t scores instance j by

    e_jt = tanh((p_t . c) (q_t . x_j));

the scores of an instance are divided by their Euclidean norm over heads, a softmax over instances follows, and each
head's weighted sum of instances is a row of the result. How p and q start is not stated: normal, deviation C^-0.5.

The paper pools. The mixer is ours: every token i is a context of its own, c = x_i, and head t sums the t-th part of
projected values. The norm couples the heads at every pair of tokens, so that all pairs are computed, in blocks of
queries that the backward pass computes again: memory grows with N, time with its square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.about import About
from attention.cost import Part, elementwise, projection
from attention.layout import heads_first, heads_last, split_heads, weights_of
from attention.mixer import Mixer
from attention.parameters import Positive, Probability
from attention.pooling import PooledBags, Pooler, check_features, rename
from attention.registry import register
from kernels.errors import InputError
from kernels.operators import autocasting, precisely
from kernels.segment import segment_ids, segment_lengths, segment_softmax, segment_weighted_sum

QUERY_ROWS = 128  # queries of the mixer whose scores exist at one time


class LowRankPool(nn.Module):
    """LAMA without a classifier: packed bags in, a weighted sum of instances per head out.

    Args:
        dim: feature size D.
        num_heads: rows of the result.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.randn(dim, num_heads) * dim**-0.5) for _ in range(2))

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (B, heads, D), weights (heads, T) and scores (heads, T), whose softmax over a bag the weights are.

        Args:
            features: (T, D).
            cu_seqlens: (B + 1,), boundaries of the bags, which may be empty.
        """
        lengths = segment_lengths(cu_seqlens)
        share = (1 / lengths.clamp_min(1).to(features.dtype)).repeat_interleave(lengths, output_size=len(features))
        context = segment_weighted_sum(share[None], features, cu_seqlens)[:, 0]
        asked, offered = _precise(context @ self.p), _precise(features @ self.q)
        scores = F.normalize(torch.tanh(asked[segment_ids(cu_seqlens, len(features))] * offered), dim=-1).t()
        weights = segment_softmax(scores, cu_seqlens)
        return segment_weighted_sum(weights, features, cu_seqlens), weights, scores


@register("low_rank", kind="pooling")
class LowRankPooling(Pooler):
    """LAMA: a weighted sum per head, scored by rank-one forms of the bag's mean (Mehta et al. 2019).

    The classifier sees the sums of all heads side by side.

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        num_heads: sums per bag.

    Raises:
        InputError: there is no head.
    """

    about = About("Mehta et al. (LAMA), 2019, 1912.00835", "O(N)")

    def __init__(self, dim: Positive, num_classes: Positive, num_heads: Positive = 8) -> None:
        super().__init__()
        if num_heads < 1:
            raise InputError(f"attention 'low_rank': num_heads={num_heads} must be at least 1.")
        self.dim = dim
        self.num_branches = num_heads
        self.pool = LowRankPool(dim, num_heads)
        self.classifier = nn.Linear(num_heads * dim, num_classes)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        check_features(features, self.dim, self.name)
        if not autocasting(features):
            features = features.to(self.pool.p.dtype)
        sums, weights, scores = self.pool(features, cu_seqlens)
        embeddings = sums.flatten(1)
        return PooledBags(self.classifier(embeddings), embeddings, scores, {"weights": weights})

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        heads, sums = self.num_branches, bags * self.num_branches * self.dim
        return [
            Part("context", instances * self.dim, instances * self.dim + bags * self.dim),
            projection("asked", bags, self.dim, heads),
            projection("offered", instances, self.dim, heads),
            elementwise("scores and weights", instances * heads),
            Part("sums", 2 * instances * heads * self.dim, instances * (self.dim + heads) + sums),
            projection("classifier", bags, heads * self.dim, self.classifier.out_features),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The paper's p and q beside a classifier, to ours."""
        return rename(state, {"p": "pool.p", "q": "pool.q"})


@register("low_rank", kind="mixer")
class LowRankMixer(Mixer):
    """LAMA between tokens: each token, as the context, scores all others by rank-one forms (after Mehta et al. 2019).

    Args:
        dim: channels C.
        num_heads: heads.
        bias: whether the projections of values and output have biases.
        proj_drop: dropout on the output while training.
    """

    about = About("Mehta et al. (LAMA), 2019, 1912.00835; as a mixer ours", "O(N^2)")
    grids = (1, 2, 3)

    def __init__(self, dim: Positive, num_heads: Positive = 8, bias: bool = True, proj_drop: Probability = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.p, self.q = (nn.Parameter(torch.randn(dim, num_heads) * dim**-0.5) for _ in range(2))
        self.v = nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        out = self._core(x, split_heads(self.v(x), self.num_heads), mask)
        return self.proj_drop(self.proj(heads_last(out, x.shape[1:-1])))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        def core(values: Tensor) -> Tensor:
            return self._core(x, values, mask).transpose(1, 2).unflatten(1, x.shape[1:-1])

        return weights_of(core, split_heads(x, self.num_heads))

    def _core(self, x: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, N, E) of values (B, *grid, heads, E)."""
        asked, offered = (_precise(x @ part).flatten(1, -2) for part in (self.p, self.q))  # (B, N, heads)
        values = heads_first(v)
        hidden = None
        if mask is not None:
            real = mask.flatten(1)
            hidden = ~(real | ~real.any(1, keepdim=True))[:, None, None]
        tokens = asked.shape[1]
        parts = []
        for rows in asked.split(QUERY_ROWS, 1):
            if tokens > QUERY_ROWS and torch.is_grad_enabled():
                parts.append(checkpoint(_rows, rows, offered, values, hidden, use_reentrant=False))
            else:
                parts.append(_rows(rows, offered, values, hidden))
        return torch.cat(parts, 2)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        total = batch * tokens
        pairs = total * tokens
        return [
            projection("p and q", total, self.dim, 2 * self.num_heads),
            projection("values", total, self.dim, self.dim),
            Part("scores", 12 * pairs * self.num_heads, 2 * total * self.num_heads),
            Part("sums", 2 * pairs * self.dim, 2 * total * self.dim),
            elementwise("softmax", total * self.num_heads, tensors=1),
            projection("output", total, self.dim, self.dim),
        ]


def _rows(asked: Tensor, offered: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Outputs (B, heads, R, E) of the R tokens of ``asked`` (B, R, heads) from N with values (B, heads, N, E)."""
    scores = F.normalize(torch.tanh(asked.transpose(1, 2)[..., None] * offered.transpose(1, 2)[:, :, None]), dim=1)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    with precisely(values):
        return (scores.softmax(-1) @ values.to(scores.dtype)).to(values.dtype)


def _precise(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
