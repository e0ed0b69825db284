"""The way from a patient's voxels to the network's and back: a working grid, a box of it, and the box's new size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from tasks.common.volumes.geometry import Border, Grid, as_shape, is_rearrangement, resample
from tasks.common.volumes.volume import Volume

Floats = NDArray[np.float32]
Back = Literal["centre", "corner"]


@dataclass(frozen=True, eq=False)
class Way:
    """Three steps, each of which can be walked back.

    Attributes:
        native: the grid of the input.
        working: the grid it was resampled to.
        low: first voxel of the box that was cut out of ``working``.
        box: size of the box.
        size: (D, H, W) the network sees, to which the box was resized.
        border: what lies beyond the outermost voxel centres of a grid.
        back: how the resize is undone. ``centre`` puts voxel centres where they were; ``corner`` is the published
            code's, which lets the outermost voxel centres of both grids meet and so shifts values by up to half a voxel
            towards the border.
    """

    native: Grid
    working: Grid
    low: tuple[int, int, int]
    box: tuple[int, int, int]
    size: tuple[int, int, int]
    border: Border = "constant"
    back: Back = "centre"

    @property
    def is_exact(self) -> bool:
        """Whether values are only moved, never computed."""
        return self.box == self.size and is_rearrangement(self.working, self.native)

    def forward(self, values: NDArray[Any], grid: Grid, fill: float = 0.0) -> NDArray[Any]:
        """Values on ``grid`` (native or any other) as the network sees them, (D, H, W)."""
        part = resample(values, grid, self.working.part(self.low, self.box), 1, self.border, fill)
        return resize(part, self.size)

    def label(self, volume: Volume) -> NDArray[np.uint8]:
        """A label map 0..K-1 as the network sees it, (D, H, W).

        Every class is resampled like the image, and the largest share wins, so that thick slices give smooth
        outlines. A class too small to win anywhere keeps the voxel where its share is largest.
        """
        values = volume.data
        if self.is_exact or not values.any():
            return self.forward(values, volume.grid).astype(np.uint8)
        best = np.zeros(self.size, np.float32)
        total = np.zeros(self.size, np.float32)
        winner = np.zeros(self.size, np.uint8)
        peaks: list[tuple[int, int]] = []
        for number in np.unique(values)[1:] if values.min() == 0 else np.unique(values):
            share = self.forward((values == number).astype(np.float32), volume.grid)
            total += share
            wins = share > best
            winner[wins] = number
            np.maximum(best, share, out=best)
            if share.max() > 0:
                peaks.append((int(number), int(share.argmax())))
        winner[best <= 1 - total] = 0
        for number, place in peaks:
            if not (winner == number).any():
                winner.flat[place] = number
        return winner

    def restore(self, probabilities: Tensor | Floats) -> Floats:
        """Probabilities (K, D, H, W) of the network at the native voxels, (K, X, Y, Z).

        Classes come back one at a time; background is what the others leave, and 1 outside of the box.
        """
        found = np.empty((len(probabilities), *self.native.shape), np.float32)
        found[0] = 1
        for number, values in self.classes(probabilities):
            found[number] = values
            found[0] -= values
        np.clip(found[0], 0, 1, out=found[0])
        return found

    def classes(self, probabilities: Tensor | Floats) -> Iterator[tuple[int, Floats]]:
        """Number and native probability (X, Y, Z) of every class but background, one at a time."""
        for number in range(1, len(probabilities)):
            yield number, self.backward(as_floats(probabilities[number]))

    def backward(self, values: NDArray[Any], order: Literal[0, 1] = 1) -> NDArray[Any]:
        """One map (D, H, W) at the native voxels, 0 outside of the box; ``order`` 0 for labels."""
        if values.shape != self.size:
            raise ValueError(f"a map of {values.shape}; the network sees {self.size}")
        part = resize_back(values, self.box, self.back, order)
        # Outside of the box is zero: a rim of it, where the working grid goes on, is all that can be reached.
        below = [min(1, low) for low in self.low]
        above = [min(1, n - low - box) for n, low, box in zip(self.working.shape, self.low, self.box, strict=True)]
        rim = list(zip(below, above, strict=True))
        if any(map(any, rim)):
            part = np.pad(part, rim)
        source = self.working.part([low - b for low, b in zip(self.low, below, strict=True)], part.shape)
        return resample(part, source, self.native, order, self.border)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a cache on disk."""
        return {
            "native": self.native.as_dict(),
            "working": self.working.as_dict(),
            "low": list(self.low),
            "box": list(self.box),
            "size": list(self.size),
            "border": self.border,
            "back": self.back,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Way:
        """The inverse of :meth:`as_dict`."""
        return cls(
            Grid.from_dict(content["native"]),
            Grid.from_dict(content["working"]),
            as_shape(content["low"]),
            as_shape(content["box"]),
            as_shape(content["size"]),
            content["border"],
            content["back"],
        )


def as_floats(values: Tensor | NDArray[Any]) -> Floats:
    """A tensor of any device, or an array, as a float32 array."""
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values
    return array.astype(np.float32, copy=False)


def resize(values: NDArray[Any], size: tuple[int, int, int]) -> NDArray[Any]:
    """Linear interpolation to ``size`` over the same field of view; axes that shrink are smoothed first.

    The Gaussian has the deviation (factor - 1) / 2, as in scikit-image's ``resize`` with anti-aliasing.
    """
    if values.shape == size:
        return values
    factor = np.array(values.shape) / np.array(size)
    smooth = np.maximum(0, (factor - 1) / 2)
    if smooth.any():
        values = ndimage.gaussian_filter(values, smooth, mode="mirror")
    found = np.empty(size, np.float32)
    ndimage.zoom(values, 1 / factor, found, order=1, mode="mirror", prefilter=False, grid_mode=True)
    return found


def resize_back(values: NDArray[Any], size: tuple[int, int, int], back: Back, order: Literal[0, 1]) -> NDArray[Any]:
    """Interpolation to ``size``, the inverse of :func:`resize`."""
    if values.shape == size:
        return values
    found = np.empty(size, np.float32 if order else values.dtype)
    factor = np.array(size) / np.array(values.shape)
    if back == "corner":
        ndimage.zoom(values, factor, found, order=order, prefilter=False)
    else:
        ndimage.zoom(values, factor, found, order=order, mode="nearest", prefilter=False, grid_mode=True)
    return found
