"""Means and reductions of the regions of a map, over the tokens that are real."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.masking import blank
from kernels.bi_level_routing_attention.regions import Regions
from kernels.errors import InputError

POOLINGS = ("identity", "average", "max", "adaptive_average", "adaptive_max")


def region_means(x: Tensor, mask: Tensor | None, grid: Regions) -> Tensor:
    """(B, regions, C): mean of each region's real tokens of a map (B, H, W, C), in float32; 0 where none is real."""
    precise = torch.promote_types(x.dtype, torch.float32)
    sums = _region_sums(blank(x, mask), grid, precise)
    if mask is None:
        return sums / grid.inside(x.device).sum(1, dtype=precise)[:, None]
    return sums / _region_sums(mask[..., None], grid, precise).clamp_min(1)


def check_pooling(name: str, pooling: str, size: int, grid: Regions) -> None:
    """Refuse squares that do not fit a region.

    Raises:
        InputError: they do not.
    """
    if pooling in ("average", "max") and size > min(grid.rows, grid.columns):
        raise InputError(
            f"attention '{name}': kv_pooling_size={size} is more than a side of this map's regions of {grid.rows} x "
            f"{grid.columns} tokens."
        )


def pool_regions(
    x: Tensor, seen: Tensor | None, grid: Regions, pooling: str, size: int, hide: bool
) -> tuple[Tensor, Tensor | None, Regions]:
    """Reduce the tokens within each region, over those that are seen.

    Args:
        x: (B, H, W, heads, E).
        seen: (B, H, W) bool, tokens that count.
        grid: regions of the map.
        pooling: one of :data:`POOLINGS`; squares of ``average`` and ``max`` are clamped to the region, and what they
            leave over at its end is dropped.
        size: side of a square, or squares along a side for the adaptive ones.
        hide: whether what sticks out of the map is left out, given that ``seen`` is there; else it counts as zeros.

    Returns:
        The smaller map, which of its tokens hold any that is seen, and its regions, as many as before.
    """
    if seen is not None:
        x = x.masked_fill(~seen[..., None, None], 0)
    below, right = grid.down * grid.rows - grid.height, grid.across * grid.columns - grid.width
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, below))
    if seen is not None:
        seen = F.pad(seen, (0, right, 0, below), value=not hide)
    if pooling == "identity":
        return x, seen, Regions(x.shape[1], x.shape[2], grid.rows, grid.columns)
    batch, _, _, heads, width = x.shape
    squares = _squares(x.flatten(3), grid)
    present = None if seen is None else _squares(seen[..., None], grid)
    pooled = _pooled(squares, present, pooling, size)
    rows, columns = pooled.shape[-2:]
    smaller = Regions(grid.down * rows, grid.across * columns, rows, columns)
    if present is not None:
        share = _pooled(present.to(x.dtype), None, pooling, size)
        seen = _as_map(share, batch, grid)[..., 0] > 0
    return _as_map(pooled, batch, grid).unflatten(3, (heads, width)), seen, smaller


def _region_sums(x: Tensor, grid: Regions, dtype: torch.dtype) -> Tensor:
    below, right = grid.down * grid.rows - grid.height, grid.across * grid.columns - grid.width
    x = F.pad(x, (0, 0, 0, right, 0, below)) if grid.ragged else x
    # One axis after the other: over both at once PyTorch's sum takes ten times as long on the CPU.
    rows = x.unflatten(1, (grid.down, grid.rows)).sum(2, dtype=dtype)
    return rows.unflatten(2, (grid.across, grid.columns)).sum(3).flatten(1, 2)


def _squares(x: Tensor, grid: Regions) -> Tensor:
    """A padded map (B, H, W, C) as (B * regions, C, rows, columns)."""
    cells = x.unflatten(2, (grid.across, grid.columns)).unflatten(1, (grid.down, grid.rows))
    return cells.permute(0, 1, 3, 5, 2, 4).flatten(0, 2)


def _as_map(squares: Tensor, batch: int, grid: Regions) -> Tensor:
    """(B * regions, C, rows, columns) as a map (B, H, W, C)."""
    cells = squares.unflatten(0, (batch, grid.down, grid.across))
    return cells.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


def _pooled(x: Tensor, present: Tensor | None, pooling: str, size: int) -> Tensor:
    """Squares (n, C, rows, columns) reduced over their tokens that are present (n, 1, rows, columns)."""
    if "average" in pooling:
        mean = _averaged(x, pooling, size)
        if present is None:
            return mean
        share = _averaged(present.to(x.dtype), pooling, size)
        return mean / share.masked_fill(share == 0, 1)
    if present is not None:
        x = x.masked_fill(~present, torch.finfo(x.dtype).min)
    most = F.adaptive_max_pool2d(x, size) if pooling == "adaptive_max" else F.max_pool2d(x, _kernel(x, size))
    return most if present is None else most.masked_fill(most == torch.finfo(x.dtype).min, 0)


def _averaged(x: Tensor, pooling: str, size: int) -> Tensor:
    if pooling == "adaptive_average":
        return F.adaptive_avg_pool2d(x, size)
    return F.avg_pool2d(x, _kernel(x, size))


def _kernel(x: Tensor, size: int) -> tuple[int, int]:
    return min(size, x.shape[-2]), min(size, x.shape[-1])
