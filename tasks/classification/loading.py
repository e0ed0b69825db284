"""From files to batches: a checked cache of decoded images, timm's augmentation, loaders that repeat bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kernels.errors import InputError, unknown_name
from tasks.classification.data import ImageSet, Sample
from tasks.classification.images import Pixels, read_image
from tasks.common.progress import ProgressBars
from tasks.common.samplers import EpochSampler
from tasks.common.wording import listed

_CACHE_BYTES = 2 * 2**30  # of decoded images, for data.cache=auto


@dataclass(frozen=True)
class Preprocessing:
    """What happens to every image before the network sees it.

    Attributes:
        img_size: side of the square the network sees, pixels.
        mean, std: per channel, for intensities in [0, 1].
        crop_mode: ``center`` (shorter side to ``img_size``, centre cut out), ``squash`` (both sides), ``border``
            (longer side, the rest filled with the mean).
        interpolation: timm's name.
        window: intensities of 16-bit images that become black and white, or None.
    """

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    window: tuple[float, float] | None = None

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """For evaluation: an RGB image to (3, img_size, img_size), normalised."""
        return create_transform(
            (3, self.img_size, self.img_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=1.0,
            crop_mode=self.crop_mode,
        )

    def augmentation(self, settings: DictConfig) -> Callable[[Image.Image], Tensor]:
        """For training, by the section ``augment`` of the configuration.

        Raises:
            InputError: timm refuses a setting.
        """
        try:
            return create_transform(
                (3, self.img_size, self.img_size),
                is_training=True,
                scale=tuple(settings.scale),
                ratio=tuple(settings.ratio),
                hflip=settings.hflip,
                vflip=settings.vflip,
                color_jitter=settings.color_jitter or None,  # type: ignore[arg-type]
                auto_augment=settings.auto_augment,
                re_prob=settings.random_erasing,
                re_mode=settings.erasing_mode,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
            )
        except (AssertionError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise InputError(f"augment cannot be used as it is set ({str(error) or type(error).__name__}).") from error


class Images:
    """Decoded images by sample, read once and kept when they fit."""

    def __init__(self, window: Sequence[float] | None, setting: str | bool = "auto") -> None:
        if setting not in (True, False, "auto"):
            raise unknown_name("data.cache", str(setting), ["auto", "true", "false"])
        self.window = window
        self._left = float(_CACHE_BYTES) if setting == "auto" else float("inf") if setting else 0.0
        self._kept: dict[str, Pixels] = {}

    def get(self, sample: Sample) -> Pixels:
        """RGB (H, W, 3) uint8.

        Raises:
            InputError: the file cannot be read.
        """
        if sample.case_id not in self._kept:
            return read_image(sample.path, self.window)
        return self._kept[sample.case_id]

    def keep(self, sample: Sample, image: Pixels) -> None:
        """Hold a decoded image for the next time, while there is room."""
        if image.nbytes <= self._left and sample.case_id not in self._kept:
            self._left -= image.nbytes
            self._kept[sample.case_id] = image

    def holds(self, samples: Sequence[Sample]) -> bool:
        """Whether all of these are in memory."""
        return all(sample.case_id in self._kept for sample in samples)


@dataclass(frozen=True)
class Checked:
    """What reading every image has shown.

    Attributes:
        colours: case id -> mean of red, green and blue, (3,) in [0, 1].
        problems: a sentence for each file that cannot be used.
        notes: what a reader should know, such as copies under two labels.
    """

    colours: dict[str, NDArray[np.float64]]
    problems: list[str]
    notes: list[str]


def check_images(samples: Sequence[Sample], images: Images) -> Checked:
    """Read every image once, completely; none that cannot be read stops the others from being looked at."""
    found: dict[str, NDArray[np.float64]] = {}
    problems: list[str] = []
    copies: dict[str, list[Sample]] = defaultdict(list)

    def look(sample: Sample) -> tuple[Sample, Pixels | str, str]:
        try:
            image = images.get(sample)
        except InputError as error:
            return sample, str(error), ""
        return sample, image, hashlib.sha256(image.tobytes() + bytes(str(image.shape), "ascii")).hexdigest()

    with ProgressBars() as bars, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = bars.add("checking images", total=len(samples), unit="images", passing=True)
        for start in range(0, len(samples), 256):  # a window at a time: decoded images must not pile up
            for sample, image, digest in pool.map(look, samples[start : start + 256]):
                if isinstance(image, str):
                    problems.append(image)
                else:
                    found[sample.case_id] = image.mean((0, 1)) / 255
                    copies[digest].append(sample)
                    images.keep(sample, image)
                bar.advance(1)
    return Checked(found, problems, _copies(list(copies.values())))


def _copies(groups: list[list[Sample]]) -> list[str]:
    notes = []
    for what, of in (("labels", lambda s: s.label), ("sides of the split", lambda s: s.split), ("patients", _owner)):
        mixed = [group for group in groups if len({of(sample) for sample in group}) > 1]
        if mixed:
            first, second = mixed[0][0], next(s for s in mixed[0] if of(s) != of(mixed[0][0]))
            notes.append(
                f"{len(mixed)} images exist more than once under different {what}, such as {first.case_id} and "
                f"{second.case_id}: results may be too good or too bad for them."
            )
    return notes


def _owner(sample: Sample) -> str:
    return sample.patient


class Batch(NamedTuple):
    """Images (B, 3, S, S), classes (B,), positions in the data set (B,)."""

    images: Tensor
    target: Tensor
    position: Tensor


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Transformed images; what is random in one follows from the seed that comes with its index."""

    def __init__(self, samples: Sequence[Sample], images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples, self.images, self.transform = list(samples), images, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = index if isinstance(index, tuple) else (index, 0)
        sample = self.samples[index]
        image = Image.fromarray(self.images.get(sample))
        with seeded(seed):
            return self.transform(image), sample.label, index


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything random inside follows from ``seed``; the generators of Python, NumPy and torch go on as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generators that timm uses)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def make_loader(
    dataset: ImageDataset, batch_size: int, sampler: EpochSampler | None = None, workers: int | str = "auto"
) -> DataLoader[Any]:
    """Batches of images; a last batch of a single image is left out of training, where it has no variance."""
    if batch_size < 1:
        raise InputError(f"training.batch_size={batch_size} must be 1 or more.")
    on_gpu = torch.cuda.is_available()
    if workers == "auto":
        count = 0 if not on_gpu and dataset.images.holds(dataset.samples) else min(8, os.cpu_count() or 1)
    else:
        count = int(workers)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=_collate,
        drop_last=sampler is not None and len(dataset) > batch_size and len(dataset) % batch_size == 1,
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=on_gpu,
    )


def _collate(items: Sequence[tuple[Tensor, int, int]]) -> Batch:
    images, targets, positions = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(positions))


def check_set(images: ImageSet, store: Images, more: Sequence[str] = ()) -> Checked:
    """:func:`check_images` of a whole set, refused with every problem at once.

    Raises:
        InputError: ``more`` problems, or files that cannot be used.
    """
    checked = check_images(images.samples, store)
    if problems := [*checked.problems, *more]:
        raise InputError(listed(problems))
    return checked
