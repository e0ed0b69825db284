"""A look at every pixel of every file before anything is trained, with all that is wrong told together."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.images import LOSSY
from tasks.common.progress import ProgressBars
from tasks.common.wording import listed, quoted
from tasks.qtseg.data import ImageSet2D, Sample
from tasks.qtseg.loading import Entry, Store, read_sample, read_second

_AT_ONCE = 16  # decoded images must not pile up


@dataclass(frozen=True)
class Checked:
    """What reading every file has shown.

    Attributes:
        pixels: case id -> (K,) pixels of each class at the image's own size.
        sizes: case id -> (height, width) in the file.
        problems: a sentence for each thing that cannot be used.
        notes: what a reader should know.
    """

    pixels: dict[str, NDArray[np.int64]]
    sizes: dict[str, tuple[int, int]]
    problems: list[str]
    notes: list[str]

    def shares(self) -> NDArray[np.float64]:
        """Share of each class in all pixels, (K,)."""
        total = np.sum(list(self.pixels.values()), axis=0)
        return np.asarray(total / max(1, total.sum()))


@dataclass(frozen=True)
class _Look:
    pixels: NDArray[np.int64]
    size: tuple[int, int]
    digest: str
    entry: Entry


def check_set(images: ImageSet2D, store: Store, more: Sequence[str] = (), foreground: bool = True) -> Checked:
    """:func:`check_images` of a whole set, refused with every problem at once.

    Args:
        foreground: every class must have pixels, so that it can be learnt.

    Raises:
        InputError: ``more`` problems, or files that cannot be used.
    """
    checked = check_images(images, store, foreground)
    if problems := [*checked.problems, *more]:
        raise InputError(listed(problems))
    return checked


def check_images(images: ImageSet2D, store: Store, foreground: bool = True) -> Checked:
    """Read every image, mask, field of view and second reading once; none that fails stops the others.

    What is read is kept in ``store`` while there is room.
    """
    pixels: dict[str, NDArray[np.int64]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    problems: list[str] = []
    copies: dict[str, list[Sample]] = defaultdict(list)

    def look(sample: Sample) -> tuple[Sample, _Look | str]:
        try:
            return sample, _look(sample, store, len(images.classes))
        except InputError as error:
            return sample, str(error)

    with ProgressBars() as bars, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = bars.add("checking images", total=len(images.samples), unit="images", passing=True)
        for start in range(0, len(images.samples), _AT_ONCE):
            for sample, found in pool.map(look, images.samples[start : start + _AT_ONCE]):
                if isinstance(found, str):
                    problems.append(found)
                else:
                    pixels[sample.case_id], sizes[sample.case_id] = found.pixels, found.size
                    copies[found.digest].append(sample)
                    store.keep(sample, found.entry)  # here, in order: which are kept must not depend on the threads
                bar.advance(1)
    if foreground and len(pixels) == len(images.samples):
        problems += _missing_classes(images, pixels)
    notes = [*_copies(list(copies.values())), *_empty(pixels), *_lossy(images)]
    return Checked(pixels, sizes, problems, notes)


def _look(sample: Sample, store: Store, classes: int) -> _Look:
    image, label, fov = read_sample(sample, store.coding)
    second = read_second(sample, store.coding)
    if second is not None and second.shape != label.shape:
        raise InputError(f"{sample.second[0]} differs in size from {sample.masks[0].name}, a mask of the same image.")
    if fov is not None and not fov.any():
        raise InputError(f"{sample.fov} is black: nothing of {sample.image.name} would count.")
    digest = hashlib.sha256(image.tobytes() + bytes(str(image.shape), "ascii")).hexdigest()
    entry = store.prepare(sample, image, label, fov)
    return _Look(np.bincount(label.ravel(), minlength=classes), label.shape, digest, entry)


def _missing_classes(images: ImageSet2D, pixels: dict[str, NDArray[np.int64]]) -> list[str]:
    """A class of which no training image has a pixel cannot be learnt."""
    learnt = [s for s in images.samples if s.split in (None, "train", "val")]
    totals = np.sum([pixels[s.case_id] for s in learnt], axis=0)
    where = "training image" if any(s.split for s in images.samples) else "image"
    missing = [name for name, total in zip(images.classes[1:], totals[1:], strict=True) if total == 0]
    if not missing:
        return []
    if len(missing) == len(images.classes) - 1:
        return [f"no {where} has a pixel of the foreground: all masks are empty."]
    return [f"no {where} has a pixel of class {quoted(missing)}; correct data.labels or leave the class out."]


def _empty(pixels: dict[str, NDArray[np.int64]]) -> list[str]:
    empty = [name for name, count in pixels.items() if not count[1:].any()]
    if not empty:
        return []
    have = "1 image has" if len(empty) == 1 else f"{len(empty)} images have"
    return [f"{have} an empty mask: {quoted(empty)}."]


def _lossy(images: ImageSet2D) -> list[str]:
    count = sum(any(mask.suffix.lower() in LOSSY for mask in sample.masks) for sample in images.samples)
    if not count:
        return []
    above = images.coding.threshold if images.coding.threshold is not None else 127
    how = {"binary": f"greys above {above} are foreground", "hues": "told apart by hue"}
    done = how.get(images.coding.kind, "every pixel gets the class of the nearest value")
    return [f"{count} masks are JPEG, whose edges are blurred: {done}."]


def _copies(groups: list[list[Sample]]) -> list[str]:
    ways: tuple[tuple[str, Callable[[Sample], object]], ...] = (
        ("on different sides of the split", lambda s: s.split),
        ("under different patients", lambda s: s.patient),
    )
    for what, of in ways:
        mixed = [group for group in groups if len({of(sample) for sample in group}) > 1]
        if mixed:
            first, second = mixed[0][0], next(s for s in mixed[0] if of(s) != of(mixed[0][0]))
            return [
                f"{len(mixed)} images exist more than once {what}, such as {first.case_id} and {second.case_id}: "
                "results may be too good for them."
            ]
    return []


def summary(images: ImageSet2D, checked: Checked) -> list[str]:
    """Lines that describe the set: how many images, which sizes, how much of each class."""
    heights, widths = zip(*checked.sizes.values(), strict=True)
    span = f"{min(widths)} x {min(heights)} to {max(widths)} x {max(heights)} pixels"
    shares = checked.shares()
    of_class = ", ".join(f"{name} {share:.1%}" for name, share in zip(images.classes, shares, strict=True))
    present = np.sum([count > 0 for count in checked.pixels.values()], axis=0)
    lines = [f"{len(images.samples)} images of {span}", f"share of all pixels: {of_class}"]
    lines += [f"{name}: in {n} images" for name, n in zip(images.classes[1:], present[1:], strict=True)]
    return lines


def roots(images: ImageSet2D) -> set[Path]:
    """Folders that the files lie in; nothing may be written there."""
    return {file.parent for sample in images.samples for file in sample.files()}
