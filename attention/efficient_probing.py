"""Efficient probing: learned queries compare themselves with the raw tokens of a frozen encoder, and read a mean each.

Source: Psomas et al., Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency, ICLR 2026, arXiv
2506.10178. Each query's mean gives one block of the bag's feature, by the rows of one value projection; batch
normalisation without parameters and a linear classifier follow. There is no key projection, and the value projection is
applied to the means, not to the tokens: the same numbers, for two inner products a token and query.

The kind ``cross``, of which the paper does not speak, lets given queries read in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.abmil import BagNorm
from attention.about import About
from attention.cost import Part, attend, elementwise, projection
from attention.cross import Cross
from attention.folding import folds
from attention.layout import heads_first, split_heads, weights_of
from attention.masking import key_mask
from attention.parameters import Positive
from attention.pooling import PooledBags, Pooler, check_features
from attention.registry import register
from kernels.dense import linear
from kernels.errors import InputError, unknown_name
from kernels.operators import autocasting
from kernels.segment import segment_lengths, segment_softmax, segment_weighted_sum


@register("efficient_probing", kind="pooling")
class EfficientProbing(Pooler):
    """Efficient probing: learned queries read raw features, each for a block of the bag feature (Psomas et al. 2026).

    ``attention`` has a row for each query.

    Args:
        dim: feature size C.
        num_classes: number of logits.
        num_queries: queries M, a divisor of the size of the bag's feature.
        d_out: how many times smaller than C the bag's feature is.
        qkv_bias: whether the value projection has a bias.
        norm: ``"batch"`` normalises bag features over a batch of several bags, whose results then depend on each other
            while training; None leaves them.

    Raises:
        InputError: sizes do not divide, or the norm is not known.
    """

    about = About("Psomas et al., ICLR 2026, 2506.10178", "O(N)", "", "Apache-2.0")

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        num_queries: Positive = 32,
        d_out: Positive = 1,
        qkv_bias: bool = False,
        norm: Literal["batch"] | None = "batch",
    ) -> None:
        super().__init__()
        if norm not in ("batch", None):
            raise unknown_name("attention.norm", norm, ("batch", "null"))
        if d_out < 1 or dim % d_out:
            raise InputError(f"attention 'efficient_probing': d_out={d_out} does not divide the feature size {dim}.")
        width = dim // d_out
        if num_queries < 1 or width % num_queries:
            fitting = [count for count in range(1, width + 1) if width % count == 0]
            raise InputError(
                f"attention 'efficient_probing': num_queries={num_queries} does not divide the bag's feature of size "
                f"{width}; take one of {', '.join(map(str, fitting))}."
            )
        self.dim = dim
        self.num_branches = num_queries
        self.cls_token = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, width, bias=qkv_bias)
        self.norm = BagNorm(width, eps=1e-6, affine=False) if norm else nn.Identity()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        check_features(features, self.dim, self.name)
        if not autocasting(features):
            features = features.to(self.v.weight.dtype)
        scores = linear(features, self.cls_token[0] * self.dim**-0.5).t()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = segment_softmax(scores, cu_seqlens)
        means = segment_weighted_sum(weights, features, cu_seqlens)  # (B, M, C)
        blocks = self.v.weight.unflatten(0, (self.num_branches, -1))
        pooled = torch.einsum("bmc,mdc->bmd", means, blocks).flatten(1)
        if self.v.bias is not None:  # an empty bag has nothing to project: its weights add up to zero, not one
            pooled = pooled + self.v.bias * (segment_lengths(cu_seqlens) > 0)[:, None]
        embeddings = self.norm(pooled)
        return PooledBags(self.classifier(embeddings), embeddings, scores, {"weights": weights})

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        queries, width = self.num_branches, self.v.out_features
        means = bags * queries * self.dim
        return [
            projection("scores", instances, self.dim, queries),
            Part("means", 2 * instances * queries * self.dim, instances * (self.dim + queries) + means),
            Part("values of the means", 2 * bags * self.dim * width, means + (bags + self.dim) * width),
            projection("classifier", bags, width, self.classifier.out_features),
        ]


@register("efficient_probing", kind="cross")
class EfficientProbingCross(Cross):
    """Efficient probing as cross attention: given queries read raw tokens, values projected last (Psomas et al. 2026).

    Args:
        dim: channels C.
        num_heads: heads, each of which compares its own channels; 1 in the paper.
        qkv_bias: whether the value projection has a bias.
    """

    about = About("Psomas et al., ICLR 2026, 2506.10178", "O(M N)", "sdpa", "Apache-2.0")

    def __init__(self, dim: Positive, num_heads: Positive = 1, qkv_bias: bool = False) -> None:
        super().__init__(dim, num_heads)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)

    def read(
        self, q: Tensor, kv: Tensor, mask: Tensor | None, want_weights: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        queries, keys = (heads_first(split_heads(x, self.num_heads)) for x in (q, kv))
        visible = key_mask(mask)
        if folds(q.shape[1], self.num_heads, self.dim, self.dim):
            return self._read_means(queries, keys, kv, visible, want_weights)

        def core(values: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(queries, keys, heads_first(values), attn_mask=visible)
            return out.transpose(1, 2)

        values = split_heads(self.v(kv), self.num_heads)
        return core(values).flatten(2), weights_of(core, values) if want_weights else None

    def _read_means(
        self, queries: Tensor, keys: Tensor, kv: Tensor, visible: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The means of unprojected tokens, which all heads share: fused attention would copy them for each head."""
        scores = (queries * self.head_dim**-0.5) @ keys.transpose(-2, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1)
        means = (weights.to(kv.dtype).flatten(1, 2) @ kv).unflatten(1, weights.shape[1:3])  # (B, heads, M, C)
        out = torch.einsum("bhmc,hdc->bmhd", means, self.v.weight.unflatten(0, (self.num_heads, -1))).flatten(2)
        if self.v.bias is not None:
            out = out + self.v.bias
        return out, weights.to(kv.dtype) if want_weights else None

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        asked = batch * queries
        if not folds(queries, self.num_heads, self.dim, self.dim):
            return [
                projection("values", batch * tokens, self.dim, self.dim),
                attend("attention", asked, tokens, self.dim, batch * tokens),
            ]
        rows = asked * self.num_heads
        return [
            Part(
                "scores and means",
                2 * (asked + rows) * tokens * self.dim,
                (batch * tokens + asked + rows) * self.dim,
            ),
            elementwise("softmax", rows * tokens, tensors=0, flops=5),
            Part("values of the means", 2 * asked * self.dim**2, (rows + asked + self.dim) * self.dim),
        ]
