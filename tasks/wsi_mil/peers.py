"""The tile grids of CLAM and TRIDENT, to repeat work done with them or to read it; our own grid is in ``tiling``."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from kernels.errors import InputError, unknown_name
from tasks.common.contours import Contour

_CONTOUR_TESTS = ("four_pt", "four_pt_hard", "center", "basic")


def clam_grid(
    contour: Contour,
    dimensions: tuple[int, int],
    patch_size: int,
    step: int,
    downsample: int = 1,
    test: str = "four_pt",
    padding: bool = True,
) -> np.ndarray:
    """CLAM's patches of one contour: (n, 2) int64 level-0 x, y; x is the slow axis.

    The grid starts at the contour's bounding box. A patch stays when the test says that it is in the contour and its
    centre is in no hole.

    Args:
        dimensions: (width, height) of level 0.
        patch_size, step: pixels at the patch level.
        downsample: of the patch level, a whole number as CLAM truncates it.
        test: ``four_pt`` (one of four points a quarter patch from the centre), ``four_pt_hard`` (all four), ``center``,
            ``basic`` (the top-left corner).
        padding: let patches cross the right and lower border of the slide.

    Source: Lu et al., Nature Biomedical Engineering 2021, doi:10.1038/s41551-020-00682-w.
    """
    if test not in _CONTOUR_TESTS:
        raise unknown_name("contour test", test, _CONTOUR_TESTS)
    outline = contour.outline.astype(np.int32).reshape(-1, 1, 2)
    side = patch_size * downsample
    left, top, width, height = cv2.boundingRect(outline)
    right, bottom = left + width, top + height
    if not padding:
        right, bottom = min(right, dimensions[0] - side + 1), min(bottom, dimensions[1] - side + 1)
    x, y = np.meshgrid(
        np.arange(left, right, step * downsample), np.arange(top, bottom, step * downsample), indexing="ij"
    )
    corners = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)
    holes = [hole.astype(np.int32).reshape(-1, 1, 2) for hole in contour.holes]
    offsets = _test_points(test, side)
    whole = all if test == "four_pt_hard" else any
    kept = [
        whole(cv2.pointPolygonTest(outline, (float(px), float(py)), False) >= 0 for px, py in corner + offsets)
        and not any(cv2.pointPolygonTest(h, (corner[0] + side / 2, corner[1] + side / 2), False) > 0 for h in holes)
        for corner in corners
    ]
    return corners[np.array(kept, bool)] if len(corners) else corners


def _test_points(test: str, side: int) -> np.ndarray:
    """Points tested, relative to the top-left corner."""
    middle = side // 2
    if test == "basic":
        return np.array([[0, 0]])
    shift = int(middle * 0.5)
    if test == "center" or shift == 0:
        return np.array([[middle, middle]])
    return np.array([[middle + sx * shift, middle + sy * shift] for sx in (-1, 1) for sy in (-1, 1)])


@dataclass(frozen=True)
class TridentPlan:
    """Where TRIDENT puts its patches and from which level it reads them.

    Attributes:
        magnification: the bucket the slide's resolution falls into.
        size, overlap: of a patch at level 0, pixels.
        level: pyramid level read.
        level_size: side of a patch at that level, pixels.
        columns, rows: of the grid before any tissue test.
    """

    magnification: int
    size: int
    overlap: int
    level: int
    level_size: int
    columns: int
    rows: int

    def coords(self) -> np.ndarray:
        """All grid positions, (columns * rows, 2) int64 level-0 x, y, row by row."""
        step = self.size - self.overlap
        y, x = np.mgrid[: self.rows, : self.columns]
        return np.stack([x.ravel() * step, y.ravel() * step], axis=1).astype(np.int64)


# Largest micrometres per pixel of each magnification bucket, exclusive.
_BUCKETS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


def trident_plan(
    dimensions: tuple[int, int],
    mpp: float,
    level_downsamples: Sequence[float],
    magnification: float,
    patch_size: int,
    overlap: int = 0,
) -> TridentPlan:
    """TRIDENT's grid: the resolution is rounded to a bucket of magnification, and all sizes follow from that.

    Args:
        dimensions: (width, height) of level 0.
        mpp: micrometres per level-0 pixel.
        magnification, patch_size, overlap: the request; sizes in pixels at that magnification.

    Raises:
        InputError: the slide is coarser than any bucket.

    Source: Zhang et al., "Accelerating data processing and benchmarking of AI models for pathology", arXiv:2502.06750.
    """
    bucket = next((m for limit, m in _BUCKETS if round(mpp, 4) < limit), None)
    if bucket is None:
        raise InputError(f"a slide of {mpp:g} µm per pixel is coarser than TRIDENT's grid knows (2.4).")
    downsample = bucket / magnification
    size, overlap0 = round(patch_size * downsample), round(overlap * downsample)
    near = [i for i, d in enumerate(level_downsamples) if abs(d - downsample) <= 0.1]
    if near:
        level = near[0]
    elif downsample >= 1:
        level = max(0, bisect.bisect_right(list(level_downsamples), downsample) - 1)
    else:
        level = next((i for i, d in enumerate(level_downsamples) if d >= downsample), 0)
    step = size - overlap0
    return TridentPlan(
        magnification=bucket,
        size=size,
        overlap=overlap0,
        level=level,
        level_size=round(size / int(level_downsamples[level])),
        columns=len(range(0, dimensions[0], step)),
        rows=len(range(0, dimensions[1], step)),
    )
