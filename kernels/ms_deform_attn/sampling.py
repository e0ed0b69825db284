"""Where samples fall: the four pixels of each with their weights, and samples sorted by the cell between the pixels.

A sample at x = W_l * location - 1/2 lies between pixels floor(x) and floor(x) + 1; along each axis of n pixels there
are n + 1 such cells, counting the two half outside. Samples are numbered as ``sampling_locations`` has them,
(B, Q, H, L, P); here heads, levels and points are one axis, J = H L P.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tables import made_once


class Levels(NamedTuple):
    """The pyramid as tables (J,), one entry for each sample of a query.

    Attributes:
        rows, columns: size of the sample's level, int32.
        pixel: row of the level's first pixel in a table of values (S H, D) of one batch item.
        cell: number of the level's first cell times H plus the head.
        height, width: size of the level, floating.
        cells: of all levels.
    """

    rows: Tensor
    columns: Tensor
    pixel: Tensor
    cell: Tensor
    height: Tensor
    width: Tensor
    cells: int


class Placed(NamedTuple):
    """First pixel of each sample, -1 to n - 1 where it touches the map and -2 or n outside; how far it lies past it."""

    x: Tensor
    y: Tensor
    right: Tensor
    below: Tensor


@made_once(64)
def levels(
    shapes: tuple[int, ...],
    starts: tuple[int, ...],
    heads: int,
    points: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Levels:
    """Tables of ``shapes`` (H_0, W_0, H_1, ...), kept: copying them to a GPU waits."""
    rows, columns = shapes[::2], shapes[1::2]
    cells = [0]
    for height, width in zip(rows, columns, strict=True):
        cells.append(cells[-1] + (height + 1) * (width + 1))
    table = torch.tensor([rows, columns, starts, cells[:-1]], dtype=torch.int64)
    of_rows, of_columns, pixel, cell = table[:, None, :, None].expand(-1, heads, -1, points).flatten(1)
    head = torch.arange(heads).repeat_interleave(len(rows) * points)
    return Levels(
        rows=of_rows.int().to(device),
        columns=of_columns.int().to(device),
        pixel=(pixel * heads + head).to(device),
        cell=(cell * heads + head).to(device),
        height=of_rows.to(device, dtype),
        width=of_columns.to(device, dtype),
        cells=cells[-1],
    )


def place(locations: Tensor, about: Levels) -> Placed:
    """Pixels of samples at ``locations`` (..., J, 2)."""
    parts = []
    for axis, size in enumerate((about.width, about.height)):
        at = torch.mul(locations[..., axis], size).sub_(0.5).clamp_min_(-2)
        torch.minimum(at, size, out=at)
        first = at.floor()
        parts.append((first.to(torch.int32), at.sub_(first)))
    (x, right), (y, below) = parts
    return Placed(x, y, right, below)


def corner_rows(
    at: Placed, weights: Tensor, about: Levels, heads: int, first: int, outside: int
) -> tuple[Tensor, Tensor]:
    """Rows of the table of values at the four pixels of each sample, and their weights, both (..., J, 4).

    Pixels are (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).

    Args:
        weights: (..., J).
        first: row of the batch item's first pixel; rows of neighbouring pixels are ``heads`` apart.
        outside: row of zeros, for pixels outside the map.
    """
    kind = torch.int32 if outside < 2**31 else torch.int64
    rows = torch.empty(*at.x.shape, 4, dtype=kind, device=at.x.device)
    scales = weights.new_empty(rows.shape)
    inside_x = [(at.x >= 0) & (at.x < about.columns), (at.x >= -1) & (at.x < about.columns - 1)]
    inside_y = [(at.y >= 0) & (at.y < about.rows), (at.y >= -1) & (at.y < about.rows - 1)]
    columns = about.columns.to(kind)
    here = (at.y * columns).add_(at.x).mul_(heads).add_((about.pixel + first).to(kind))
    lower = weights * at.below
    upper = weights - lower
    nothing = here.new_full((), outside)
    for down, here_or_below in enumerate((here, here + columns * heads)):
        of_row = lower if down else upper
        of_right = of_row * at.right
        for across in (0, 1):
            pixel = here_or_below + heads if across else here_or_below
            torch.where(inside_x[across] & inside_y[down], pixel, nothing, out=rows[..., 2 * down + across])
            scales[..., 2 * down + across] = of_right if across else of_row - of_right
    return rows, scales


def bilinear_gradients(along: Tensor, weights: Tensor, at: Placed, about: Levels) -> tuple[Tensor, Tensor]:
    """Gradients of locations (..., J, 2) and weights (..., J).

    Args:
        along: (..., J, 4), inner product of each pixel's values with the output's gradient.
    """
    first, second, third, fourth = along.unbind(-1)
    top, bottom = torch.lerp(first, second, at.right), torch.lerp(third, fourth, at.right)
    across = torch.lerp(second - first, fourth - third, at.below)
    d_x = across.mul_(weights).mul_(about.width)
    d_y = (bottom - top).mul_(weights).mul_(about.height)
    return torch.stack([d_x, d_y], -1), torch.lerp(top, bottom, at.below)


def sort_by_cell(x: Tensor, y: Tensor, about: Levels, heads: int) -> tuple[Tensor, Tensor]:
    """Samples in the order of their cells, and where each cell's begin.

    Args:
        x, y: (B, Q, J) of :func:`place`.

    Returns:
        order: (samples,) int64; within a cell as they are numbered. Samples outside their maps come last.
        begins: (B * cells * H + 1,) int64; cell c of item b and head h is number (b * cells + c) * H + h.
    """
    batch = x.shape[0]
    total = batch * about.cells * heads
    kind = torch.int32 if total < 2**31 - 1 else torch.int64
    touching = ((x >= -1) & (x < about.columns)).logical_and_((y >= -1) & (y < about.rows))
    item = torch.arange(batch, dtype=kind, device=x.device)[:, None, None] * (about.cells * heads)
    cell = (y + 1).to(kind).mul_(about.columns + 1).add_(x).add_(1).mul_(heads).add_(about.cell.to(kind)).add_(item)
    ordered, order = cell.masked_fill_(touching.logical_not_(), total).flatten().sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(total + 1, device=x.device, dtype=kind))
    return order, begins
