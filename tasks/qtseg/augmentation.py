"""Random changes of an image that its mask and field of view go through too; each follows from a generator alone.

QTSeg's list (arXiv 2412.17241): none to four of ten operations in random order: flips, Gaussian noise, blur, contrast
per channel, scale per axis, rotation, shear, piecewise affine, translation. All geometry of one image is put together
first and the pixels are sampled once, which blurs less and costs less than one resampling per operation; what changes
intensities follows, in its own random order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from kernels.errors import InputError, unknown_name

Matrix = NDArray[np.float64]
_GRID = 4  # control points per side of the piecewise affine transform


@dataclass
class _Geometry:
    """Where output pixels are read from, in coordinates from -1 to 1 over the image, x then y.

    A point p of the output reads ``matrix @ p`` plus the bends; a bend is a grid of shifts (2, n, n) together with the
    matrix that stood when it was drawn.
    """

    aspect: float  # width / height: rotations and shears are those of pixels, not of the square from -1 to 1
    matrix: Matrix = field(default_factory=lambda: np.eye(3))
    bends: list[tuple[Matrix, Tensor]] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    only_flips: bool = True

    def then(self, forward: Matrix, exact_flip: int | None = None) -> None:
        """Add an operation that moves what is at p to ``forward @ p``."""
        self.matrix = self.matrix @ np.linalg.inv(forward)
        if exact_flip is None:
            self.only_flips = False
        else:
            self.flips.append(exact_flip)

    def in_pixels(self, matrix: Matrix) -> Matrix:
        """A transform of pixel distances, such as a rotation, as one of coordinates from -1 to 1."""
        scale = np.diag([self.aspect, 1.0, 1.0])
        return np.asarray(np.linalg.inv(scale) @ matrix @ scale)


@dataclass(frozen=True)
class Item:
    """What moves together.

    Attributes:
        image: (C, h, w) float32 in [0, 255].
        label: (h, w) uint8 class indices.
        flags: (n, h, w) uint8 masks, such as the field of view.
    """

    image: Tensor
    label: Tensor
    flags: Tensor


Geometric = Callable[[_Geometry, Generator, float], None]
Photometric = Callable[[Tensor, Generator, float], Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Draws operations and applies them.

    Attributes:
        operations: names, of :data:`GEOMETRIC` and :data:`PHOTOMETRIC`.
        fewest, most: how many of them are drawn, without repetition.
        strength: factor on every range; 0 leaves flips and quarter turns only.
    """

    operations: tuple[str, ...]
    fewest: int = 0
    most: int = 4
    strength: float = 1.0

    @classmethod
    def from_config(cls, settings: DictConfig | Mapping[str, Any]) -> Augmentation:
        """From ``policy`` (a name of :data:`POLICIES`), ``strength`` and ``most`` (None: the policy's).

        Raises:
            InputError: a value is unknown or out of range.
        """
        if settings["policy"] not in POLICIES:
            raise unknown_name("data.augment.policy", str(settings["policy"]), POLICIES)
        operations, fewest, most = POLICIES[settings["policy"]]
        given, strength = settings["most"], settings["strength"]
        if given is not None and not 0 <= given <= len(operations):
            raise InputError(f"data.augment.most={given} must be 0 to {len(operations)} with this policy.")
        if not 0 <= strength <= 2:
            raise InputError(f"data.augment.strength={strength} must be between 0 and 2.")
        most = most if given is None else int(given)
        return cls(operations, min(fewest, most), most, float(strength))

    @property
    def moves(self) -> bool:
        """Whether anything but flips can move pixels, so that a tile should be cut with a margin."""
        return self.most > 0 and self.strength > 0 and any(o in GEOMETRIC and "flip" not in o for o in self.operations)

    def __call__(self, item: Item, rng: Generator) -> Item:
        """The changed item; beyond the edges the image is black, the label background and flags 0."""
        count = int(rng.integers(self.fewest, self.most + 1))
        drawn = [self.operations[i] for i in rng.permutation(len(self.operations))[:count]]
        height, width = item.label.shape
        geometry = _Geometry(width / height)
        for name in drawn:
            if name in GEOMETRIC:
                GEOMETRIC[name](geometry, rng, self.strength)
        item = _sampled(item, geometry)
        image = item.image
        for name in drawn:
            if name in PHOTOMETRIC:
                image = PHOTOMETRIC[name](image, rng, self.strength).clamp(0, 255)
        return Item(image, item.label, item.flags)


def _sampled(item: Item, geometry: _Geometry) -> Item:
    if geometry.only_flips:
        return Item(
            *(part.flip(geometry.flips) if geometry.flips else part for part in (item.image, item.label, item.flags))
        )
    grid = _grid(geometry, tuple(item.label.shape))
    image = F.grid_sample(item.image[None], grid, "bilinear", "zeros", align_corners=False)[0]
    flat = torch.cat([item.label[None], item.flags]).float()[None]
    moved = F.grid_sample(flat, grid, "nearest", "zeros", align_corners=False)[0].to(torch.uint8)
    return Item(image, moved[0], moved[1:])


def _grid(geometry: _Geometry, size: tuple[int, ...]) -> Tensor:
    height, width = size
    grid = _affine_grid(geometry.matrix, height, width)
    for matrix, shifts in geometry.bends:
        # The bend was drawn in the frame that ``matrix`` maps to the image: it shifts p before the matrix is applied.
        inverse = np.linalg.inv(matrix) @ geometry.matrix
        at = _affine_grid(inverse, height, width)
        turned = torch.einsum("ij,jhw->ihw", torch.from_numpy(matrix[:2, :2]).float(), shifts)
        grid += F.grid_sample(turned[None], at, "bilinear", "border", align_corners=True).permute(0, 2, 3, 1)
    return grid


def _affine_grid(matrix: Matrix, height: int, width: int) -> Tensor:
    """What ``F.affine_grid`` gives, (1, h, w, 2), as the sum of a row and a column, in a fifth of its time."""
    theta = torch.from_numpy(matrix[:2]).float()
    x, y = ((torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1 for side in (width, height))
    return ((x[:, None] * theta[:, 0])[None] + (y[:, None] * theta[:, 1] + theta[:, 2])[:, None])[None]


def _flip_vertical(geometry: _Geometry, rng: Generator, _strength: float) -> None:
    if rng.random() < 0.5:
        geometry.then(np.diag([1.0, -1.0, 1.0]), -2)


def _flip_horizontal(geometry: _Geometry, rng: Generator, _strength: float) -> None:
    if rng.random() < 0.5:
        geometry.then(np.diag([-1.0, 1.0, 1.0]), -1)


def _scale(geometry: _Geometry, rng: Generator, strength: float) -> None:
    """Half to twice the size, each axis by itself."""
    low, high = 1 - 0.5 * min(strength, 1.8), 1 + strength
    geometry.then(np.diag([*rng.uniform(low, high, 2), 1.0]))


def _rotate(geometry: _Geometry, rng: Generator, strength: float) -> None:
    """Up to 40 degrees either way."""
    angle = math.radians(rng.uniform(-40, 40) * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    geometry.then(geometry.in_pixels(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])))


def _shear(geometry: _Geometry, rng: Generator, strength: float) -> None:
    """Up to 16 degrees either way, along x."""
    slope = math.tan(math.radians(rng.uniform(-16, 16) * strength))
    geometry.then(geometry.in_pixels(np.array([[1, slope, 0], [0, 1, 0], [0, 0, 1.0]])))


def _translate(geometry: _Geometry, rng: Generator, strength: float) -> None:
    """Up to a fifth of the side along each axis."""
    x, y = rng.uniform(-0.4, 0.4, 2) * strength  # of coordinates that run from -1 to 1
    geometry.then(np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]]))


def _piecewise(geometry: _Geometry, rng: Generator, strength: float) -> None:
    """Each point of a 4 x 4 grid is shifted by a normal deviate of 0.8 to 3 % of the side."""
    sigma = 2 * rng.uniform(0.008, 0.03) * strength
    shifts = torch.from_numpy(rng.normal(0, sigma, (2, _GRID, _GRID)).astype(np.float32))
    geometry.bends.append((geometry.matrix.copy(), shifts))
    geometry.only_flips = False


def _quarter_turn(geometry: _Geometry, rng: Generator, _strength: float) -> None:
    """By 0, 90, 180 or 270 degrees; what is not square is turned by 0 or 180."""
    turns = int(rng.integers(4)) if geometry.aspect == 1 else 2 * int(rng.integers(2))
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    geometry.then(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]]))


def _noise(image: Tensor, rng: Generator, strength: float) -> Tensor:
    """Gaussian, of 0.5 % of the range."""
    noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
    return torch.from_numpy(noise).mul_(0.005 * 255 * strength).add_(image)


def _blur(image: Tensor, rng: Generator, strength: float) -> Tensor:
    """Gaussian, of one pixel."""
    if strength == 0:
        return image
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    blurred = cv2.GaussianBlur(pixels, (0, 0), strength, borderType=cv2.BORDER_REFLECT_101)
    return torch.from_numpy(blurred.reshape(pixels.shape)).permute(2, 0, 1).contiguous()


def _contrast(image: Tensor, rng: Generator, strength: float) -> Tensor:
    """Half to one and a half of the distance from the middle grey, each channel by itself."""
    factor = 1 + torch.from_numpy(rng.uniform(-0.5, 0.5, (len(image), 1, 1)).astype(np.float32)) * min(strength, 1.8)
    return (image - 127) * factor + 127


def _brightness(image: Tensor, rng: Generator, strength: float) -> Tensor:
    return image + float(rng.uniform(-40, 40)) * strength


def _gamma(image: Tensor, rng: Generator, strength: float) -> Tensor:
    return (image.clamp(0, 255) / 255).pow(float(np.exp(rng.uniform(-0.5, 0.5) * strength))) * 255


def _tint(image: Tensor, rng: Generator, strength: float) -> Tensor:
    """Another colour of the light: channels by 0.8 to 1.2."""
    return image * (1 + torch.from_numpy(rng.uniform(-0.2, 0.2, (len(image), 1, 1)).astype(np.float32)) * strength)


def _low_resolution(image: Tensor, rng: Generator, strength: float) -> Tensor:
    """As if recorded with up to half the resolution."""
    factor = 1 - float(rng.uniform(0, 0.5)) * min(strength, 1.5)
    small = [max(1, round(side * factor)) for side in image.shape[1:]]
    lower = F.interpolate(image[None], small, mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(lower, tuple(image.shape[1:]), mode="bilinear", align_corners=False)[0]


GEOMETRIC: dict[str, Geometric] = {
    "flip_vertical": _flip_vertical,
    "flip_horizontal": _flip_horizontal,
    "scale": _scale,
    "rotate": _rotate,
    "shear": _shear,
    "piecewise": _piecewise,
    "translate": _translate,
    "quarter_turn": _quarter_turn,
}
PHOTOMETRIC: dict[str, Photometric] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "gamma": _gamma,
    "tint": _tint,
    "low_resolution": _low_resolution,
}
_PAPER = (
    "flip_vertical", "flip_horizontal", "noise", "blur", "contrast",
    "scale", "rotate", "shear", "piecewise", "translate",
)  # fmt: skip
POLICIES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "none": ((), 0, 0),
    "light": (("flip_vertical", "flip_horizontal", "contrast", "noise"), 0, 4),
    "paper": (_PAPER, 0, 4),
    "strong": ((*_PAPER, "quarter_turn", "brightness", "gamma", "tint", "low_resolution"), 2, 8),
}
"""Operations, fewest and most of them, by name."""


def named(policy: str) -> Augmentation:
    """The policy as it is published or usual."""
    return Augmentation.from_config({"policy": policy, "strength": 1.0, "most": None})


def names() -> Sequence[str]:
    """Every operation."""
    return [*GEOMETRIC, *PHOTOMETRIC]
