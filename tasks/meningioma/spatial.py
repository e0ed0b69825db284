"""Everything that moves voxels, in one interpolation: rotation, zoom, translation, perspective, smooth deformation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms.transform import MapTransform, Randomizable
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

KEYS = ("image", "label")
CELLS = 4  # of the deformation along each axis
_POINTS = CELLS + 3
Vector = Sequence[float] | NDArray[np.float64]


class RandSpatial(MapTransform, Randomizable):
    """Moves image and label together; each kind of movement has its own coin.

    With coordinates y from -1 to 1, the result at y shows the input at R (y - t) / (z (1 + p y)) + u(y), where R turns
    by three angles and u is a cubic B-spline. What comes from outside has the lowest intensity of its channel's eight
    corners, and label 0.

    MONAI's own elastic deformation smooths noise by a wide Gaussian, which takes a dozen times as long.

    Args:
        degrees: largest angle about each axis.
        shift: largest translation along each axis, as a share of its length.
        perspective: largest component of p.
        zoom: smallest and largest z, the same for all axes.
        bend: largest displacement of the spline's control points, as a share of the distance between them; below 0.4
            nothing folds (Choi and Lee, "Injectivity Conditions of 2D and 3D Uniform Cubic B-Spline Functions", 2000).
        prob: of each of the five.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        shift: float = 0.0,
        perspective: float = 0.0,
        zoom: tuple[float, float] = (1.0, 1.0),
        bend: float = 0.0,
        prob: float = 0.5,
    ) -> None:
        MapTransform.__init__(self, KEYS)
        self.largest = np.array([[math.radians(degrees)], [2 * shift], [perspective]])
        self.zoom, self.bend, self.prob = zoom, bend, prob
        self.drawn = np.zeros((3, 3))
        self.scale = 1.0
        self.control: NDArray[np.float64] | None = None

    def randomize(self, data: Any = None) -> None:
        """Draw angles (radians), shifts (of half the length), perspective, zoom and control points."""
        coins = self.R.random_sample(5) < self.prob
        self.drawn = np.where(coins[:3, None], self.R.uniform(-1, 1, (3, 3)) * self.largest, 0.0)
        scale = math.exp(self.R.uniform(math.log(self.zoom[0]), math.log(self.zoom[1])))
        self.scale = scale if coins[3] else 1.0
        control = self.R.uniform(-1, 1, (_POINTS, _POINTS, _POINTS, 3)) * self.bend * 2 / CELLS
        self.control = control if coins[4] and self.bend else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize()
        found = dict(data)
        if not self.drawn.any() and self.scale == 1 and self.control is None:
            return found
        grid: Tensor | None = None
        for key in self.keys:
            values = torch.as_tensor(found[key]).as_subclass(Tensor)
            if grid is None:
                angles, shift, perspective = self.drawn
                grid = spatial_grid(values.shape[1:], angles, shift, perspective, self.scale, self.control)
            ends = (slice(None, None, max(1, n - 1)) for n in values.shape[1:])
            lowest = values[:, *ends].amin((1, 2, 3), keepdim=True).float() if key == "image" else 0.0
            moved = F.grid_sample(
                values.float()[None] - lowest,
                grid,
                mode="bilinear" if key == "image" else "nearest",
                padding_mode="zeros",
                align_corners=False,
            )
            found[key] = (moved[0] + lowest).to(values.dtype)
        return found


def spatial_grid(
    size: Sequence[int],
    angles: Vector,
    shift: Vector,
    perspective: Vector,
    zoom: float = 1.0,
    control: NDArray[np.float64] | None = None,
) -> Tensor:
    """Where each voxel looks, (1, D, H, W, 3) as ``grid_sample`` takes it: last axis first, -1 to 1.

    Args:
        size: (D, H, W).
        angles: radians about each axis of (D, H, W), in that order.
        shift: in units of half an axis.
        perspective: the vector p.
        zoom: above 1 shows a part larger.
        control: (P, P, P, 3) displacements of control points in units of half an axis, in the order (D, H, W).
    """
    axes = [(torch.arange(n, dtype=torch.float32) * 2 + 1) / n - 1 for n in size]
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (k for k in range(3) if k != axis)
        one = np.eye(3)
        one[[a, b], [a, b]] = math.cos(angle)
        one[a, b], one[b, a] = -math.sin(angle), math.sin(angle)
        turn = turn @ one
    lengths = np.array(size, np.float64)
    # Angles are kept in voxels, not in the units of axes of different length.
    linear = turn * lengths / lengths[:, None] / zoom
    offset = -linear @ np.asarray(shift, np.float64)

    def along(weights: Vector, constant: float) -> Tensor:
        d, h, w = (float(weight) * axis for weight, axis in zip(weights, axes, strict=True))
        return (d + constant)[:, None, None] + h[:, None] + w

    depth = along(perspective, 1.0)
    grid = torch.stack([along(linear[k], offset[k]) / depth for k in (2, 1, 0)], dim=-1)
    if control is not None:
        field = torch.from_numpy(control[..., ::-1].astype(np.float32))
        for axis, n in enumerate(size):
            field = torch.tensordot(_spline(n), field.movedim(axis, 0), 1).movedim(0, axis)
        grid += field
    return grid[None]


def _spline(n: int) -> Tensor:
    """(n, P) weights of the uniform cubic B-spline's control points at the centres of n voxels."""
    at = (torch.arange(n, dtype=torch.float32) + 0.5) * CELLS / n
    distance = (at[:, None] - torch.arange(-1, CELLS + 2)).abs()
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, inner, outer)
