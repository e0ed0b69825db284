"""Dual cross attention: the most attended tokens read all others, and images are read in pairs while training.

Source: Zhu et al., Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification,
CVPR 2022, arXiv 2205.02151, without released code. At inference the paper adds the class probabilities of the
self-attention and the global-local branch, or concatenates their class tokens; it does not say whether the class token
is among the queries of global-local attention, which is therefore an option.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, projection
from attention.cross import Cross
from attention.layout import heads_first, split_heads, weights_of
from attention.masking import key_mask
from attention.parameters import Probability
from attention.registry import register
from attention.softmax import SoftmaxAttention
from kernels.errors import InputError


def rollout(attentions: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """How much the class token of the last layer sees of each input token, through all layers.

    Half of each layer is its attention and half its skip connection. One row of the product of the layers' matrices is
    wanted, so that vectors are multiplied with matrices and never matrices with each other.

    Args:
        attentions: one for each layer, the first layer first, (B, heads, N, N) or the mean (B, N, N) of the heads; the
            class token is token 0.
        mask: (B, N) bool, true for real tokens.

    Returns:
        (B, N) float32 or wider, without a gradient.
    """
    if len(attentions) == 0:
        raise InputError("the rollout needs the attention of at least one layer; got none.")
    seen: Tensor | None = None
    with torch.no_grad():
        for layer in reversed(list(attentions)):
            matrix = layer.mean(1) if layer.dim() == 4 else layer
            matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            if mask is not None:
                matrix = matrix.masked_fill(~(mask[:, :, None] & mask[:, None]), 0)
            if seen is None:
                seen = torch.zeros_like(matrix[:, 0])
                seen[:, 0] = 1
            seen = (seen + (seen[:, None] @ matrix)[:, 0]) / 2
    assert seen is not None
    return seen


def most_seen(seen: Tensor, ratio: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The fraction ``ratio`` of the tokens after the class token, at least one, that are seen most.

    Args:
        seen: (B, N) from :func:`rollout`.
        ratio: more than 0, at most 1.
        mask: (B, N) bool, true for real tokens; the fraction is of these.

    Returns:
        index: (B, R) positions, the most seen first.
        chosen: (B, R) bool, false where an item with fewer real tokens has less than R.
    """
    tokens = seen[:, 1:]
    if tokens.shape[1] == 0:
        raise InputError("tokens are selected from those after the class token, and there are none.")
    kept = _share(tokens.shape[1], ratio)
    if mask is None:
        index = tokens.topk(kept, dim=1).indices + 1
        return index, torch.ones_like(index, dtype=torch.bool)
    real = mask[:, 1:]
    index = tokens.masked_fill(~real, -torch.inf).topk(kept, dim=1).indices + 1
    count = real.sum(1, keepdim=True)
    wanted = ((count * ratio + _ROUNDING).long()).clamp_min(1).minimum(count)
    return index, torch.arange(kept, device=seen.device) < wanted


class _SharedProjection(Cross):
    """Queries, keys and values from one fused layer, under the names of self-attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_drop: float) -> None:
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _attend(
        self, q: Tensor, tokens: Tensor, visible: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        bias = self.qkv.bias
        wanted = F.linear(q, self.qkv.weight[: self.dim], None if bias is None else bias[: self.dim])
        read = F.linear(tokens, self.qkv.weight[self.dim :], None if bias is None else bias[self.dim :])
        queries = heads_first(split_heads(wanted, self.num_heads))
        k, v = split_heads(read, 2 * self.num_heads).chunk(2, dim=-2)
        keys = heads_first(k)

        def core(values: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(queries, keys, heads_first(values), attn_mask=visible)
            return out.transpose(1, 2)

        out = self.proj_drop(self.proj(core(v).flatten(2)))
        return out, weights_of(core, v) if want_weights else None

    def _parts(self, batch: int, queries: int, tokens: int) -> list[Part]:
        return [
            projection("queries", batch * queries, self.dim, self.dim),
            projection("keys and values", batch * tokens, self.dim, 2 * self.dim),
            attend("attention", batch * queries, tokens, self.dim, batch * tokens),
            projection("output", batch * queries, self.dim, self.dim),
        ]


@register("glca", kind="cross")
class GlobalLocalCrossAttention(_SharedProjection):
    """Global-local cross attention: the tokens that earlier layers attended to most read all tokens (Zhu et al. 2022).

    Args:
        dim: channels C.
        num_heads: heads.
        ratio: share of the tokens that is selected; the paper takes 0.1 for fine-grained classes and 0.3 for
            re-identification.
        keep_class: whether the class token's query is kept in front of those selected.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the ratio is not more than 0 and at most 1.
    """

    about = About("Zhu et al., CVPR 2022, 2205.02151", "O(M N)", "sdpa")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: float = 0.1,
        keep_class: bool = False,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, proj_drop)
        if not 0 < ratio <= 1:
            raise InputError(f"attention 'glca': ratio={ratio} must be more than 0 and at most 1.")
        self.ratio = ratio
        self.keep_class = keep_class

    def read(
        self,
        q: Tensor,
        kv: Tensor,
        mask: Tensor | None,
        want_weights: bool,
        attentions: Tensor | Sequence[Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the queries read.

        With the ``attentions`` of the layers before (see :func:`rollout`) ``q`` and ``kv`` are the same tokens, the
        class token first, and there is one output for each query that is selected, in the order of
        :meth:`select`: (B, R, C), 0 where an item has fewer. Without them there is one for each query.
        """
        if attentions is None:
            return self._attend(q, kv, key_mask(mask), want_weights)
        if q.shape != kv.shape or any(layer.shape[-1] != q.shape[1] for layer in attentions):
            raise InputError(
                f"attention 'glca': with attentions the queries are the tokens themselves and the maps are of these; "
                f"got queries {tuple(q.shape)}, tokens {tuple(kv.shape)} and maps "
                f"{[tuple(layer.shape) for layer in attentions]}."
            )
        index, chosen = self.select(attentions, mask)
        picked = q.gather(1, index[..., None].expand(-1, -1, self.dim))
        out, weights = self._attend(picked, kv, key_mask(mask), want_weights)
        return out.masked_fill(~chosen[..., None], 0), weights

    def select(self, attentions: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions (B, R) of the queries that are kept, and which of them count; see :func:`most_seen`."""
        index, chosen = most_seen(rollout(attentions, mask), self.ratio, mask)
        return (F.pad(index, (1, 0)), F.pad(chosen, (1, 0), value=True)) if self.keep_class else (index, chosen)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        return self._parts(batch, queries, tokens)


@register("pwca", kind="cross")
class PairwiseCrossAttention(_SharedProjection):
    """Pair-wise cross attention: an image reads itself and another under one softmax (Zhu et al. 2022).

    The paper trains every block with it, which makes the task harder: its layers are those of self-attention (see
    :meth:`sharing`), the other image is drawn at random and the label is that of the first. Nothing of it remains at
    inference.

    The weights are (B, heads, M, M + N), on the own tokens first.

    Args:
        dim: channels C.
        num_heads: heads.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.
    """

    about = About("Zhu et al., CVPR 2022, 2205.02151", "O(M (M + N))", "sdpa")

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: Probability = 0.0) -> None:
        super().__init__(dim, num_heads, qkv_bias, proj_drop)

    @classmethod
    def sharing(cls, mixer: SoftmaxAttention) -> PairwiseCrossAttention:
        """Pair-wise attention with the very layers of a self-attention, which both then train."""
        pair = cls(mixer.dim, mixer.num_heads, mixer.qkv.bias is not None)
        pair.qkv, pair.proj, pair.proj_drop = mixer.qkv, mixer.proj, mixer.proj_drop
        return pair

    def read(
        self,
        q: Tensor,
        kv: Tensor,
        mask: Tensor | None,
        want_weights: bool,
        q_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the tokens ``q`` of one image read from themselves and from ``kv``.

        ``q_mask`` (B, M) bool is true for the real ones of ``q``; outputs of the others are 0.
        """
        if q_mask is not None:
            q = q.masked_fill(~q_mask[..., None], 0)
        visible = None
        if mask is not None or q_mask is not None:
            visible = torch.cat(
                [
                    torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if real is None else real
                    for t, real in ((q, q_mask), (kv, mask))
                ],
                1,
            )
        out, weights = self._attend(q, torch.cat([q, kv], 1), key_mask(visible), want_weights)
        return out if q_mask is None else out.masked_fill(~q_mask[..., None], 0), weights

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        return self._parts(batch, queries, queries + tokens)


class UncertaintyWeights(nn.Module):
    """The losses of several branches in one, each weighted by a learned uncertainty.

    ``(sum_i exp(-w_i) L_i + w_i) / 2`` with a learned ``w_i`` for each branch: self-attention, global-local and
    pair-wise attention in the paper.

    Args:
        count: number of losses.
    """

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        if count < 1:
            raise InputError(f"count={count} losses cannot be weighted; it must be at least 1.")
        self.w = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        """The weighted sum of ``count`` scalar losses."""
        if len(losses) != len(self.w):
            raise InputError(f"{len(self.w)} losses are weighted here; got {len(losses)}.")
        return ((-self.w).exp() * torch.stack(list(losses)) + self.w).sum() / 2


_ROUNDING = 1e-6  # 0.3 of 10 tokens are 3, whatever the product of the floats


def _share(count: int, ratio: float) -> int:
    return max(1, math.floor(count * ratio + _ROUNDING))
