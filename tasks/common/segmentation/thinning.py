"""Centre lines of masks, in 2-D and 3-D: border points are removed until a line is left and nothing is broken."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError

Mask = NDArray[np.bool_]
Codes = NDArray[np.int64]


def skeleton(mask: ArrayLike) -> Mask:
    """Centre lines of a mask (H, W) or (X, Y, Z), of its shape.

    From each side in turn (four in 2-D, six in 3-D) border points are removed that are not the end of a line and are
    simple: inside, what touches by a corner belongs together, outside, what shares a face. Points go in interleaved
    sets (four or eight) no two of which are neighbours, so that removing a set at once is removing its points one by
    one. Therefore components, holes and cavities are those of the mask, and no structure is lost, however small.

    Source: sides in turn, Palágyi and Kuba, "A 3D 6-subiteration thinning algorithm", Pattern Recognition Letters 19,
    1998; interleaved sets, Bertrand and Aktouf, "A three-dimensional thinning algorithm using subfields", SPIE 2356,
    1994; simple points, Malandain and Bertrand, "Fast characterization of 3D simple points", ICPR 1992.

    Raises:
        InputError: the mask is neither 2-D nor 3-D, or holds NaN.

    >>> skeleton(np.ones((3, 9), dtype=bool)).astype(int)
    array([[0, 0, 0, 0, 0, 0, 0, 0, 0],
           [1, 1, 1, 1, 1, 1, 1, 1, 1],
           [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    """
    array = np.asarray(mask)
    if array.ndim not in (2, 3) or (array.dtype.kind == "f" and np.isnan(array).any()):
        raise InputError(f"a skeleton needs a mask (H, W) or (X, Y, Z) without NaN, not {array.shape}.")
    inside = array != 0
    thin = np.zeros(inside.shape, dtype=bool)
    places = np.nonzero(inside)
    if len(places[0]):
        box = tuple(slice(int(p.min()), int(p.max()) + 1) for p in places)
        thin[box] = _thinned(np.pad(inside[box], 1))[(slice(1, -1),) * inside.ndim]
    return thin


def _thinned(mask: Mask) -> Mask:
    """The skeleton of a mask whose outermost layer is empty."""
    flat = mask.ravel().copy()
    strides = np.array([int(np.prod(mask.shape[axis + 1 :])) for axis in range(mask.ndim)])
    around = np.array(_neighbours(mask.ndim)) @ strides
    sides = [sign * stride for stride in strides for sign in (1, -1)]
    points = np.flatnonzero(flat)
    removed = True
    while removed:
        removed = False
        for side in sides:
            border = points[~flat[points + side]]
            member = np.array(np.unravel_index(border, mask.shape)).T % 2 @ (1 << np.arange(mask.ndim))
            for number in range(2**mask.ndim):
                tried = border[member == number]
                code, where = np.unique(_codes(flat, tried, around), return_inverse=True)
                gone = tried[(_is_simple(code, mask.ndim) & ~_is_end(code))[where]]
                flat[gone] = False
                removed = removed or bool(gone.size)
            points = points[flat[points]]
    return flat.reshape(mask.shape)


def _codes(flat: Mask, points: Codes, around: Codes) -> Codes:
    """Which neighbours of each point are inside, as the bits of a number."""
    code = np.zeros(len(points), dtype=np.int64)
    for bit, offset in enumerate(around):
        code |= flat[points + offset].astype(np.int64) << bit
    return code


def _is_end(code: Codes) -> Mask:
    """One neighbour at most."""
    return (code & (code - 1)) == 0


def _is_simple(code: Codes, dims: int) -> Mask:
    """Whether a point can go without a change of topology, by the code of its neighbours.

    That is: its neighbours inside are one piece, and those outside that share a face with it are one piece too, joined
    by faces among the neighbours that are no corner of the cube.
    """
    by_corner, by_face, faces, no_corner = _neighbour_tables(dims)
    outside = ~code & no_corner
    seeds = outside & faces
    one_inside = _grown(code & -code, code, by_corner) == code
    one_outside = (_grown(seeds & -seeds, outside, by_face) & faces) == seeds
    return (code != 0) & one_inside & (seeds != 0) & one_outside


def _grown(seed: Codes, allowed: Codes, reach: tuple[Codes, Codes]) -> Codes:
    """Everything in ``allowed`` that is connected to the seed."""
    half = len(reach[0]).bit_length() - 1
    while True:
        wider = (seed | reach[0][seed & ((1 << half) - 1)] | reach[1][seed >> half]) & allowed
        if (wider == seed).all():
            return seed
        seed = wider


def _neighbours(dims: int) -> list[tuple[int, ...]]:
    return [offset for offset in itertools.product((-1, 0, 1), repeat=dims) if any(offset)]


@lru_cache(maxsize=2)
def _neighbour_tables(dims: int) -> tuple[tuple[Codes, Codes], tuple[Codes, Codes], int, int]:
    """What sets of neighbours touch by corner and by face; the bits of those that share a face; of those no corner.

    A set is looked up by the lower and the upper half of its bits: two tables of 2^13 sets serve for 2^26.
    """
    offsets = np.array(_neighbours(dims))
    apart = np.abs(offsets[:, None] - offsets[None])
    weight = 1 << np.arange(len(offsets))
    half = len(offsets) // 2
    sets = (np.arange(1 << half)[:, None] >> np.arange(half) & 1).astype(bool)

    def reach(joined: Mask) -> tuple[Codes, Codes]:
        of_each = (joined * weight).sum(axis=1)
        lower, upper = (
            np.bitwise_or.reduce(np.where(sets, part, 0), axis=1) for part in (of_each[:half], of_each[half:])
        )
        return lower, upper

    axes_moved = np.abs(offsets).sum(axis=1)
    return (
        reach(apart.max(axis=-1) == 1),
        reach(apart.sum(axis=-1) == 1),
        int(weight[axes_moved == 1].sum()),
        int(weight[axes_moved <= 2].sum()),
    )
