"""Random changes of training volumes: the paper's, and a stronger list in the manner of nnU-Net.

All of it is MONAI's but :class:`RandProjection`, which turns, shifts and tilts with one interpolation. What is drawn
follows from the seed set by ``set_random_state``; labels move with their images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    MapTransform,
    OneOf,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
    SpatialPadd,
)
from torch import Tensor
from torch.nn import functional as F

from kernels.errors import InputError, unknown_name

KEYS = ("image", "label")
_MODES = ("bilinear", "nearest")
NAMES = ("paper", "strong", "none")


def augmentation(name: str, strength: float = 1.0) -> Compose | None:
    """The list called ``name``: a transform of ``{"image": (C, D, H, W), "label": (1, D, H, W)}``, or None.

    ``paper``: Bouget et al. 2021 (arXiv 2101.07715), each with probability 0.5: flips left to right and front to back,
    rotation up to 20 degrees, translation up to 10 %, perspective up to 0.1. ``strong``: flips, rotation up to 30
    degrees, scaling, elastic deformation, noise, blur, brightness, gamma, low resolution, with nnU-Net's probabilities
    (Isensee et al., "nnU-Net", Nature Methods 18, 2021).

    Args:
        strength: multiplies angles, shifts and intensities; not probabilities.

    Raises:
        InputError: the name is unknown, or the strength negative.
    """
    if name not in NAMES:
        raise unknown_name("augment", str(name), NAMES)
    if not 0 <= strength <= 2:
        raise InputError(f"augment strength {strength} must be from 0 to 2.")
    if name == "none" or strength == 0:
        return None
    return Compose(_paper(strength) if name == "paper" else _strong(strength))


def patches(patch: Sequence[int], samples: int = 1, foreground: float = 0.5) -> Compose:
    """Random patches, ``samples`` of a volume; a list of items. Volumes smaller than ``patch`` are padded with zeros.

    Args:
        patch: (D, H, W).
        foreground: share of the patches whose centre is a voxel of the label, where it has any.
    """
    return Compose(
        [
            SpatialPadd(KEYS, patch),
            RandCropByPosNegLabeld(
                KEYS, "label", patch, pos=foreground, neg=1 - foreground, num_samples=samples, allow_smaller=False
            ),
        ]
    )


def apply(transform: Compose, item: Mapping[str, Any], seed: int) -> Any:
    """``transform`` of ``item`` with what ``seed`` draws; tensors without metadata."""
    transform.set_random_state(seed=seed % 2**32)
    with warnings.catch_warnings():
        # A control has no foreground to centre patches on; MONAI says so for each of them.
        warnings.filterwarnings("ignore", message="Num foregrounds")
        # Some of MONAI's transforms change their input in place, and that may be what a cache holds.
        found = transform({key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()})
    return [_plain(one) for one in found] if isinstance(found, list) else _plain(found)


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: torch.as_tensor(item[key]).as_subclass(Tensor) if key in KEYS else item[key] for key in item}
    found["label"] = found["label"].to(torch.uint8)  # MONAI's spatial transforms leave it as float32
    return found


def _paper(strength: float) -> list[Any]:
    return [
        RandFlipd(KEYS, prob=0.5, spatial_axis=0),
        RandFlipd(KEYS, prob=0.5, spatial_axis=1),
        RandProjection(20 * strength, 0.1 * strength, 0.1 * strength, prob=0.5),
    ]


def _strong(strength: float) -> list[Any]:
    angle = math.radians(30) * strength
    low = 1 - 0.3 * min(strength, 2)
    modes: dict[str, Any] = {"mode": _MODES, "padding_mode": "zeros"}
    return [
        *(RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
        OneOf(
            [
                RandAffined(
                    KEYS,
                    prob=0.35,
                    rotate_range=(angle,) * 3,
                    scale_range=((low - 1, 0.4 * strength),) * 3,
                    cache_grid=False,
                    **modes,
                ),
                Rand3DElasticd(
                    KEYS, prob=0.35, sigma_range=(9, 13), magnitude_range=(50 * strength, 150 * strength), **modes
                ),
            ],
            weights=(0.8, 0.2),
        ),
        RandGaussianNoised("image", prob=0.1, std=0.1 * strength),
        RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
        RandScaleIntensityd("image", prob=0.15, factors=0.25 * strength),
        RandSimulateLowResolutiond("image", prob=0.25, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]


class RandProjection(MapTransform, Randomizable):
    """Rotation, translation and perspective, each with its own coin, in one interpolation.

    Coordinates x run from -1 to 1. The result at x shows the input at R (x - t) / (1 + p x), where R turns by three
    angles. What comes from outside has the lowest intensity of its channel, and label 0.

    Args:
        degrees: largest angle about each axis.
        shift: largest translation along each axis, as a share of its length.
        perspective: largest component of p.
        prob: of each of the three.
    """

    def __init__(self, degrees: float, shift: float, perspective: float, prob: float = 0.5) -> None:
        MapTransform.__init__(self, KEYS)
        self.degrees, self.shift, self.perspective, self.prob = degrees, shift, perspective, prob
        self.drawn = np.zeros((3, 3))

    def randomize(self, data: Any = None) -> None:
        """Draw angles (radians), shifts (of half the length) and perspective."""
        largest = np.array([[math.radians(self.degrees)], [2 * self.shift], [self.perspective]])
        coins = self.R.random_sample((3, 1)) < self.prob
        self.drawn = np.where(coins, self.R.uniform(-1, 1, (3, 3)) * largest, 0.0)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize()
        found = dict(data)
        if not self.drawn.any():
            return found
        grid: Tensor | None = None
        for key in self.keys:
            values = torch.as_tensor(found[key]).as_subclass(Tensor)
            if grid is None or grid.shape[1:4] != values.shape[1:]:
                grid = projection_grid(values.shape[1:], *self.drawn)
            lowest = values.amin((1, 2, 3), keepdim=True).float() if key == "image" else 0.0
            moved = F.grid_sample(
                values.float()[None] - lowest,
                grid,
                mode="bilinear" if key == "image" else "nearest",
                padding_mode="zeros",
                align_corners=False,
            )
            found[key] = (moved[0] + lowest).to(values.dtype)
        return found


def projection_grid(
    size: Sequence[int], angles: Sequence[float], shift: Sequence[float], perspective: Sequence[float]
) -> Tensor:
    """Where each voxel looks, (1, D, H, W, 3) as ``grid_sample`` takes it: last axis first, -1 to 1.

    Args:
        size: (D, H, W).
        angles: radians about each axis of (D, H, W), in that order.
        shift: in units of half an axis.
        perspective: the vector p.
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
    linear = turn * lengths / lengths[:, None]
    offset = -linear @ np.asarray(shift, np.float64)

    def along(weights: Sequence[float], constant: float) -> Tensor:
        d, h, w = (float(weight) * axis for weight, axis in zip(weights, axes, strict=True))
        return (d + constant)[:, None, None] + h[:, None] + w

    depth = along(perspective, 1.0)
    return torch.stack([along(linear[k], offset[k]) / depth for k in (2, 1, 0)], dim=-1)[None]
