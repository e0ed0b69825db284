"""From an image of any size to what the network sees, and from its probabilities back to the image's own pixels.

The released form of QTSeg (arXiv 2412.17241) is ``resize=fit, normalise=minmax``: longest side to the network's size by
area averaging, the other side cut to a whole number, black added right and below, and the whole of it stretched to
[-1, 1]. Unlike there, a constant image becomes zeros, and probabilities come back at the image's own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kernels.errors import InputError, unknown_name
from tasks.qtseg.masks import Labels

Pixels = NDArray[Any]
Scale = tuple[Tensor, Tensor]
Resize = Literal["fit", "squash", "native", "tiles"]
RESIZES = ("fit", "squash", "native", "tiles")
NORMALISATIONS = ("minmax", "zscore", "fixed", "unit")
COLOURS = {"rgb": 3, "ycrcb": 3, "hsv": 3, "lab": 3, "grey": 1, "green": 1}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CONVERSIONS = {"ycrcb": cv2.COLOR_RGB2YCrCb, "hsv": cv2.COLOR_RGB2HSV_FULL, "lab": cv2.COLOR_RGB2LAB}


@dataclass(frozen=True)
class Canvas:
    """An image at the network's size before its intensities are normalised; what caches hold.

    Attributes:
        image: (C, h, w) uint8 or uint16.
        used: (height, width) of the part that is image; the rest, right and below, is padding.
        original: (H, W) of the image in its file.
    """

    image: Pixels
    used: tuple[int, int]
    original: tuple[int, int]

    def inside(self) -> NDArray[np.bool_]:
        """(h, w), False in the padding."""
        mask = np.zeros(self.image.shape[1:], np.bool_)
        mask[: self.used[0], : self.used[1]] = True
        return mask


@dataclass(frozen=True)
class Prepared:
    """What the network gets of one image.

    Attributes:
        tensor: (C, h, w) float32.
        used, original: as in :class:`Canvas`.
    """

    tensor: Tensor
    used: tuple[int, int]
    original: tuple[int, int]

    def restore(self, probabilities: Tensor) -> Tensor:
        """Probabilities (K, h, w) of the network as (K, H, W) float32 of the image: padding cut off, then resized.

        Resizing is linear, so that the classes still sum to 1; it averages where the image is the smaller one.

        Raises:
            ValueError: the spatial size is not that of ``tensor``.
        """
        if probabilities.shape[-2:] != self.tensor.shape[-2:]:
            raise ValueError(f"{tuple(probabilities.shape)} are not probabilities of {tuple(self.tensor.shape)}")
        part = probabilities[None, :, : self.used[0], : self.used[1]].float()
        if self.used == self.original:
            return part[0].clone()
        return F.interpolate(part, self.original, mode="bilinear", align_corners=False, antialias=True)[0]


@dataclass(frozen=True)
class Preprocessing:
    """How images are made ready; the same in training and in use, kept in checkpoints through :meth:`to_dict`.

    Attributes:
        size: (height, width) that the network sees; with ``tiles`` that of one tile.
        resize: ``fit`` (inside ``size``, padded right and below), ``squash`` (to ``size``), ``native`` (left as it is),
            ``tiles`` (left as it is; training crops tiles, inference slides a window).
        colour: colour space, or one channel (``grey``, ``green``).
        normalise: ``minmax`` (of the whole padded array to [-1, 1]), ``zscore`` (per image and channel), ``fixed``
            (``mean`` and ``std`` of intensities in [0, 1]), ``unit`` ([0, 1]).
        mean, std: per channel, for ``fixed``.
        window: intensities of 16-bit images that become black and white, or None for all of them.
    """

    size: tuple[int, int] = (512, 512)
    resize: Resize = "fit"
    colour: str = "rgb"
    normalise: str = "minmax"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("data.resize", self.resize, RESIZES),
            ("data.colour", self.colour, tuple(COLOURS)),
            ("data.normalise", self.normalise, NORMALISATIONS),
        ):
            if value not in known:
                raise unknown_name(option, str(value), known)
        if any(not isinstance(side, int) or side < 1 for side in self.size):
            raise InputError(f"data.img_size={list(self.size)} must be whole numbers of pixels, 1 or more.")
        if self.normalise == "fixed" and (len(self.mean) != self.channels or len(self.std) != self.channels):
            raise InputError(
                f"data.mean has {len(self.mean)} and data.std {len(self.std)} numbers; data.colour={self.colour} has "
                f"{self.channels} channels."
            )
        if self.normalise == "fixed" and min(self.std) <= 0:
            raise InputError(f"data.std={list(self.std)} must be positive.")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise InputError(f"data.window={list(self.window)} must be two intensities, the lower first.")

    @classmethod
    def from_config(cls, settings: DictConfig) -> Preprocessing:
        """From the section ``data`` of a configuration.

        Raises:
            InputError: a value is unknown or out of range.
        """
        size = _plain(settings.img_size)
        size = [size, size] if isinstance(size, int) else size
        if not isinstance(size, list) or len(size) != 2:
            raise InputError(f"data.img_size={size} must be one number of pixels, or [height, width].")
        one = COLOURS.get(settings.colour) == 1
        mean, std = _plain(settings.mean), _plain(settings.std)
        window = _plain(settings.window)
        if window is not None and len(window) != 2:
            raise InputError(f"data.window={window} must be two intensities, the lower first.")
        return cls(
            (size[0], size[1]),
            settings.resize,
            settings.colour,
            settings.normalise,
            tuple(mean or ((0.449,) if one else IMAGENET_MEAN)),
            tuple(std or ((0.226,) if one else IMAGENET_STD)),
            None if window is None else (float(window[0]), float(window[1])),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Preprocessing:
        """What :meth:`to_dict` gave.

        Raises:
            InputError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise InputError(f"the preprocessing of this checkpoint has {sorted(content)}, not {sorted(names)}.")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return COLOURS[self.colour]

    @property
    def whole(self) -> bool:
        """Whether an image becomes one array of ``size``, so that images can be put into one batch as they are."""
        return self.resize in ("fit", "squash")

    def prepare(self, image: Pixels) -> Prepared:
        """Ready for the network: image (H, W, 1 or 3), uint8 or uint16."""
        canvas = self.canvas(image)
        tensor = self.normalised(to_byte_scale(canvas.image), torch.from_numpy(canvas.inside()))
        return Prepared(tensor, canvas.used, canvas.original)

    def label(self, labels: Labels) -> Tensor:
        """Class indices (H, W) of an image as (h, w) int64 at the network's size; the padding is background."""
        return torch.from_numpy(self.label_canvas(labels)).long()

    def canvas(self, image: Pixels) -> Canvas:
        """Resized, in the right colours, padded; not yet normalised."""
        original = (int(image.shape[0]), int(image.shape[1]))
        image = _windowed(image, self.window)
        used, full = self.sizes(original)
        if used != original:
            image = cv2.resize(image, used[::-1], interpolation=cv2.INTER_AREA)
            image = image[..., None] if image.ndim == 2 else image
        image = in_colour(image, self.colour)
        padded = np.zeros((image.shape[2], *full), image.dtype)
        padded[:, : used[0], : used[1]] = image.transpose(2, 0, 1)
        return Canvas(padded, used, original)

    def label_canvas(self, labels: Labels) -> Labels:
        """Class indices or a mask (H, W) at the network's size, nearest neighbour, 0 in the padding."""
        original = (int(labels.shape[0]), int(labels.shape[1]))
        used, full = self.sizes(original)
        if used != original:
            labels = np.asarray(cv2.resize(labels, used[::-1], interpolation=cv2.INTER_NEAREST), np.uint8)
        padded = np.zeros(full, np.uint8)
        padded[: used[0], : used[1]] = labels
        return padded

    def sizes(self, original: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) that an image of that size gets, without and with padding."""
        if self.resize in ("native", "tiles"):
            return original, original
        if self.resize == "squash":
            return self.size, self.size
        (height, width), (most_high, most_wide) = original, self.size
        if height * most_wide >= width * most_high:
            return (most_high, max(1, width * most_high // height)), self.size
        return (max(1, height * most_wide // width), most_wide), self.size

    def normalised(self, image: Tensor, inside: Tensor, scale: Scale | None = None) -> Tensor:
        """Intensities as the network wants them.

        Args:
            image: (C, h, w) float32 on the scale of :meth:`canvas`.
            inside: (h, w) bool, False in the padding, which becomes 0 (but for ``minmax``, where it takes part).
            scale: of the whole image, where ``image`` is a part of it; its own when left out.
        """
        centre, factor = self.scale(image, inside) if scale is None else scale
        if self.normalise == "minmax":
            return image.mul(factor).add_(centre)
        return (image - centre) * factor * inside

    def scale(self, image: Tensor, inside: Tensor) -> Scale:
        """What :meth:`normalised` shifts an image by and multiplies it with, each (C, 1, 1) or a scalar."""
        if self.normalise == "minmax":
            low, high = torch.aminmax(image)
            if high == low:
                return torch.zeros(()), torch.zeros(())
            factor = 2 / (high - low)
            return -1 - low * factor, factor
        if self.normalise == "zscore":
            weight = inside.float()
            count = weight.sum().clamp(min=1)
            mean = (image * weight).sum((1, 2), keepdim=True) / count
            deviation = (((image - mean) * weight).square().sum((1, 2), keepdim=True) / count).sqrt()
            return mean, torch.where(deviation > 1e-6 * mean.abs().clamp(min=1), 1 / deviation, 0.0)
        if self.normalise == "unit":
            return torch.zeros(()), torch.tensor(1 / 255)
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return 255 * mean, 1 / (255 * std)


def in_colour(image: Pixels, colour: str) -> Pixels:
    """Image (H, W, 1 or 3) as (H, W, C) of the colour space; of a grey image red, green and blue are equal."""
    if colour == "green":
        return image[..., 1:2] if image.shape[2] == 3 else image
    if colour == "grey":
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if image.shape[2] == 3 else image
    if image.shape[2] == 1:
        image = np.repeat(image, 3, 2)
    if colour == "rgb":
        return image
    if image.dtype == np.uint16 and colour != "ycrcb":  # OpenCV has these for 8 bits only
        image = (image // 257).astype(np.uint8)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image), _CONVERSIONS[colour]))


def to_byte_scale(image: Pixels) -> Tensor:
    """A canvas's image as float32 in [0, 255], whatever its depth."""
    tensor = torch.from_numpy(image.astype(np.float32))
    return tensor / 257 if image.dtype == np.uint16 else tensor


def _windowed(image: Pixels, window: Sequence[float] | None) -> Pixels:
    if window is None or image.dtype != np.uint16:
        return image
    low, high = window
    stretched = np.clip((image.astype(np.float32) - low) * (65535 / (high - low)), 0, 65535)
    return stretched.round().astype(np.uint16)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
