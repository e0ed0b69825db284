"""Deformable sampling on any device, as bags of rows: a query's sum is a weighted bag of the tokens around its points.

``embedding_bag`` reads the rows where they lie and holds no sample. Its gradient by the rows is a bag as well, of the
queries that have read a token, once the reads are sorted by token: no atomics, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ms_deform_attn.corners import Corners, corners

READS_AT_ONCE = 1 << 22  # of one chunk of queries: about 100 MB of places, shares and derivatives

_bag = torch.ops.aten._embedding_bag
_bag_of_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward
_SUM = 0


def forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """(B, Q, H * D) contiguous."""
    batch, queries, heads = weights.shape[:3]
    precise = torch.promote_types(value.dtype, torch.float32)
    out = value.new_zeros(batch, queries, heads, value.shape[3])
    for b, some in _chunks(weights):
        rows, reads, shares, *_ = _reads(locations[b, some], weights[b, some], sizes, heads, precise)
        sums = F.embedding_bag(reads, _rows(value[b], precise), per_sample_weights=shares, mode="sum")
        out[b, some] = sums.view(rows, heads, -1)
    return out.flatten(2)


def backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, contiguous."""
    heads = weights.shape[2]
    precise = torch.promote_types(value.dtype, torch.float32)
    d_value = value.new_zeros(value.shape, dtype=precise)
    d_locations, d_weights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    for b, some in _chunks(weights):
        rows, reads, shares, around = _reads(locations[b, some], weights[b, some], sizes, heads, precise)
        d_out = grad[b, some].reshape(rows * heads, -1).to(precise)
        d_value[b] += _transposed(reads, shares, d_out, value.shape[1] * heads).view_as(d_value[b])
        starts = torch.arange(0, reads.numel() + 1, reads.shape[1], dtype=reads.dtype, device=reads.device)[:-1]
        owner = torch.arange(len(reads), dtype=reads.dtype, device=reads.device).repeat_interleave(reads.shape[1])
        d_shares = _bag_of_weights(d_out, _rows(value[b], precise), reads.flatten(), starts, owner, _SUM)
        d_shares = d_shares.view_as(around.share)
        scaled = d_shares * weights[b, some].to(precise)[..., None]
        d_weights[b, some] = (d_shares * around.share).sum(-1).to(weights.dtype)
        d_locations[b, some, ..., 0] = (scaled * around.along_x).sum(-1).to(locations.dtype)
        d_locations[b, some, ..., 1] = (scaled * around.along_y).sum(-1).to(locations.dtype)
    return d_value.to(value.dtype), d_locations, d_weights


def value_gradient(grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """The gradient of value alone, in a fixed order of summation, contiguous."""
    heads = weights.shape[2]
    precise = torch.promote_types(value.dtype, torch.float32)
    d_value = value.new_zeros(value.shape, dtype=precise)
    for b, some in _chunks(weights):
        rows, reads, shares, _ = _reads(locations[b, some], weights[b, some], sizes, heads, precise)
        d_out = grad[b, some].reshape(rows * heads, -1).to(precise)
        d_value[b] += _transposed(reads, shares, d_out, value.shape[1] * heads).view_as(d_value[b])
    return d_value.to(value.dtype)


def _chunks(weights: Tensor) -> Iterator[tuple[int, slice]]:
    """An image and some of its queries at a time."""
    batch, queries, heads, levels, points = weights.shape
    step = max(READS_AT_ONCE // max(heads * levels * points * 4, 1), 1)
    if weights.numel():
        for b in range(batch):
            for first in range(0, queries, step):
                yield b, slice(first, min(first + step, queries))


def _rows(value: Tensor, precise: torch.dtype) -> Tensor:
    """(S, H, D) as the rows (S * H, D) of a table."""
    return value.reshape(-1, value.shape[2]).to(precise)


def _reads(
    locations: Tensor, weights: Tensor, sizes: list[int], heads: int, precise: torch.dtype
) -> tuple[int, Tensor, Tensor, Corners]:
    """Number of queries; rows read by each query and head (Q * H, L * P * 4) and their weights; the corners."""
    around = corners(locations.to(precise), sizes)
    head = torch.arange(heads, dtype=torch.int32, device=locations.device)[:, None, None, None]
    reads = around.token * heads + head
    shares = around.share * weights.to(precise)[..., None]
    return len(weights), reads.flatten(2).flatten(0, 1), shares.flatten(2).flatten(0, 1), around


def _transposed(reads: Tensor, shares: Tensor, grad: Tensor, rows: int) -> Tensor:
    """(rows, D): for every row of the table, the sum of the gradients of those that read it times their shares."""
    token, order = reads.flatten().sort(stable=True)
    counts = token.bincount(minlength=rows)
    starts = (counts.cumsum(0) - counts).to(torch.int32)
    readers = torch.div(order, reads.shape[1], rounding_mode="floor").to(torch.int32)
    return _bag(grad, readers, starts, False, _SUM, False, shares.flatten()[order])[0]
