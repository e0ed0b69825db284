"""Random changes of training volumes: the paper's, and a stronger list in the manner of nnU-Net.

All of it is MONAI's but what moves voxels: :class:`tasks.meningioma.spatial.RandSpatial`, in one interpolation.
What is drawn follows from the seed set by ``set_random_state``; labels move with their images.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandCropByPosNegLabeld, SpatialPadd
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)
from monai.transforms.spatial.dictionary import RandFlipd, RandSimulateLowResolutiond
from torch import Tensor

from kernels.errors import InputError, unknown_name
from tasks.meningioma.spatial import KEYS, RandSpatial

NAMES = ("paper", "strong", "none")


def augmentation(name: str, strength: float = 1.0) -> Compose | None:
    """The list called ``name``: a transform of ``{"image": (C, D, H, W), "label": (1, D, H, W)}``, or None.

    ``paper``: Bouget et al. 2021 (arXiv 2101.07715), each with probability 0.5: flips left to right and front to back,
    rotation up to 20 degrees, translation up to 10 %, perspective up to 0.1. ``strong``: flips, rotation up to 30
    degrees, scaling, elastic deformation, noise, blur, brightness, gamma, low resolution, with nnU-Net's probabilities
    (Isensee et al., "nnU-Net", Nature Methods 18, 2021), smooth deformation with that of its rotation.

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
        RandSpatial(degrees=20 * strength, shift=0.1 * strength, perspective=0.1 * strength, prob=0.5),
    ]


def _strong(strength: float) -> list[Any]:
    zoom = (1 - 0.3 * strength, 1 + 0.4 * strength) if strength < 1.5 else (0.55, 1.6)
    return [
        *(RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
        RandSpatial(degrees=30 * strength, zoom=zoom, bend=min(0.2 * strength, 0.4), prob=0.2),
        RandGaussianNoised("image", prob=0.1, std=0.1 * strength),
        RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
        RandScaleIntensityd("image", prob=0.15, factors=0.25 * strength),
        RandSimulateLowResolutiond("image", prob=0.25, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]
