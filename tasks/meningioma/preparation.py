"""What happens to a patient's volumes before the network sees them, and how its answer gets back onto their voxels.

Two recipes: ``whole`` shows the network the whole head at a fixed size, as published; ``sliding`` keeps the resolution
and lets it see patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kernels.errors import InputError, unknown_name
from tasks.common.volumes.geometry import Grid, as_shape, closest_ras, resample, with_spacing, world_aligned
from tasks.common.volumes.volume import Volume
from tasks.meningioma.intensities import NORMALISATIONS, normalise
from tasks.meningioma.way import Back, Floats, Way, as_floats, resize


@dataclass(frozen=True, eq=False)
class Prepared:
    """Volumes as the network sees them, and the way back.

    Attributes:
        image: (C, D, H, W) float32, axes right, anterior, superior.
        way: from native voxels and back.
        notes: what a reader should know, such as a crop that found no head.
    """

    image: Tensor
    way: Way
    notes: tuple[str, ...] = ()

    def restore(self, probabilities: Tensor | Floats) -> Floats:
        """Probabilities (K, D, H, W) at the native voxels: (K, X, Y, Z) float32, summing to 1."""
        return self.way.restore(probabilities)

    def mask(
        self, probabilities: Tensor | Floats, cutoff: float | None = None, cut_first: bool = False
    ) -> NDArray[np.uint8]:
        """The label map (X, Y, Z) of probabilities (K, D, H, W), with less memory than :meth:`restore`.

        Args:
            cutoff: what the sum of all classes but background must reach; null for the likeliest class.
            cut_first: cut at the network's resolution and bring labels back by the nearest voxel: faster, coarser.
        """
        if cut_first:
            cut = _Cut(self.way.size, cutoff)
            for number in range(1, len(probabilities)):
                cut.add(number, as_floats(probabilities[number]))
            return self.way.backward(cut.label(), order=0)
        cut = _Cut(self.way.native.shape, cutoff)
        for number, values in self.way.classes(probabilities):
            cut.add(number, values)
        return cut.label()

    def label(self, volume: Volume) -> NDArray[np.uint8]:
        """A label map of classes on any grid as the network sees it, (D, H, W)."""
        return self.way.label(volume)


class _Cut:
    """Classes added one at a time; holds two or three maps whatever their number."""

    def __init__(self, shape: tuple[int, int, int], cutoff: float | None) -> None:
        self.cutoff = cutoff
        self.total = np.zeros(shape, np.float32)
        self.best: Floats | None = None
        self.winner = np.zeros(shape, np.uint8)

    def add(self, number: int, values: Floats) -> None:
        self.total += values
        if self.best is None:
            self.best = values
            self.winner[values > 0] = number
            return
        wins = values > self.best
        self.winner[wins] = number
        self.best = np.maximum(self.best, values)

    def label(self) -> NDArray[np.uint8]:
        if self.best is not None:
            background = np.subtract(1, self.total, out=self.total)
            lost = self.best <= background if self.cutoff is None else background > 1 - self.cutoff
            self.winner[lost] = 0
        return self.winner


@dataclass(frozen=True)
class Preparation:
    """A recipe; :meth:`from_config` gives the one that is asked for."""

    recipe: ClassVar[str]

    def prepare(self, volumes: Sequence[Volume]) -> Prepared:
        """The channels of one patient; those on another grid than the first are resampled to it and a note says so."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"recipe": self.recipe} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Preparation:
        """The inverse of :meth:`as_dict`; also of a section of a configuration. Keys of the other recipe are passed by,
        and ``auto`` is the recipe's own value.

        Raises:
            InputError: a value cannot be used.
        """
        name = str(content.get("recipe", "whole"))
        if name not in RECIPES:
            raise unknown_name("data.preparation.recipe", name, RECIPES)
        kind = RECIPES[name]
        own = {field.name for field in fields(kind)}
        every = own.union(*({field.name for field in fields(other)} for other in RECIPES.values()), {"recipe"})
        for key in content:
            if key not in every:
                raise unknown_name("the key of data.preparation", str(key), every)
        given = {key: _plain(value) for key, value in content.items() if key in own and value != "auto"}
        return kind(**given)

    @classmethod
    def from_config(cls, settings: DictConfig | Mapping[str, Any]) -> Preparation:
        """The recipe of the section ``data.preparation``.

        Raises:
            InputError: a value cannot be used.
        """
        content = OmegaConf.to_container(settings, resolve=True) if isinstance(settings, DictConfig) else settings
        assert isinstance(content, Mapping)
        return cls.from_dict({str(key): value for key, value in content.items()})


@dataclass(frozen=True)
class WholeVolume(Preparation):
    """The published whole-volume recipe of Bouget et al., "Meningioma Segmentation in T1-Weighted MRI Leveraging Global
    Context and Attention Mechanisms", Frontiers in Radiology 1:711514, 2021 (arXiv 2101.07715).

    Resample to the world's axes, clip intensities at percentiles, normalise, cut the head out, resize to a fixed size.
    Differs: an image in which no voxel reaches the threshold is used whole.

    Attributes:
        size: (D, H, W) the network sees: right, anterior, superior.
        spacing: mm; None for the smallest of the input, in all directions.
        percentiles: of the whole volume, at which intensities are clipped.
        normalise: minmax, zscore, zscore_nonzero or none.
        crop: whether the head is cut out.
        threshold: the normalised intensity that is head.
        back: ``centre`` or ``corner``, see :class:`tasks.meningioma.way.Way`.
    """

    recipe: ClassVar[str] = "whole"
    size: tuple[int, int, int] = (128, 128, 144)
    spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    percentiles: tuple[float, float] = (0.0, 100.0)
    normalise: str = "minmax"
    crop: bool = True
    threshold: float = 0.2
    back: Back = "centre"

    def __post_init__(self) -> None:
        _check_common(self.normalise, self.percentiles, self.spacing)
        _check_size("size", self.size)
        if self.back not in ("centre", "corner"):
            raise unknown_name("data.preparation.back", str(self.back), ["centre", "corner"])

    def prepare(self, volumes: Sequence[Volume]) -> Prepared:
        native = volumes[0].grid
        spacing = self.spacing or (min(native.spacing),) * 3
        working = world_aligned(native, spacing)
        image = torch.empty(len(volumes), *self.size)
        low, box, notes = (0, 0, 0), working.shape, other_grids(volumes)
        for number, volume in enumerate(volumes):
            values = resample(volume.data, volume.grid, working)
            if values is volume.data or np.may_share_memory(values, volume.data):
                values = values.copy()
            normalise(values, self.normalise, self.percentiles)
            if number == 0 and self.crop:
                found = bounding_box(values >= self.threshold)
                if found is None:
                    notes.append(f"no voxel reaches {self.threshold:g} after normalisation: the whole image is used.")
                else:
                    low, box = found
            cut = tuple(slice(first, first + n) for first, n in zip(low, box, strict=True))
            image[number] = torch.from_numpy(np.ascontiguousarray(resize(values[cut], self.size)))
        return Prepared(image, Way(native, working, low, box, self.size, "constant", self.back), tuple(notes))


@dataclass(frozen=True)
class SlidingWindow(Preparation):
    """Full resolution: axes turned to RAS, another spacing if asked for, z-score over the voxels that are not zero.

    An oblique volume keeps its axes. Beyond the outermost slices the nearest one goes on.

    Attributes:
        patch: (D, H, W) of a patch.
        spacing: mm; None for that of the input.
        percentiles: of the whole volume, at which intensities are clipped.
        normalise: minmax, zscore, zscore_nonzero or none.
        window: intensities that everything is clipped to first, such as (-100, 300) for CT.
        crop: whether rims of zeros (or of the lowest value) are cut off.
    """

    recipe: ClassVar[str] = "sliding"
    patch: tuple[int, int, int] = (96, 96, 96)
    spacing: tuple[float, float, float] | None = None
    percentiles: tuple[float, float] = (0.0, 100.0)
    normalise: str = "zscore_nonzero"
    window: tuple[float, float] | None = None
    crop: bool = True

    def __post_init__(self) -> None:
        _check_common(self.normalise, self.percentiles, self.spacing)
        _check_size("patch", self.patch)
        if self.window is not None and not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise InputError(f"data.preparation.window={list(self.window)} must be two intensities, the lower first.")

    def prepare(self, volumes: Sequence[Volume]) -> Prepared:
        native = volumes[0].grid
        working = closest_ras(native)
        if self.spacing is not None and not np.allclose(working.spacing, self.spacing, rtol=1e-3):
            working = with_spacing(working, self.spacing)
        low, box, notes = (0, 0, 0), working.shape, other_grids(volumes)
        image: Tensor | None = None
        for number, volume in enumerate(volumes):
            values = resample(volume.data, volume.grid, working, border="nearest")
            if number == 0 and self.crop and (found := bounding_box(values > values.min())) is not None:
                low, box = found
            if image is None:
                image = torch.empty(len(volumes), *box)
            cut = tuple(slice(first, first + n) for first, n in zip(low, box, strict=True))
            image[number] = torch.from_numpy(values[cut])
            del values
            normalise(image[number].numpy(), self.normalise, self.percentiles, self.window)
        assert image is not None
        return Prepared(image, Way(native, working, low, box, box, "nearest"), tuple(notes))


RECIPES: dict[str, type[Preparation]] = {kind.recipe: kind for kind in (WholeVolume, SlidingWindow)}


def bounding_box(mask: NDArray[np.bool_]) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """First voxel and size of the box around all of ``mask``, which its holes do not change; None where it is empty."""
    low, size = [], []
    for axis in range(3):
        there = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        if there.size == 0:
            return None
        low.append(int(there[0]))
        size.append(int(there[-1]) + 1 - low[-1])
    return as_shape(low), as_shape(size)


def other_grids(volumes: Sequence[Volume]) -> list[str]:
    """A sentence for each channel that lies on another grid than the first."""
    first: Grid = volumes[0].grid
    return [
        f"channel {number} has the shape {volume.grid.shape} and spacing {_mm(volume.grid)}, the first "
        f"{first.shape} and {_mm(first)}: it is resampled to the first."
        for number, volume in enumerate(volumes)
        if not volume.grid.same_as(first)
    ]


def _mm(grid: Grid) -> str:
    return " x ".join(f"{s:.3g}" for s in grid.spacing) + " mm"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(value)
    return value


def _check_common(how: str, percentiles: Sequence[float], spacing: Sequence[float] | None) -> None:
    if how not in NORMALISATIONS:
        raise unknown_name("data.preparation.normalise", how, NORMALISATIONS)
    if not (len(percentiles) == 2 and 0 <= percentiles[0] < percentiles[1] <= 100):
        raise InputError(
            f"data.preparation.percentiles={list(percentiles)} must be two numbers from 0 to 100, the lower first."
        )
    if spacing is not None and not (len(spacing) == 3 and all(0.05 <= s <= 50 for s in spacing)):
        raise InputError(f"data.preparation.spacing={list(spacing)} must be three lengths from 0.05 to 50 mm, or null.")


def _check_size(name: str, size: Sequence[int]) -> None:
    if not (len(size) == 3 and all(isinstance(n, int) and n >= 2 for n in size)):
        raise InputError(f"data.preparation.{name}={list(size)} must be three whole numbers of voxels, 2 or more.")
