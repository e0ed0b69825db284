"""Softmax cross attention, with projections for queries, keys, values and output.

Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762, section 3.2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, projection
from attention.cross import Cross
from attention.layout import heads_first, split_heads, weights_of
from attention.masking import key_mask
from attention.parameters import Probability
from attention.registry import register


@register("cross", kind="cross")
class SoftmaxCross(Cross):
    """Cross attention: queries read from other tokens by softmax attention (Vaswani et al. 2017).

    Args:
        dim: channels C.
        num_heads: heads.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        proj_drop: dropout on the output while training.
    """

    about = About("Vaswani et al., NeurIPS 2017, 1706.03762", "O(M N)", "sdpa", "-")

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: Probability = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def read(
        self, q: Tensor, kv: Tensor, mask: Tensor | None, want_weights: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        queries = heads_first(split_heads(self.q(q), self.num_heads))
        k, v = split_heads(self.kv(kv), 2 * self.num_heads).chunk(2, dim=-2)

        def core(values: Tensor) -> Tensor:
            keys = heads_first(k)
            out = F.scaled_dot_product_attention(queries, keys, heads_first(values), attn_mask=key_mask(mask))
            return out.transpose(1, 2)

        out = self.proj_drop(self.proj(core(v).flatten(2)))
        return out, weights_of(core, v) if want_weights else None

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        return [
            projection("queries", batch * queries, self.dim, self.dim),
            projection("keys and values", batch * tokens, self.dim, 2 * self.dim),
            attend("attention", batch * queries, tokens, self.dim, batch * tokens),
            projection("output", batch * queries, self.dim, self.dim),
        ]
