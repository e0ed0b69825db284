"""Windowed products in PyTorch on any device; tensors are heads-first views with any strides.

On a CPU they go through :mod:`kernels.dynamic_conv.sparse` where PyTorch has fast sparse products, and through
:mod:`kernels.dynamic_conv.band` elsewhere. Beside the weights themselves, work takes a few MB whatever the size: heads
are taken a few at a time. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from kernels.dynamic_conv import band, sparse
from kernels.dynamic_conv.taps import Taps


def weighted_sum(attn: Tensor, value: Tensor, scale: float, taps: Taps) -> Tensor:
    """(B, H, *grid, P) and (B, H, *grid, D) to (B, H, *grid, D) contiguous, times ``scale``."""
    out = value.new_empty(value.shape)
    weights, rows, filled = _per_head(attn), _per_head(taps.enlarge(value)), _per_head(out)
    method = _method(value, taps)
    for heads in _chunks(len(filled), method, taps):
        made = method.weighted_sum(_precise(weights[heads]), _precise(rows[heads]), taps)
        filled[heads] = made if scale == 1 else made.mul_(scale)
    return out


def transposed_sum(attn: Tensor, rows: Tensor, scale: float, taps: Taps) -> Tensor:
    """The same with the matrix of weights transposed: every token is given the rows of the windows that hold it."""
    out = rows.new_empty(rows.shape)
    weights, source, filled = _per_head(attn), _per_head(rows), _per_head(out)
    method = _method(rows, taps)
    for heads in _chunks(len(filled), method, taps):
        made = method.transposed_sum(_precise(weights[heads]), _precise(source[heads]), taps)
        filled[heads] = taps.crop(made if scale == 1 else made.mul_(scale)).flatten(1, -2)
    return out


def products(q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, taps: Taps) -> Tensor:
    """(B, H, *grid, D) twice to (B, H, *grid, P) contiguous."""
    out = q.new_empty(*q.shape[:-1], taps.size)
    queries, keys, filled = _per_head(q), _per_head(taps.enlarge(k)), _per_head(out)
    bias = None if rpb is None else _precise(rpb).flatten(1)[:, taps.relative().to(q.device)]
    method = _method(q, taps)
    for heads in _chunks(len(filled), method, taps):
        made = method.products(_precise(queries[heads]), _precise(keys[heads]), scale, taps)
        if bias is not None:
            made += bias[torch.arange(heads.start, heads.stop, device=q.device) % q.shape[1]]
        filled[heads] = made
    return out


def table_gradient(d_logits: Tensor, taps: Taps) -> Tensor:
    """(B, H, *grid, P) to (H, *table): what each relative position is given, axis by axis as a matrix product."""
    summed = _precise(d_logits).sum(0).unflatten(-1, taps.kernel)  # (H, *grid, *kernel)
    for done, axis in enumerate(reversed(range(len(taps.grid)))):
        # An axis' positions and taps become its part of the table, which is put in front of the parts before it.
        summed = summed.movedim(done + 1 + axis, -2).flatten(-2) @ _one_hot(taps, axis).to(summed)
        summed = summed.movedim(-1, 0)
    return summed.movedim(-1, 0).contiguous()


def _one_hot(taps: Taps, axis: int) -> Tensor:
    """(L K, 2 K - 1): 1 where a tap of a token has a relative position."""
    entries = taps.axis_relative(axis).flatten()
    return torch.nn.functional.one_hot(entries, 2 * taps.kernel[axis] - 1)


def _method(rows: Tensor, taps: Taps) -> ModuleType:
    """Sparse products, where there are any, unless windows cover much of the grid and rows are not narrow.

    Dense products do the work of the whole band at several times the rate. Measured on x86 with AVX-512: 13 x 13 on
    14 x 14 breaks even at rows of 12, 17 x 17 on 28 x 28 at 24, 13 x 13 on 28 x 28 at 32; windows of less than a fifth
    of the grid never do, nor do windows on a grid enlarged by zeros.
    """
    if rows.device.type != "cpu" or not sparse.available() or taps.tokens * taps.size >= sparse.MOST_TAPS:
        return band
    covers = 5 * taps.size >= taps.tokens and rows.shape[-1] * taps.size >= 8 * taps.tokens
    return band if covers and not taps.zero else sparse


def _chunks(heads: int, method: ModuleType, taps: Taps) -> Iterator[slice]:
    if taps.tokens == 0:
        return
    step = method.heads_at_once(taps)
    for first in range(0, heads, step):
        yield slice(first, min(first + step, heads))


def _per_head(tensor: Tensor) -> Tensor:
    """(B, H, ..., D) as (B H, N, D); a view where the strides allow."""
    return tensor.flatten(2, -2).flatten(0, 1)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
