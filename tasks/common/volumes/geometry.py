"""Voxel grids in the world, and moving values from one grid to another through the whole affine.

World axes are RAS+, lengths in mm, affines map voxel indices (i, j, k) to the world. DICOM and ITK use LPS+.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Affine = NDArray[np.float64]
Border = Literal["constant", "nearest"]
LPS_TO_RAS: Affine = np.diag([-1.0, -1.0, 1.0, 1.0])
_INSET = 1e-7
"""Sampling points shrink towards the centre by this share, so that rounding never drops a plane at the border."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie.

    Attributes:
        shape: (X, Y, Z).
        affine: (4, 4) float64, voxel indices to RAS+ mm.
    """

    shape: tuple[int, int, int]
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel, ml; of a parallelepiped where the axes are sheared."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def orientation(self) -> str:
        """The direction each array axis mostly runs to, such as ``LPS``."""
        return "".join(str(code) for code in nibabel.aff2axcodes(self.affine))

    def same_as(self, other: Grid, tolerance: float = 1e-4) -> bool:
        """Equal shape, and affines equal to ``tolerance``, relative and absolute."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=tolerance, atol=tolerance)

    def part(self, low: Sequence[int], size: Sequence[int]) -> Grid:
        """The grid of a box that starts at voxel ``low``, which may lie outside."""
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.asarray(low, np.float64)
        return Grid(as_shape(size), affine)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Grid:
        """The inverse of :meth:`as_dict`."""
        return cls(as_shape(content["shape"]), np.array(content["affine"], np.float64))


def as_shape(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Three whole numbers as a tuple."""
    x, y, z = (int(n) for n in sizes)
    return x, y, z


def closest_ras(grid: Grid) -> Grid:
    """The same voxels with axes permuted and flipped so that they run most nearly right, anterior, superior."""
    ornt = nibabel.io_orientation(grid.affine)
    order = np.argsort(ornt[:, 0]).astype(int)
    shape = as_shape([grid.shape[axis] for axis in order])
    affine = grid.affine @ nibabel.orientations.inv_ornt_aff(ornt, grid.shape)
    return Grid(shape, affine)


def with_spacing(grid: Grid, spacing: Sequence[float]) -> Grid:
    """A grid along the same axes and over the same field of view with another spacing, mm.

    The number of voxels is rounded, and the new grid lies centred in the old one.
    """
    old = np.array(grid.spacing)
    new = np.array(spacing, np.float64)
    shape = np.maximum(1, np.round(np.array(grid.shape) * old / new)).astype(int)
    affine = grid.affine.copy()
    affine[:3, :3] = grid.affine[:3, :3] * (new / old)
    middle = grid.affine @ [*(np.array(grid.shape) - 1) / 2, 1]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid(as_shape(shape), affine)


def world_aligned(grid: Grid, spacing: Sequence[float]) -> Grid:
    """The grid along the world's axes that spans all voxel centres of ``grid``, with voxels of ``spacing`` mm."""
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in grid.shape))], np.float64)
    world = corners @ grid.affine.T
    low, high = world[:, :3].min(0), world[:, :3].max(0)
    # An extent that is a whole number of voxels but for rounding gets no plane more.
    shape = np.ceil(np.round((high - low) / np.asarray(spacing, np.float64), 4)).astype(int) + 1
    affine = np.diag([*spacing, 1.0]).astype(np.float64)
    affine[:3, 3] = low
    return Grid(as_shape(shape), affine)


def mapping(target: Grid, source: Grid) -> Affine:
    """The (4, 4) matrix from voxel indices of ``target`` to those of ``source``."""
    return np.asarray(np.linalg.solve(source.affine, target.affine), np.float64)


def is_rearrangement(target: Grid, source: Grid) -> bool:
    """Whether every voxel centre of ``target`` is on one of ``source``'s lattice: flips, permutations, crops, pads."""
    matrix = mapping(target, source)
    linear = np.round(matrix[:3, :3])
    if not np.array_equal(np.sort(np.abs(linear), axis=None)[-3:], [1, 1, 1]) or np.abs(linear).sum() != 3:
        return False
    corners = np.array([[*c, 1] for c in product(*((0, max(n - 1, 0)) for n in target.shape))], np.float64)
    at = (corners @ matrix.T)[:, :3]
    return bool(np.abs(at - np.round(at)).max() < 1e-3 and (np.abs(linear).sum(0) == 1).all())


def resample(
    values: NDArray[Any],
    source: Grid,
    target: Grid,
    order: int = 1,
    border: Border = "constant",
    fill: float = 0.0,
) -> NDArray[Any]:
    """``values`` on ``source`` at the voxel centres of ``target``.

    Oblique and sheared affines are handled as they are. Between two grids of one lattice no value is computed: axes are
    permuted, flipped, cut and padded, and whatever the type of ``values``, every value is kept to the bit. Otherwise
    the result is float32 for ``order`` 1 and has the type of ``values`` for ``order`` 0. Apart from the result no array
    of that size is made.

    Args:
        values: (X, Y, Z) of ``source``.
        order: 0 for the nearest voxel, 1 for linear interpolation.
        border: what lies beyond the outermost voxel centres: ``constant`` is ``fill``, ``nearest`` the value there.
        fill: value outside for ``constant``.
    """
    if values.shape != source.shape:
        raise ValueError(f"values of shape {values.shape} on a grid of {source.shape}")
    matrix = mapping(target, source)
    if is_rearrangement(target, source):
        return _rearrange(values, matrix, target.shape, border, fill)
    # Axes that only change places are changed here, so that the matrix is diagonal where it can be: much faster.
    axes = np.argmax(np.abs(matrix[:3, :3]), axis=0)
    if sorted(axes.tolist()) == [0, 1, 2]:
        values, matrix = values.transpose(axes), matrix[[*axes, 3]]
    centre = (np.array(values.shape) - 1) / 2
    linear = matrix[:3, :3] * (1 - _INSET)
    offset = matrix[:3, 3] * (1 - _INSET) + centre * _INSET
    scale = np.diagonal(linear)
    if np.abs(linear - np.diag(scale)).max() * max(target.shape) < 1e-5:
        linear = scale
    kind = np.float32 if order else values.dtype
    found = np.empty(target.shape, kind)
    ndimage.affine_transform(
        values, linear, offset, target.shape, found, order=order, mode=border, cval=fill, prefilter=False
    )
    return found


def _rearrange(
    values: NDArray[Any], matrix: Affine, shape: tuple[int, int, int], border: Border, fill: float
) -> NDArray[Any]:
    linear = np.round(matrix[:3, :3]).astype(int)
    axes = np.argmax(np.abs(linear), axis=0)  # of the source, for each axis of the target
    moved = values.transpose(axes)
    start = np.round(matrix[:3, 3]).astype(int)[axes]
    sign = linear[axes, range(3)]
    pads, cuts = [], []
    for n, first, step, there in zip(shape, start.tolist(), sign.tolist(), moved.shape, strict=True):
        last = first + step * (n - 1)
        low, high = min(first, last), max(first, last)
        inside_low, inside_high = max(low, 0), min(high, there - 1)
        if inside_low > inside_high:  # no overlap: the nearest plane repeated, or nothing but fill
            inside_low = inside_high = 0 if high < 0 else there - 1
            before, after = (n - 1, 0) if high < 0 else (0, n - 1)
            if border == "constant":
                return np.full(shape, fill, values.dtype)
        else:
            before, after = inside_low - low, high - inside_high
        cut = slice(inside_low, inside_high + 1)
        pads.append((before, after) if step > 0 else (after, before))
        cuts.append((cut, step))
    moved = moved[tuple(cut for cut, _ in cuts)]
    moved = moved[tuple(slice(None, None, step) for _, step in cuts)]
    if any(pad != (0, 0) for pad in pads):
        if border == "nearest":
            return np.pad(moved, pads, mode="edge")
        return np.pad(moved, pads, constant_values=fill)
    return np.ascontiguousarray(moved)
