"""Smooth random fields in millimetres, and signed distances to the few shapes a head is made of.

Points are (3, n) float32: right, anterior and superior of the head's centre, in millimetres. Distances are negative
inside. Everything is a function of points, so that a head can be drawn on any grid without resampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Floats = NDArray[np.float32]

_REACH = 132.0  # half the side of the cube that holds every point, millimetres
_NODES_PER_GRAIN = 3.0


@dataclass(frozen=True)
class SmoothField:
    """Random values of mean 0 and deviation 1 that change over about ``grain`` millimetres.

    Attributes:
        nodes: (m, m, m) values on a lattice.
        step: distance of the nodes, millimetres.
    """

    nodes: Floats
    step: float

    @classmethod
    def draw(cls, rng: Generator, grain: float) -> SmoothField:
        step = grain / _NODES_PER_GRAIN
        count = int(np.ceil(2 * _REACH / step)) + 2
        nodes = gaussian_filter(rng.standard_normal((count,) * 3, np.float32), _NODES_PER_GRAIN / 2, truncate=3.0)
        return cls((nodes - nodes.mean()) / nodes.std(), step)

    def __call__(self, points: Floats) -> Floats:
        """Values (n,) at ``points`` (3, n)."""
        at = (points + np.float32(_REACH)) / np.float32(self.step)
        return np.asarray(map_coordinates(self.nodes, at, order=1, mode="nearest", prefilter=False))

    def slope(self) -> SmoothField:
        """The length of the gradient, per millimetre."""
        rise = np.sqrt(sum(np.square(part) for part in np.gradient(self.nodes, self.step)))
        return SmoothField(rise.astype(np.float32), self.step)


def ellipsoid(points: Floats, centre: ArrayLike, axes: ArrayLike) -> Floats:
    """Distance to an ellipsoid, exact near its surface: k (k - 1) / |gradient of k^2 / 2| for k = |p / axes|."""
    scaled = (points - _column(centre)) / _column(axes)
    k = np.sqrt(np.square(scaled).sum(axis=0))
    steep = np.sqrt(np.square(scaled / _column(axes)).sum(axis=0))
    return np.asarray(k * (k - 1) / np.maximum(steep, 1e-6))


def capsule(points: Floats, start: ArrayLike, end: ArrayLike, radius: float) -> Floats:
    """Distance to a rod with round ends."""
    first, along = _column(start), _column(end) - _column(start)
    offset = points - first
    share = np.clip((offset * along).sum(axis=0) / np.square(along).sum(), 0, 1)
    return np.asarray(np.sqrt(np.square(offset - along * share).sum(axis=0)) - np.float32(radius))


def union(first: Floats, second: Floats, blend: float) -> Floats:
    """Distance to both shapes together, rounded over ``blend`` millimetres where they meet."""
    near = np.maximum(blend - np.abs(first - second), 0) / blend
    return np.asarray(np.minimum(first, second) - near * near * (blend / 4))


def common(first: Floats, second: Floats, blend: float) -> Floats:
    """Distance to what is inside both shapes."""
    return -union(-first, -second, blend)


def mirrored(points: Floats) -> Floats:
    """Both halves of the head laid on the right one."""
    return np.stack([np.abs(points[0]), points[1], points[2]])


def cover(distance: Floats, width: float) -> Floats:
    """The share of a voxel of side ``width`` that lies inside a shape, for a surface that is flat within the voxel."""
    return np.clip(np.float32(0.5) - distance / np.float32(width), 0, 1)


def sheet(distance: Floats, thickness: float, width: float) -> Floats:
    """The share of a voxel that a thin sheet takes; ``distance`` (not signed) is that to its middle."""
    spread = float(np.hypot(thickness / 2, width / 2))
    return np.asarray(min(1.0, thickness / (2 * spread)) * np.exp(-np.square(distance / np.float32(spread))))


def _column(values: ArrayLike) -> Floats:
    return np.asarray(values, np.float32).reshape(3, 1)
