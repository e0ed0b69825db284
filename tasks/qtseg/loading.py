"""From files to batches: prepared images kept in memory, augmentation by seed, epoch and item, and loaders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kernels.errors import InputError, unknown_name
from tasks.common.images import Pixels, read_image, read_mask
from tasks.common.samplers import EpochSampler
from tasks.qtseg.augmentation import Augmentation, Item
from tasks.qtseg.data import Sample
from tasks.qtseg.masks import Labels, MaskCoding, read_labels
from tasks.qtseg.preprocessing import Canvas, Preprocessing, Scale, to_byte_scale

_CACHE_BYTES = 2 * 2**30  # of prepared images, for data.cache=auto
_MARGIN = 0.25  # of a tile's side, cut off again after what moves pixels
_BORDER = 64  # grey of a field of view's mask above which a pixel counts


@dataclass(frozen=True)
class Entry:
    """One prepared sample, as it is kept in memory.

    Attributes:
        canvas: the image at the network's size.
        label: (h, w) uint8 class indices.
        fov: (h, w) uint8 field of view, or None.
        scale: of the intensities of the whole image, where parts of it are trained on, else None.
    """

    canvas: Canvas
    label: Labels
    fov: NDArray[np.uint8] | None
    scale: Scale | None = None

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.canvas.image.nbytes + self.label.nbytes + (0 if self.fov is None else self.fov.nbytes)


class Store:
    """Samples read, decoded and brought to the network's size, kept in memory while they fit.

    Args:
        preprocessing: of the network.
        coding: what masks mean.
        setting: ``data.cache``: auto (2 GB), true (all) or false.
    """

    def __init__(self, preprocessing: Preprocessing, coding: MaskCoding, setting: str | bool = "auto") -> None:
        if setting not in (True, False, "auto"):
            raise unknown_name("data.cache", str(setting), ["auto", "true", "false"])
        self.preprocessing, self.coding = preprocessing, coding
        self._left = float(_CACHE_BYTES) if setting == "auto" else float("inf") if setting else 0.0
        self._kept: dict[str, Entry] = {}

    def get(self, sample: Sample) -> Entry:
        """The prepared sample, from memory if it is there.

        Raises:
            InputError: a file cannot be read, or a mask has another size than its image.
        """
        kept = self._kept.get(sample.case_id)
        return self.prepare(sample, *read_sample(sample, self.coding)) if kept is None else kept

    def prepare(self, sample: Sample, image: Pixels, label: Labels, fov: NDArray[np.uint8] | None) -> Entry:
        """What :func:`read_sample` gave, at the network's size."""
        made = self.preprocessing
        canvas = made.canvas(image)
        scale = None
        if made.resize == "tiles":  # windows of an image are all seen on one scale, also when it is used
            scale = made.scale(to_byte_scale(canvas.image), torch.from_numpy(canvas.inside()))
        return Entry(canvas, made.label_canvas(label), None if fov is None else made.label_canvas(fov), scale)

    def keep(self, sample: Sample, entry: Entry) -> None:
        """Hold a sample for the next time, while there is room."""
        if entry.nbytes <= self._left and sample.case_id not in self._kept:
            self._left -= entry.nbytes
            self._kept[sample.case_id] = entry

    def holds(self, samples: Sequence[Sample]) -> bool:
        """Whether all of these are in memory."""
        return all(sample.case_id in self._kept for sample in samples)


def read_sample(sample: Sample, coding: MaskCoding) -> tuple[Pixels, Labels, NDArray[np.uint8] | None]:
    """Image (H, W, C), class indices (H, W) and field of view (H, W) or None, as they are in the files.

    Raises:
        InputError: a file cannot be read, or sizes differ.
    """
    image = read_image(sample.image)
    label = read_labels(sample.masks, coding)
    _same_size(image, label, sample, sample.masks[0].name)
    fov = None if sample.fov is None else read_fov(sample)
    if fov is not None:
        assert sample.fov is not None
        _same_size(image, fov, sample, sample.fov.name)
    return image, label, fov


def read_second(sample: Sample, coding: MaskCoding) -> Labels | None:
    """Class indices (H, W) of the second reader, or None."""
    return read_labels(sample.second, coding) if sample.second else None


def read_fov(sample: Sample) -> NDArray[np.uint8]:
    """Field of view (H, W): 1 inside.

    Raises:
        InputError: the file cannot be read.
    """
    assert sample.fov is not None
    array = read_mask(sample.fov).array
    array = array if array.ndim == 2 else array.max(2)
    limit = 0 if array.dtype == np.bool_ or int(array.max()) <= _BORDER else _BORDER
    return (array > limit).astype(np.uint8)


class Batch(NamedTuple):
    """What a step of training or validation gets.

    Images (B, C, h, w) float32; target (B, h, w) int64 class indices; valid (B, h, w) bool, False in the padding and
    outside the field of view; position (B,) in the data set.
    """

    images: Tensor
    target: Tensor
    valid: Tensor
    position: Tensor


class SegmentationDataset(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Prepared images; what is random in one follows from the seed that comes with its index.

    Args:
        samples: in order.
        store: where they come from.
        augmentation: for training, else None.
    """

    def __init__(self, samples: Sequence[Sample], store: Store, augmentation: Augmentation | None = None) -> None:
        self.samples, self.store, self.augmentation = list(samples), store, augmentation

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, int]:
        index, seed = index if isinstance(index, tuple) else (index, 0)
        entry, preprocessing = self.store.get(self.samples[index]), self.store.preprocessing
        rng = np.random.default_rng(seed)
        inside = entry.canvas.inside()
        counts = inside if entry.fov is None else inside & (entry.fov > 0)
        image, label, flags = entry.canvas.image, entry.label, np.stack([inside, counts]).astype(np.uint8)
        if self.augmentation is None:
            whole = Item(to_byte_scale(image), torch.from_numpy(label), torch.from_numpy(flags))
            return self._finished(whole, index, entry.scale)
        if preprocessing.resize == "tiles":
            margin = _MARGIN if self.augmentation.moves else 0.0
            image, label, flags = _cut(
                image, label, flags, [round(s * (1 + 2 * margin)) for s in preprocessing.size], rng
            )
        item = Item(to_byte_scale(image), torch.from_numpy(label), torch.from_numpy(flags))
        item = self.augmentation(item, rng)
        item = _centre(item, preprocessing.size) if preprocessing.resize == "tiles" else item
        return self._finished(item, index, entry.scale)

    def _finished(self, item: Item, index: int, scale: Scale | None) -> tuple[Tensor, Tensor, Tensor, int]:
        inside, counts = item.flags.bool()
        return self.store.preprocessing.normalised(item.image, inside, scale), item.label.long(), counts, index


def make_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    sampler: EpochSampler | None = None,
    workers: int | str = "auto",
    together: Callable[[Sequence[tuple[Tensor, Tensor, Tensor, int]]], Any] | None = None,
) -> DataLoader[Any]:
    """Batches; a last batch of a single image is left out of training, where it has no variance.

    Args:
        together: makes a batch of items; :func:`collate` when left out.

    Raises:
        InputError: the batch size or the number of workers cannot be.
    """
    if batch_size < 1:
        raise InputError(f"training.batch_size={batch_size} must be 1 or more.")
    if workers != "auto" and not (isinstance(workers, int) and workers >= 0):
        raise InputError(f"data.workers={workers} must be auto or a number, 0 or more.")
    on_gpu = torch.cuda.is_available()
    if workers == "auto":
        count = 0 if not on_gpu and dataset.store.holds(dataset.samples) else min(8, os.cpu_count() or 1)
    else:
        count = int(workers)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=together or collate,
        drop_last=sampler is not None and len(dataset) > batch_size and len(dataset) % batch_size == 1,
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=on_gpu,
    )


def collate(items: Sequence[tuple[Tensor, Tensor, Tensor, int]]) -> Batch:
    """Images of several sizes are padded right and below to the largest; the padding does not count."""
    images, targets, valid, positions = zip(*items, strict=True)
    return Batch(_stacked(images), _stacked(targets), _stacked(valid), torch.tensor(positions))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    sizes = {tuple(t.shape) for t in tensors}
    if len(sizes) == 1:
        return torch.stack(list(tensors))
    height, width = (max(t.shape[axis] for t in tensors) for axis in (-2, -1))
    full = tensors[0].new_zeros(len(tensors), *tensors[0].shape[:-2], height, width)
    for row, tensor in zip(full, tensors, strict=True):
        row[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return full


def _cut(
    image: Pixels, label: Labels, flags: NDArray[np.uint8], size: Sequence[int], rng: np.random.Generator
) -> tuple[Pixels, Labels, NDArray[np.uint8]]:
    """A tile at a random place, every other time around a pixel of the foreground; padded beyond the image."""
    full = label.shape
    missing = [max(0, side - there) for side, there in zip(size, full, strict=True)]
    if any(missing):
        image, label, flags = (
            np.pad(a, [*[(0, 0)] * (a.ndim - 2), *((m // 2, m - m // 2) for m in missing)])
            for a in (image, label, flags)
        )
    starts = [int(rng.integers(there - side + 1)) for side, there in zip(size, label.shape, strict=True)]
    around, pick = rng.random() < 0.5, rng.random()
    if around and len(spots := np.flatnonzero(label)):
        spot = divmod(int(spots[int(pick * len(spots))]), label.shape[1])
        starts = [
            min(max(0, at - side // 2), there - side) for at, side, there in zip(spot, size, label.shape, strict=True)
        ]
    window = tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))
    return image[:, *window], np.ascontiguousarray(label[window]), np.ascontiguousarray(flags[:, *window])


def _centre(item: Item, size: Sequence[int]) -> Item:
    starts = [(there - side) // 2 for side, there in zip(size, item.label.shape, strict=True)]
    window = tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))
    return Item(item.image[:, *window], item.label[window], item.flags[:, *window])


def _same_size(image: Pixels, mask: NDArray[Any], sample: Sample, name: str) -> None:
    if image.shape[:2] == mask.shape:
        return
    turned = " (turned by its orientation tag)" if image.shape[:2] == mask.shape[::-1] else ""
    raise InputError(
        f"{sample.image} is {image.shape[1]} x {image.shape[0]}{turned}, but its mask {name} is {mask.shape[1]} x "
        f"{mask.shape[0]}; give a mask of the image's size."
    )
