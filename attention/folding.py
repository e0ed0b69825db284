"""Reading tokens without projecting them, where there are few queries.

A score is ``q . (Wk x + bk) = (Wk^T q) . x + q . bk``, and a weighted mean of ``Wv x + bv`` is ``Wv`` of the mean of
``x``, plus ``bv``. With M queries of h heads the tokens, C wide, are then read twice instead of being projected to keys
and values of E channels in all: ``M h C`` multiply-adds a token instead of ``(C + M) E``. The same holds the other way
round: where many tokens ask few, the projection of the queries moves to the keys, and that of the output to the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention.cost import Part, elementwise
from attention.layout import split_heads
from attention.masking import key_mask


class Folded(NamedTuple):
    """The projections that are moved: (E, C) weights and (E,) biases, heads one after the other."""

    key: nn.Linear
    value: nn.Linear
    num_heads: int


def folds(few: int, num_heads: int, dim: int, inner: int) -> bool:
    """Whether it takes fewer operations to move the projections, of ``few`` queries and many tokens or the reverse."""
    return few * num_heads * dim <= (dim + few) * inner


def read_folded(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Folded,
    mask: Tensor | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to tokens that are projected in thought only.

    Args:
        q: (B, M, E) projected queries, not scaled.
        keys: (B, N, C) what the key projection would be applied to.
        values: (B, N, C) what the value projection would be applied to.
        layers: the projections.
        mask: (B, N) bool, true for real tokens.
        own: (B, M, C), one token more for each query, which it alone sees, in front of the others.

    Returns:
        out: (B, M, E) heads side by side, before any output projection.
        weights: (B, heads, M, N), with ``own`` (B, heads, M, 1 + N), float32 or wider.
    """
    to_key, to_value = (layer.weight.unflatten(0, (layers.num_heads, -1)) for layer in (layers.key, layers.value))
    heads = split_heads(q, layers.num_heads)
    heads = heads * heads.shape[-1] ** -0.5
    folded = torch.einsum("bmhd,hdc->bmhc", heads, to_key)
    precise = torch.promote_types(keys.dtype, torch.float32)
    scores = (folded.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, folded.shape[1:3]).to(precise)
    visible = key_mask(mask)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if own is not None:
        scores = torch.cat([(folded * own[:, :, None]).sum(-1, keepdim=True).to(precise), scores], -1)
    if layers.key.bias is not None:  # the same for all keys: without effect, but the bias stays part of the graph
        scores = scores + torch.einsum("bmhd,hd->bmh", heads, split_heads(layers.key.bias, layers.num_heads))[..., None]
    weights = scores.softmax(-1)
    on_tokens = weights if own is None else weights[..., 1:]
    mean = (on_tokens.to(values.dtype).flatten(1, 2) @ values).unflatten(1, folded.shape[1:3])
    if own is not None:
        mean = mean + weights[..., :1].to(values.dtype) * own[:, :, None]
    out = torch.einsum("bmhc,hdc->bmhd", mean, to_value).flatten(2)
    if layers.value.bias is not None:
        out = out + layers.value.bias
    return out, weights.transpose(1, 2)


def folded_cost(
    batch: int, queries: int, tokens: int, num_heads: int, dim: int, inner: int, reads: int = 1
) -> list[Part]:
    """What :func:`read_folded` costs; ``reads`` is 2 where keys and values are different tensors."""
    asked, rows = batch * queries, batch * queries * num_heads
    return [
        Part("queries in the tokens' space", 2 * asked * inner * dim, asked * inner + rows * dim + inner * dim),
        Part("scores and means", 4 * rows * tokens * dim, (reads * batch * tokens + 2 * rows) * dim),
        elementwise("softmax", rows * tokens, tensors=0, flops=5),
        Part("values of the means", 2 * asked * inner * dim, asked * inner + rows * dim + inner * dim),
    ]


def ask_folded(
    asking: Tensor,
    keys: Tensor,
    values: Tensor,
    query: nn.Linear,
    output: nn.Linear,
    num_heads: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of many tokens to few, which are neither projected to queries nor from what they read.

    Args:
        asking: (B, M, C) what the query projection would be applied to.
        keys, values: (B, N, E) projected, heads side by side.
        query, output: the projections that are moved: (E, C) and (C, E) weights.
        mask: (B, N) bool, true for real tokens.

    Returns:
        out: (B, M, C), after the output projection.
        weights: (B, heads, M, N), float32 or wider.
    """
    heads = split_heads(keys, num_heads)
    heads = heads * heads.shape[-1] ** -0.5
    to_query = query.weight.unflatten(0, (num_heads, -1))
    folded = torch.einsum("bnhd,hdc->bhnc", heads, to_query)
    precise = torch.promote_types(asking.dtype, torch.float32)
    # Keys in rows: the softmax over few of them then runs along the many tokens.
    scores = (folded.flatten(1, 2) @ asking.mT).unflatten(1, folded.shape[1:3]).to(precise)
    if query.bias is not None:
        scores = scores + torch.einsum("bnhd,hd->bhn", heads, split_heads(query.bias, num_heads))[..., None]
    visible = key_mask(mask)
    if visible is not None:
        scores = scores.masked_fill(~visible.mT, -torch.inf)
    weights = scores.softmax(2)
    put = torch.einsum("bnhd,chd->bhnc", split_heads(values, num_heads), output.weight.unflatten(1, (num_heads, -1)))
    out = weights.to(put.dtype).flatten(1, 2).mT @ put.flatten(1, 2)
    if output.bias is not None:
        out = out + output.bias
    return out, weights.mT


def asking_cost(batch: int, queries: int, tokens: int, num_heads: int, dim: int, inner: int) -> list[Part]:
    """What :func:`ask_folded` costs, without the projections to keys and values."""
    few, rows = batch * tokens, batch * tokens * num_heads
    return [
        Part("keys in the queries' space", 2 * few * inner * dim, few * inner + rows * dim + inner * dim),
        Part("values in the output's space", 2 * few * inner * dim, few * inner + rows * dim + inner * dim),
        Part("scores and means", 4 * rows * queries * dim, 2 * (batch * queries + rows) * dim),
        elementwise("softmax", rows * queries, tensors=0, flops=5),
    ]
