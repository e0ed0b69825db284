"""Cutting a token grid into tiles of neighbouring queries and the keys they see between them.

A tile is a product of intervals, one per axis and in the coordinates of a dilation group, so that dilation costs
nothing but strides. Its keys are the product of the unions of its queries' windows. Tiles whose windows lie alike on an
axis (all but those at its borders) form one :class:`Piece`: they share a mask, and their windows are not padded.
Everything here depends on sizes alone and is made once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.tables import made_once
from kernels.windows import Axis, Window


@dataclass(frozen=True, eq=False)
class Piece:
    """Tiles of one axis that look alike.

    Attributes:
        queries: (n, t) positions on the axis of each tile's queries.
        keys: (n, w) positions of the keys.
        seen: (t, w) whether a query sees a key; None where all are seen.
        steps: (t, w) entry of a relative position table; means nothing where the key is not seen.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor | None
    steps: Tensor


@dataclass(frozen=True)
class Summary:
    """What an axis costs when cut into tiles of one size: sums over its tiles."""

    tile: int
    tiles: int
    pieces: int
    keys: int
    products: int


def intervals(axis: Axis, length: int) -> tuple[Tensor, Tensor]:
    """(length,) first and one past the last key of every query of a dilation group with ``length`` positions."""
    x = torch.arange(length)
    group = torch.div(x, axis.stride, rounding_mode="floor") * axis.stride
    if axis.causal:
        leader = (group + axis.stride - 1).clamp_max(length - 1)
        return (leader - axis.kernel + 1).clamp_min(0), x + 1
    leader = (group + axis.stride // 2).clamp_max(length - 1)
    start = (leader - axis.kernel // 2).clamp(0, length - axis.kernel)
    return start, start + axis.kernel


def group_lengths(axis: Axis) -> list[tuple[int, range]]:
    """Lengths of the dilation groups, and which groups have them: at most two."""
    longer = axis.length % axis.dilation
    lengths = [
        (axis.length // axis.dilation + 1, range(longer)),
        (axis.length // axis.dilation, range(longer, axis.dilation)),
    ]
    return [(length, groups) for length, groups in lengths if len(groups)]


@made_once(256)
def pieces(axis: Axis, tile: int, relative: bool) -> tuple[Piece, ...]:
    """The axis cut into tiles of ``tile`` queries (the last of a group may be shorter).

    Args:
        relative: tiles are alike only if their windows also lie alike relative to their queries; a relative position
            table needs that, a mask alone does not.
    """
    found: dict[tuple[tuple[tuple[int, int], ...], int], list[tuple[int, int, int, int]]] = {}
    for length, groups in group_lengths(axis):
        starts, ends = (bounds.tolist() for bounds in intervals(axis, length))
        for first in range(0, length, tile):
            last = min(first + tile, length)
            low, high = starts[first], ends[last - 1]
            view = tuple((starts[x] - low, ends[x] - low) for x in range(first, last))
            alike = (view, low - first if relative else 0)
            found.setdefault(alike, []).extend((group, first, low, high) for group in groups)
    return tuple(_piece(axis, view, members) for (view, _), members in found.items())


def _piece(axis: Axis, view: tuple[tuple[int, int], ...], members: list[tuple[int, int, int, int]]) -> Piece:
    group, first, low, high = torch.tensor(members).t()[..., None]
    width = int(high[0] - low[0])
    x, j = torch.arange(len(view)), torch.arange(width)
    begin, end = torch.tensor(view).t()[..., None]
    seen = (j >= begin) & (j < end)
    steps = (j + low[0]) - (x[:, None] + first[0]) + axis.kernel - 1
    return Piece(
        (first + x) * axis.dilation + group,
        (low + j) * axis.dilation + group,
        None if bool(seen.all()) else seen,
        steps.clamp(0, 2 * axis.kernel - 2),
    )


def _summary(axis: Axis, tile: int) -> Summary:
    tiles = keys = products = kinds = 0
    for length, groups in group_lengths(axis):
        starts, ends = intervals(axis, length)
        first = torch.arange(0, length, tile)
        last = (first + tile).clamp_max(length)
        low, high = starts[first], ends[last - 1]
        width, size = high - low, last - first
        tiles += len(first) * len(groups)
        keys += int(width.sum()) * len(groups)
        products += int((width * size).sum()) * len(groups)
        kinds += len(torch.stack([width, size, low - first]).unique(dim=1).t())
    return Summary(tile, tiles, kinds, keys, products)


@made_once(256)
def _summaries(axis: Axis) -> tuple[Summary, ...]:
    """Ways to cut an axis: into 1, 2, 3, ... equal parts, and into multiples of the stride."""
    longest = group_lengths(axis)[0][0]
    sizes = {-(-longest // parts) for parts in range(1, longest + 1)}
    sizes |= {-(-size // axis.stride) * axis.stride for size in sizes}
    usual = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    sizes = {min(max(_nearest(sizes, size), 1), longest) for size in usual}
    return tuple(_summary(axis, size) for size in sorted(sizes))


def _nearest(sizes: set[int], wanted: int) -> int:
    return min(sizes, key=lambda size: (abs(size - wanted), size))


@made_once(256)
def tile_sizes(window: Window, blocks: int, width: int, relative: bool) -> tuple[int, ...]:
    """Queries of a tile on each axis that are expected to take the least time on a CPU.

    Args:
        blocks: batch times heads.
        width: of a head's keys and values together.
        relative: whether there is a relative position table.
    """
    best: tuple[int, ...] = ()
    least = math.inf
    for chosen in itertools.product(*(_summaries(axis) for axis in window.axes)):
        cost = _nanoseconds(chosen, blocks, width)
        if cost < least:
            best, least = tuple(s.tile for s in chosen), cost
    return best


def _nanoseconds(chosen: tuple[Summary, ...], blocks: int, width: int) -> float:
    """Forward and backward, fitted on one core of a server; a call costs more where threads must be woken for it."""
    scores = math.prod(s.products for s in chosen)
    # Keys are gathered, packed by the matrix product and scattered; when the grid is one tile they stay where they are.
    keys = 0 if all(s.tiles == 1 for s in chosen) else math.prod(s.keys for s in chosen)
    calls = math.prod(s.pieces for s in chosen)
    return blocks * (scores * (2.5 + 0.08 * width) + keys * 3.1 * width) + calls * 500e3


# -------------------------------------------------------------------------------------------- tiles of the whole grid


@dataclass(frozen=True, eq=False)
class Look:
    """Tiles of the grid that look alike: the products of one piece per axis.

    Attributes:
        parts: the pieces.
        queries: (n, T) rows of the flattened grid.
        keys: (n, W) rows of the flattened grid.
    """

    parts: tuple[Piece, ...]
    queries: Tensor
    keys: Tensor


def looks(window: Window, sizes: tuple[int, ...], relative: bool) -> tuple[Look, ...]:
    """The grid cut into tiles; every query is in one tile."""
    cut = (pieces(axis, size, relative) for axis, size in zip(window.axes, sizes, strict=True))
    return tuple(
        Look(
            parts,
            _positions([part.queries for part in parts], window.grid),
            _positions([part.keys for part in parts], window.grid),
        )
        for parts in itertools.product(*cut)
    )


def _positions(per_axis: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """(n, T) rows of the flattened grid of the products of tiles, from (n_axis, t_axis) on each axis."""
    flat = torch.zeros(1, 1, dtype=torch.int64)
    for axis, length in zip(per_axis, grid, strict=True):
        n, t = axis.shape
        flat = (flat[:, None, :, None] * length + axis[None, :, None, :]).reshape(len(flat) * n, flat.shape[1] * t)
    return flat


def mask(parts: tuple[Piece, ...]) -> Tensor | None:
    """(T, W) bool over the product of the axes' tiles; None where every query sees every key."""
    if all(part.seen is None for part in parts):
        return None
    seen = torch.ones(1, 1, dtype=torch.bool)
    for part in parts:
        axis = torch.ones(part.steps.shape, dtype=torch.bool) if part.seen is None else part.seen
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return seen
