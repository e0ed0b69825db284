"""Deformable sampling on any device, as one embedding bag: the rows of four pixels a sample, weighed and summed.

An embedding bag sums rows of a table as it reads them, so that nothing is written per sample and channel. The gradient
of the values turns the bags round: samples are sorted by cell, and each cell's bag sums rows of the incoming gradient.
Queries are handled in chunks, so that the samples' indices, and the rows that weights and locations need again for
their gradients, stay in the cache of a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.ms_deform_attn.sampling import (
    Levels,
    Placed,
    bilinear_gradients,
    corner_rows,
    levels,
    place,
    sort_by_cell,
)

# Samples whose indices and weights are built at a time, and elements of rows gathered at a time.
_CHUNK = {"cpu": 1 << 16}
_GATHERED = {"cpu": 1 << 18}
_LARGEST_CHUNK, _LARGEST_GATHERED = 1 << 24, 1 << 28

_bag = torch.ops.aten._embedding_bag_forward_only
_SUM = 0


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int]) -> Tensor:
    """Output (B, Q, H, D), contiguous."""
    about = _levels(value, locations, shapes, starts)
    table = _table(value)
    out = value.new_zeros(*locations.shape[:3], value.shape[3])
    locations, weights = locations.flatten(2, 4), weights.flatten(2)
    for item, queries in _chunks(weights):
        _, _, rows, scales = _corners(value, locations[item, queries], weights[item, queries], item, about, table)
        bags = rows.flatten().view(len(rows) * value.shape[2], -1)
        offsets = torch.arange(len(bags), dtype=bags.dtype, device=bags.device) * bags.shape[1]
        sums = _bag(table, bags.flatten(), offsets, False, _SUM, False, scales.flatten())[0]
        out[item, queries] = sums.view(-1, *out.shape[2:])
    return out


def backward(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    about = _levels(value, locations, shapes, starts)
    table = _table(value)
    grads = grad_out.to(table.dtype)
    d_locations, d_weights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    flat_locations, flat_weights = locations.flatten(2, 4), weights.flatten(2)
    x, y = (torch.empty(flat_weights.shape, dtype=torch.int32, device=value.device) for _ in range(2))
    scales = table.new_empty(*flat_weights.shape, 4)
    for item, queries in _chunks(flat_weights):
        at, factors, rows, of_pixels = _corners(
            value, flat_locations[item, queries], flat_weights[item, queries], item, about, table
        )
        x[item, queries], y[item, queries], scales[item, queries] = at.x, at.y, of_pixels
        along = _inner_products(table, rows, grads[item, queries])
        d_at, d_factors = bilinear_gradients(along, factors, at, about)
        d_locations.view(flat_locations.shape)[item, queries] = d_at
        d_weights.view(flat_weights.shape)[item, queries] = d_factors
    return _value_gradient(grads, x, y, scales, value, shapes, starts, about), d_locations, d_weights


def _value_gradient(
    grads: Tensor,
    x: Tensor,
    y: Tensor,
    scales: Tensor,
    value: Tensor,
    shapes: list[int],
    starts: list[int],
    about: Levels,
) -> Tensor:
    """Gradient of the values, summed in a fixed order.

    Args:
        grads: (B, Q, H, D) of the output.
        x, y: (B, Q, J) first pixels.
        scales: (B, Q, J, 4) weights of each sample's pixels.
    """
    batch, _, heads, width = value.shape
    out = torch.zeros(value.shape, dtype=grads.dtype, device=value.device)
    if x.numel() == 0:
        return out.to(value.dtype)
    order, begins = sort_by_cell(x, y, about, heads)
    by_cell = scales.view(-1, 4).index_select(0, order).t().contiguous()
    rows = order.div_(x.shape[2] // heads, rounding_mode="floor")
    for corner in range(4):
        # The last bag, of the samples outside, is left out.
        sums = _bag(grads.view(-1, width), rows, begins, False, _SUM, False, by_cell[corner])[0][:-1]
        sums = sums.view(batch, about.cells, heads, width)
        cell = 0
        for height, columns, start in zip(shapes[::2], shapes[1::2], starts, strict=True):
            size = (height + 1) * (columns + 1)
            grid = sums[:, cell : cell + size].unflatten(1, (height + 1, columns + 1))
            # The first pixel of a cell has its number, less the half cells outside; the others come later.
            down, across = 1 - corner // 2, 1 - corner % 2
            part = grid[:, down : down + height, across : across + columns]
            out[:, start : start + height * columns].unflatten(1, (height, columns)).add_(part)
            cell += size
    return out.to(value.dtype)


def _levels(value: Tensor, locations: Tensor, shapes: list[int], starts: list[int]) -> Levels:
    dtype = torch.promote_types(value.dtype, torch.float32)
    return levels(tuple(shapes), tuple(starts), value.shape[2], locations.shape[4], value.device, dtype)


def _table(value: Tensor) -> Tensor:
    """Rows (B S H + 1, D) of every pixel and head, and one of zeros for what is outside."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    table = torch.empty(value.shape[:3].numel() + 1, value.shape[3], dtype=dtype, device=value.device)
    table[:-1].view(value.shape).copy_(value)
    table[-1] = 0
    return table


def _chunks(weights: Tensor) -> Iterator[tuple[int, slice]]:
    """Some queries of one item of (B, Q, J) at a time; none where there are no samples."""
    if weights.numel() == 0:
        return
    batch, queries, each = weights.shape
    step = max(1, _CHUNK.get(weights.device.type, _LARGEST_CHUNK) // each)
    for item in range(batch):
        for start in range(0, queries, step):
            yield item, slice(start, min(start + step, queries))


def _corners(
    value: Tensor, locations: Tensor, weights: Tensor, item: int, about: Levels, table: Tensor
) -> tuple[Placed, Tensor, Tensor, Tensor]:
    """Places and weights (q, J) of a chunk's samples, rows and weights (q, J, 4) of their pixels."""
    positions, heads = value.shape[1:3]
    factors = weights.to(table.dtype)
    at = place(locations.to(table.dtype), about)
    return at, factors, *corner_rows(at, factors, about, heads, item * positions * heads, len(table) - 1)


def _inner_products(table: Tensor, rows: Tensor, grads: Tensor) -> Tensor:
    """Inner product (q, J, 4) of the table's rows with the gradient (q, H, D) of their query and head."""
    bags = rows.view(grads.shape[:2].numel(), -1)
    owners = grads.reshape(len(bags), 1, -1)
    out = table.new_empty(bags.shape)
    step = max(1, _GATHERED.get(table.device.type, _LARGEST_GATHERED) // max(1, bags.shape[1] * table.shape[1]))
    memory = table.new_empty(min(step, len(bags)) * bags.shape[1], table.shape[1])
    for start in range(0, len(bags), step):
        some = bags[start : start + step]
        gathered = torch.index_select(table, 0, some.flatten(), out=memory[: some.numel()]).view(*some.shape, -1)
        torch.sum(gathered.mul_(owners[start : start + step]), -1, out=out[start : start + step])
    return out.view(rows.shape)
