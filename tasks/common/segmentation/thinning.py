"""One-pixel-wide centre lines of masks, in 2-D and 3-D, by removing border points without breaking anything."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError

Mask = NDArray[np.bool_]
Codes = NDArray[np.int64]

_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from north
_CUBE = [offset for offset in itertools.product((-1, 0, 1), repeat=3) if offset != (0, 0, 0)]
_HALF = 13  # bits of half a 26-neighbourhood


def skeleton(mask: ArrayLike) -> Mask:
    """Centre lines of a mask (H, W) or (X, Y, Z), of its shape.

    2-D: the thinning of Zhang and Suen, Communications of the ACM 27, 1984 (the default of scikit-image). 3-D: from
    each of six sides in turn, border points are removed that are simple (26-connected foreground, 6-connected
    background; Malandain and Bertrand, ICPR 1992) and not the end of a line, in eight interleaved sets whose points
    are no neighbours, so that components, holes and cavities stay; after the scheme of Palágyi and Kuba, Pattern
    Recognition Letters 19, 1998.

    Raises:
        InputError: the mask is neither 2-D nor 3-D, or holds NaN.

    >>> skeleton(np.ones((3, 7), dtype=bool)).astype(int)
    array([[0, 0, 0, 0, 0, 0, 0],
           [0, 1, 1, 1, 1, 1, 0],
           [0, 0, 0, 0, 0, 0, 0]])
    """
    array = np.asarray(mask)
    if array.ndim not in (2, 3) or (array.dtype.kind == "f" and np.isnan(array).any()):
        raise InputError(f"a skeleton needs a mask (H, W) or (X, Y, Z) without NaN, not {array.shape}.")
    inside = array != 0
    places = np.nonzero(inside)
    if not len(places[0]):
        return np.zeros(inside.shape, dtype=bool)
    box = tuple(slice(int(p.min()), int(p.max()) + 1) for p in places)
    thin = np.zeros(inside.shape, dtype=bool)
    framed = np.pad(inside[box], 1)
    thin[box] = (_thin_plane if inside.ndim == 2 else _thin_volume)(framed)[(slice(1, -1),) * inside.ndim]
    return thin


def _thin_plane(mask: Mask) -> Mask:
    """Zhang and Suen's two passes in turn, until neither removes a point."""
    removable = _removable_in_plane()
    flat = mask.ravel().copy()
    offsets = np.array([row * mask.shape[1] + column for row, column in _AROUND])
    points = np.flatnonzero(flat)
    removed = True
    while removed:
        removed = False
        for table in removable:
            code = _codes(flat, points, offsets)
            gone = table[code]
            flat[points[gone]] = False
            points = points[~gone]
            removed = removed or bool(gone.any())
    return flat.reshape(mask.shape)


@lru_cache(maxsize=1)
def _removable_in_plane() -> tuple[Mask, Mask]:
    """Whether a point goes in the first and second pass, by the code of its eight neighbours (north is bit 0)."""
    around = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)
    neighbours = around.sum(axis=1)
    crossings = (~around & np.roll(around, -1, axis=1)).sum(axis=1)
    north, east, south, west = around[:, [0, 2, 4, 6]].T
    border = (neighbours >= 2) & (neighbours <= 6) & (crossings == 1)
    first = border & ~(north & east & south) & ~(east & south & west)
    second = border & ~(north & east & west) & ~(north & south & west)
    return first, second


def _thin_volume(mask: Mask) -> Mask:
    """Peel from six sides, each in eight sets of points that do not touch, until no side removes a point."""
    flat = mask.ravel().copy()
    strides = np.array([mask.shape[1] * mask.shape[2], mask.shape[2], 1])
    offsets = np.array(_CUBE) @ strides
    sides = [sign * stride for stride in strides for sign in (1, -1)]
    points = np.flatnonzero(flat)
    removed = True
    while removed:
        removed = False
        for side in sides:
            border = points[~flat[points + side]]
            parity = np.stack(np.unravel_index(border, mask.shape)).T % 2 @ np.array([4, 2, 1])
            for octant in range(8):
                tried = border[parity == octant]
                code = _codes(flat, tried, offsets)
                unique, where = np.unique(code, return_inverse=True)
                gone = tried[(_is_simple(unique) & ~_is_end(unique))[where]]
                flat[gone] = False
                removed = removed or bool(gone.size)
            points = points[flat[points]]
    return flat.reshape(mask.shape)


def _codes(flat: Mask, points: Codes, offsets: Codes) -> Codes:
    """Which neighbours of each point are inside, as the bits of a number."""
    code = np.zeros(len(points), dtype=np.int64)
    for bit, offset in enumerate(offsets):
        code |= flat[points + offset].astype(np.int64) << bit
    return code


def _is_end(code: Codes) -> Mask:
    """One neighbour at most."""
    return (code & (code - 1)) == 0


def _is_simple(code: Codes) -> Mask:
    """Whether a point can go without a change of topology, by the code of its 26 neighbours.

    That is: its neighbours inside are one 26-connected piece, and those outside that share a face with it are one
    6-connected piece among the neighbours that share a face or an edge.
    """
    touching, face_joined, faces, no_corner = _neighbour_tables()
    inside = _grown(code & -code, code, touching) == code
    outside = ~code & no_corner
    seeds = outside & faces
    reached = _grown(seeds & -seeds, outside, face_joined)
    return (code != 0) & inside & (seeds != 0) & ((reached & faces) == seeds)


def _grown(seed: Codes, allowed: Codes, table: tuple[Codes, Codes]) -> Codes:
    """Everything in ``allowed`` that is connected to the seed."""
    low = (1 << _HALF) - 1
    while True:
        wider = (seed | table[0][seed & low] | table[1][seed >> _HALF]) & allowed
        if (wider == seed).all():
            return seed
        seed = wider


@lru_cache(maxsize=1)
def _neighbour_tables() -> tuple[tuple[Codes, Codes], tuple[Codes, Codes], int, int]:
    """For each half of the 26 bits, what its set touches by corner and by face; the bits of faces; of non-corners."""
    offsets = np.array(_CUBE)
    apart = np.abs(offsets[:, None] - offsets[None])
    weight = 1 << np.arange(26)
    norm = np.abs(offsets).sum(axis=1)

    def spread(joined: NDArray[np.bool_]) -> tuple[Codes, Codes]:
        reach = (joined * weight).sum(axis=1)
        sets = (np.arange(1 << _HALF)[:, None] >> np.arange(_HALF) & 1).astype(bool)
        halves = (np.bitwise_or.reduce(np.where(sets, reach[None, k : k + _HALF], 0), axis=1) for k in (0, _HALF))
        return tuple(halves)  # type: ignore[return-value]

    return (
        spread(apart.max(axis=-1) == 1),
        spread(apart.sum(axis=-1) == 1),
        int(weight[norm == 1].sum()),
        int(weight[norm <= 2].sum()),
    )
