"""Softmax attention of every token to every token.

Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762; as a token mixer of images:
Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, whose parameter names in timm (``qkv``, ``proj``) these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, projection
from attention.layout import heads_first, heads_last, split_qkv, weights_of
from attention.masking import key_mask
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.varlen_attention import varlen_attention


@register("softmax", kind="mixer")
class SoftmaxAttention(Mixer):
    """Softmax attention over all tokens, by PyTorch's fused operator (Vaswani et al. 2017).

    Args:
        dim: channels C.
        num_heads: heads.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.
    """

    about = About("Vaswani et al., NeurIPS 2017, 1706.03762", "O(N^2)", "sdpa", "-")
    grids = (1, 2, 3)

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: Probability = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        return self.proj_drop(self.proj(heads_last(self._core(q, k, v, mask), x.shape[1:-1])))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)

        def core(values: Tensor) -> Tensor:
            return self._core(q, k, values, mask).transpose(1, 2).unflatten(1, x.shape[1:-1])

        return weights_of(core, v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, N, E)."""
        q, k, v = heads_first(q), heads_first(k), heads_first(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask(mask))

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        out, _ = varlen_attention(q, k, v, cu_seqlens, cu_seqlens)
        return self.proj_drop(self.proj(out.flatten(1)))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        total = batch * tokens
        return [
            projection("q, k, v", total, self.dim, 3 * self.dim),
            attend("attention", total, tokens, self.dim, total),
            projection("output", total, self.dim, self.dim),
        ]
