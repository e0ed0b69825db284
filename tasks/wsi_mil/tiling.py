"""Where the tiles are: one global grid per slide, at a true number of micrometres per pixel.

The grid starts at the slide's corner (0, 0) and covers the whole slide; a tile may cross the right or lower border,
where it is white. Tiles are in row-major order. Resolution is never a bucket of "magnification": a tile of 224 pixels
at 0.5 µm is 112 µm wide on every scanner, within a stated tolerance, and never enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from kernels.errors import InputError
from tasks.wsi_mil.tissue import Tissue


@dataclass(frozen=True)
class TilePlan:
    """How tiles of one slide are cut.

    Attributes:
        tile: side of a tile as the encoder sees it, pixels.
        size: side of a tile at level 0, pixels.
        step: from one tile to the next at level 0, pixels.
        overlap: asked for, pixels of the tile.
        columns, rows: of the grid.
        level: pyramid level read.
        downsample: level-0 pixels per tile pixel.
        level0_mpp, requested_mpp, achieved_mpp: micrometres per pixel of the slide, asked for, and of the tiles.
    """

    tile: int
    size: int
    step: int
    overlap: int
    columns: int
    rows: int
    level: int
    downsample: float
    level0_mpp: float
    requested_mpp: float
    achieved_mpp: float

    def grid(self) -> np.ndarray:
        """Top-left corners of all tiles, (rows * columns, 2) int64 level-0 x, y, row by row."""
        y, x = np.divmod(np.arange(self.rows * self.columns, dtype=np.int64), self.columns)
        return np.stack([x, y], axis=1) * self.step


def plan_tiles(
    slide: str,
    dimensions: tuple[int, int],
    mpp: float,
    level_downsamples: Sequence[float],
    *,
    requested_mpp: float,
    tile: int,
    overlap: int = 0,
    tolerance: float = 0.05,
) -> TilePlan:
    """The grid of a slide.

    A pyramid level whose resolution is within ``tolerance`` of the request is read as it is, without resizing; else the
    tile is reduced from the next finer level, so that its resolution is exact up to the rounding of its side.

    Args:
        slide: what the slide is called in messages.
        dimensions: (width, height) of level 0, pixels.
        mpp: micrometres per level-0 pixel.
        requested_mpp: micrometres per pixel of the tiles.
        tile, overlap: pixels of the tile.
        tolerance: largest relative difference between the resolution asked for and a level's own.

    Raises:
        InputError: the request is finer than the slide, or tile, overlap and tolerance make no grid.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise InputError(
            f"data.tile={tile} with data.overlap={overlap} makes no grid; the overlap must be from 0 to "
            f"{max(tile - 1, 0)}."
        )
    if not 0 <= tolerance < 0.5:
        raise InputError(
            f"data.mpp_tolerance={tolerance} is a relative difference; give a number from 0 to 0.5 such as 0.05."
        )
    if requested_mpp < mpp * (1 - tolerance):
        raise InputError(
            f"slide '{slide}' has {mpp:.4g} µm per pixel, coarser than the {requested_mpp:.4g} asked for; tiles are "
            "never "
            f"enlarged: set data.mpp={mpp:.3g} or coarser for all slides, or leave this one out."
        )
    off = [abs(mpp * d / requested_mpp - 1) for d in level_downsamples]
    nearest = int(np.argmin(off))
    if off[nearest] <= tolerance:
        level, downsample = nearest, float(level_downsamples[nearest])
        size = max(1, round(tile * downsample))
        achieved = mpp * downsample
    else:
        size = max(tile, round(tile * requested_mpp / mpp))
        downsample = size / tile
        level = max((i for i, d in enumerate(level_downsamples) if d <= downsample), key=lambda i: level_downsamples[i])
        achieved = mpp * downsample
    step = max(1, round(size * (tile - overlap) / tile))
    columns, rows = (max(1, math.ceil((side - (size - step)) / step)) for side in dimensions)
    return TilePlan(tile, size, step, overlap, columns, rows, level, downsample, mpp, requested_mpp, achieved)


def tissue_share(tissue: Tissue, corners: np.ndarray, size: int) -> np.ndarray:
    """Share of each tile's area that is tissue, (N,) float64 in [0, 1]; what lies outside the slide is none.

    Exact for the mask's pixels, however the tile's borders fall between them: the table of sums is interpolated.

    Args:
        corners: (N, 2) level-0 x, y of the tiles' top-left corners.
        size: side of a tile, level-0 pixels.
    """
    sums = cv2.integral(tissue.mask.astype(np.uint8), sdepth=cv2.CV_64F)
    scale = np.asarray(tissue.scale)
    low, high = corners / scale, (corners + size) / scale
    inside = _sum_to(sums, high[:, 0], high[:, 1]) - _sum_to(sums, low[:, 0], high[:, 1])
    inside += _sum_to(sums, low[:, 0], low[:, 1]) - _sum_to(sums, high[:, 0], low[:, 1])
    return np.clip(inside / (size / scale[0] * size / scale[1]), 0.0, 1.0)


def _sum_to(sums: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The table of sums at fractional positions, (N,)."""
    rows, columns = sums.shape
    x, y = np.clip(x, 0, columns - 1), np.clip(y, 0, rows - 1)
    left, top = np.minimum(x.astype(np.int64), columns - 2), np.minimum(y.astype(np.int64), rows - 2)
    fx, fy = x - left, y - top
    upper = sums[top, left] * (1 - fx) + sums[top, left + 1] * fx
    lower = sums[top + 1, left] * (1 - fx) + sums[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def tissue_tiles(plan: TilePlan, tissue: Tissue, min_tissue: float) -> tuple[np.ndarray, float]:
    """Corners of the tiles with enough tissue, (N, 2) int64 row by row, and the share that was enough.

    Where tissue exists but no tile holds ``min_tissue`` of it (a thin core), the share is halved until one does; the
    second value returned says so.

    Raises:
        InputError: the mask is empty or ``min_tissue`` is no share.
    """
    if not 0 <= min_tissue <= 1:
        raise InputError(f"data.min_tissue={min_tissue} is a share of a tile's area; give a number from 0 to 1.")
    corners = plan.grid()
    share = tissue_share(tissue, corners, plan.size)
    if not (share > 0).any():
        raise InputError("no tissue found: the tissue mask is empty.")
    enough = min_tissue
    while not (kept := (share > 0) & (share >= enough)).any():
        enough /= 2
    return corners[kept], enough


def reading_order(corners: np.ndarray, step: int) -> np.ndarray:
    """The order to read tiles in, (N,) indices: a Z-curve over the grid, so that neighbours are read together.

    A slide stores compressed squares that do not line up with the tiles; row by row, each is decoded again for every
    row of tiles it touches. The order of the results is not affected.
    """
    column, row = (corners // step).T.astype(np.uint64)
    return np.argsort(_spread(column) | (_spread(row) << np.uint64(1)), kind="stable")


def _spread(value: np.ndarray) -> np.ndarray:
    """The lower 32 bits of each number with a zero before every bit (the classic interleaving by masks)."""
    masks = (0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF, 0x0F0F0F0F0F0F0F0F, 0x3333333333333333, 0x5555555555555555)
    for shift, mask in zip((16, 8, 4, 2, 1), masks, strict=True):
        value = (value | (value << np.uint64(shift))) & np.uint64(mask)
    return value
