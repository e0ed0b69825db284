"""The data pipeline's speed: with and without a cache, and one resampling beside one per operation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from omegaconf import DictConfig, OmegaConf

from tasks.common.bench import BenchRow, median_times
from tasks.common.samplers import EpochSampler
from tasks.qtseg.augmentation import GEOMETRIC, Augmentation, Item, named
from tasks.qtseg.data import ImageSet2D, load_images
from tasks.qtseg.demo import make_images
from tasks.qtseg.loading import SegmentationDataset, Store, make_loader
from tasks.qtseg.preprocessing import Preprocessing

_IMAGES, _SIDE = 24, 512


def rows() -> Iterator[BenchRow]:
    """Training images per second, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        table = make_images(Path(folder) / "set", "lesions", _IMAGES, _SIDE)
        images = load_images(settings_for(table))
        yield from throughput(images, (128, 512))
    yield one_resampling()


def throughput(images: ImageSet2D, sizes: tuple[int, ...], repeats: int = 3) -> Iterator[BenchRow]:
    """With prepared images in memory beside reading files each time, with the paper's augmentation, for each size."""
    for size in sizes:
        stores = {kept: Store(Preprocessing((size, size)), images.coding, kept) for kept in (True, False)}
        for sample in images.samples:
            stores[True].keep(sample, stores[True].get(sample))
        calls: dict[str, Callable[[], object]] = {str(k): partial(run_epoch, images, s) for k, s in stores.items()}
        seconds = median_times(calls, repeats)
        count = len(images.samples)
        yield BenchRow(
            f"QTSeg data pipeline, {size} pixels",
            count / seconds["True"],
            count / seconds["False"],
            "reading and resizing every time",
            unit="images/s",
        )


def run_epoch(images: ImageSet2D, store: Store, augmentation: Augmentation | None = None, workers: int = 0) -> int:
    """One epoch of training batches of 8; how many images there were."""
    dataset = SegmentationDataset(images.samples, store, augmentation or named("paper"))
    loader = make_loader(dataset, 8, EpochSampler(len(dataset), 1), workers)
    return sum(len(batch.position) for batch in loader)


def one_resampling(size: int = 512, count: int = 8) -> BenchRow:
    """All of the paper's operations at once, geometry sampled once, beside one resampling per geometric operation."""
    together = named("paper")
    every = Augmentation(together.operations, len(together.operations), len(together.operations))
    singly = [Augmentation((name,), 1, 1) for name in every.operations]
    image = torch.rand(3, size, size) * 255
    item = Item(image, (image[0] > 128).to(torch.uint8), torch.ones(2, size, size, dtype=torch.uint8))

    def chain(rng: Generator) -> Item:
        now = item
        for one in singly:
            now = one(now, rng)
        return now

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: [every(item, np.random.default_rng(i)) for i in range(count)],
        "chain": lambda: [chain(np.random.default_rng(i)) for i in range(count)],
    }
    seconds = median_times(calls, 3)
    moving = sum(name in GEOMETRIC for name in every.operations)
    return BenchRow(
        f"ten operations, {size} pixels",
        count / seconds["ours"],
        count / seconds["chain"],
        f"{moving} resamplings",
        unit="images/s",
    )


def settings_for(table: Path) -> DictConfig:
    """The section ``data`` that reads a CSV."""
    return OmegaConf.create(
        {"preset": "folders", "path": str(table), "labels": None, "threshold": None, "mask_suffix": None,
         "patient_pattern": None, "polyps": "one"}
    )  # fmt: skip
