"""The piece of surface between neighbouring voxels, by which of them are inside.

Take the centres of 2 x 2 x 2 voxels (2 x 2 pixels) as the corners of a cell. Where an edge of the cell joins a corner
inside to one outside, the surface crosses the middle of that edge. On each face the crossings are joined by straight
lines, and the lines close to polygons around the minority of the corners. That is marching cubes without interpolation
(Lorensen and Cline, SIGGRAPH 1987); lengths and areas follow from 16 or 256 cases.

Two choices make the areas those of the table of Nikolov et al. (arXiv 1809.04430), which the field's surface metrics
use: diagonal corners of a face are cut off one by one, never joined, when they belong to the minority of the cell; and
a polygon that is not flat is cut into the triangles of largest total area in a cell of unit size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Point: TypeAlias = tuple[float, ...]
Triangle: TypeAlias = tuple[int, int, int]
Floats: TypeAlias = NDArray[np.float64]

_RING = ((0, 0), (1, 0), (1, 1), (0, 1))  # the corners of a face in order around it
_MOST_TRIANGLES = 4


def element_sizes(spacing: tuple[float, ...]) -> Floats:
    """Area (256,) in mm² of the surface in a cell, or length (16,) in mm in 2-D, by the cell's code.

    Args:
        spacing: (3,) or (2,) distance of neighbouring voxels in mm. A code has one bit per corner, the first axis
            slowest and the highest bit first: corner (0, 0, 0) is bit 7 and corner (1, 1, 1) bit 0.

    >>> float(element_sizes((1.0, 1.0, 1.0))[0b11110000])  # the first half inside: a flat square
    1.0
    """
    step = np.asarray(spacing, dtype=np.float64)
    if len(step) == 2:
        return np.linalg.norm(_contour_vectors() * step, axis=-1).sum(axis=-1)
    return np.linalg.norm(_area_vectors() * (step.prod() / step), axis=-1).sum(axis=-1)


@lru_cache(maxsize=1)
def _contour_vectors() -> Floats:
    """The (at most two) lines (16, 2, 2) of each 2 x 2 cell of unit size."""
    vectors = np.zeros((16, 2, 2))
    for code in range(16):
        inside = dict(zip(itertools.product((0, 1), repeat=2), _bits(code, 4), strict=True))
        for k, (start, end) in enumerate(_lines_across(inside, list(_RING))):
            vectors[code, k] = np.subtract(end, start)
    return vectors


@lru_cache(maxsize=1)
def _area_vectors() -> Floats:
    """Area times normal (256, triangles, 3) of each triangle of each cell of unit size; absent triangles are 0."""
    vectors = np.zeros((256, _MOST_TRIANGLES, 3))
    for code in range(256):
        inside = dict(zip(itertools.product((0, 1), repeat=3), _bits(code, 8), strict=True))
        pieces = [piece for polygon in _polygons(inside) for piece in _widest_triangles(np.array(polygon))]
        vectors[code, : len(pieces)] = np.reshape(pieces, (-1, 3))
    return vectors


def _bits(code: int, length: int) -> list[bool]:
    """The corners of the minority, highest bit first: which side is called inside changes no surface."""
    bits = [bool(code >> k & 1) for k in reversed(range(length))]
    return bits if 2 * sum(bits) <= length else [not bit for bit in bits]


def _polygons(inside: dict[tuple[int, ...], bool]) -> Iterator[list[Point]]:
    """The closed polygons of a 2 x 2 x 2 cell, as the points where they cross its edges, in order."""
    joined: dict[Point, list[Point]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        face = [(*pair[:axis], side, *pair[axis:]) for pair in _RING]
        for start, end in _lines_across(inside, face):
            joined.setdefault(start, []).append(end)
            joined.setdefault(end, []).append(start)
    while joined:  # an edge lies on two faces, so that each point has two lines and the walk comes back
        point: Point | None = next(iter(joined))
        polygon = []
        while point is not None:
            polygon.append(point)
            point = next((p for p in joined.pop(point) if p in joined), None)
        yield polygon


def _lines_across(inside: dict[tuple[int, ...], bool], face: list[tuple[int, ...]]) -> Iterator[tuple[Point, Point]]:
    """The lines that part the inside from the outside on a face of four corners, given in order around it."""
    middles = [tuple((p + q) / 2 for p, q in zip(face[k], face[k - 1], strict=True)) for k in range(4)]
    crossed = [k for k in range(4) if inside[face[k]] != inside[face[k - 1]]]
    if len(crossed) == 2:
        yield middles[crossed[0]], middles[crossed[1]]
    elif len(crossed) == 4:
        for k in range(4):
            if inside[face[k]]:  # cut this corner off, between the edges before and after it
                yield middles[k], middles[(k + 1) % 4]


def _widest_triangles(polygon: Floats) -> Floats:
    """Area times normal (n - 2, 3) of the triangles into which the polygon (n, 3) is cut."""
    cuts = [np.array(cut) for cut in _triangulations(0, len(polygon) - 1)]
    vectors = [
        np.cross(polygon[cut[:, 1]] - polygon[cut[:, 0]], polygon[cut[:, 2]] - polygon[cut[:, 0]]) / 2 for cut in cuts
    ]
    return max(vectors, key=lambda v: round(float(np.linalg.norm(v, axis=1).sum()), 9))


def _triangulations(first: int, last: int) -> list[list[Triangle]]:
    """Every way to cut the polygon of the corners ``first`` to ``last`` into triangles."""
    if last - first < 2:
        return [[]]
    return [
        [*left, (first, middle, last), *right]
        for middle in range(first + 1, last)
        for left in _triangulations(first, middle)
        for right in _triangulations(middle, last)
    ]
