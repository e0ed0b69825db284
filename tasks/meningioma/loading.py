"""From files to batches: prepared volumes kept in memory or on disk, and loaders that repeat bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.data.dataset import Dataset as PlainDataset
from monai.transforms.compose import Compose
from monai.transforms.transform import Transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kernels.errors import InputError, unknown_name
from tasks.common.files import cache_folder
from tasks.common.progress import Bar, ProgressBars
from tasks.common.samplers import EpochSampler
from tasks.common.segmentation.batch import Batch
from tasks.meningioma.augmentation import apply
from tasks.meningioma.cases import Case, CaseSet
from tasks.meningioma.checking import stamp_of
from tasks.meningioma.preparation import Preparation, Prepared
from tasks.meningioma.way import Way

_VERSION = 1  # of what is kept on disk


class Prepare(Transform):
    """A case as plain tensors: ``image`` (C, D, H, W) float32, ``label`` (1, D, H, W) uint8, and the way back."""

    def __init__(self, cases: CaseSet, preparation: Preparation) -> None:
        self.cases, self.preparation = cases, preparation
        self.by_id = {case.case_id: case for case in cases.cases}
        self.bar: Bar | None = None

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        case = self.by_id[item["case_id"]]
        prepared = self.preparation.prepare(case.read_images())
        found: dict[str, Any] = {
            "case_id": case.case_id,
            "image": prepared.image,
            "way": prepared.way.as_dict(),
            "notes": list(prepared.notes),
        }
        if case.label is not None:
            found["label"] = torch.from_numpy(prepared.label(self.cases.read_label(case)))[None]
        if self.bar is not None:
            self.bar.advance(1)
        return found


class VolumeStore:
    """All cases of a set, prepared once for every fold.

    Args:
        cache: ``memory``, ``disk`` (in the cache folder, by content and preparation), ``none`` (prepared anew each
            time), or ``auto``: memory where all of them fit into ``budget_gb``, else disk.
        folder: where the disk cache is kept; by default in the cache folder.

    Raises:
        InputError: ``cache`` is none of these, or a file cannot be used.
    """

    def __init__(
        self,
        cases: CaseSet,
        preparation: Preparation,
        cache: str = "auto",
        budget_gb: float = 4.0,
        folder: Path | None = None,
    ) -> None:
        if cache not in ("auto", "memory", "disk", "none"):
            raise unknown_name("data.cache", str(cache), ["auto", "memory", "disk", "none"])
        self.cases, self.preparation = cases, preparation
        self._prepare = Prepare(cases, preparation)
        self._index = {case.case_id: number for number, case in enumerate(cases.cases)}
        if cache == "auto":
            cache = "memory" if self.bytes_of_one() * len(cases.cases) <= budget_gb * 2**30 else "disk"
        self.cache = cache
        items = [{"case_id": case.case_id} for case in cases.cases]
        steps = Compose([self._prepare])
        self._items: Dataset[Any]
        if cache == "memory":
            with ProgressBars() as bars:
                self._prepare.bar = bars.add("preparing volumes", total=len(items), unit="cases", passing=True)
                # Tensors are handed out as they are: nothing that follows changes them in place.
                self._items = CacheDataset(items, steps, num_workers=1, progress=False, copy_cache=False)
                self._prepare.bar = None
        elif cache == "disk":
            place = folder or cache_folder() / "prepared_volumes"
            place.mkdir(parents=True, exist_ok=True)
            self._items = PersistentDataset(items, steps, place, hash_func=self._key, weights_only=True)
        else:
            self._items = PlainDataset(items, steps)

    def __len__(self) -> int:
        return len(self._index)

    def item(self, case_id: str) -> dict[str, Any]:
        """The tensors of :class:`Prepare`; not to be changed in place."""
        found: dict[str, Any] = self._items[self._index[case_id]]
        return found

    def prepared(self, case_id: str) -> Prepared:
        """A case with its way back."""
        item = self.item(case_id)
        return Prepared(item["image"], Way.from_dict(item["way"]), tuple(item["notes"]))

    def bytes_of_one(self) -> int:
        """What the first case takes in memory once prepared."""
        item = self._prepare({"case_id": self.cases.cases[0].case_id})
        return sum(value.numel() * value.element_size() for value in item.values() if isinstance(value, Tensor))

    def _key(self, item: Mapping[str, Any]) -> bytes:
        case: Case = self.cases.cases[self._index[item["case_id"]]]
        about = [
            _VERSION,
            case.case_id,
            [stamp_of(path) for path in case.files()],
            case.channels,
            case.label is not None,
            self.cases.values,
            self.preparation.as_dict(),
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest().encode()


@dataclass(frozen=True)
class Augment:
    """What happens to an item on its way into a batch.

    Attributes:
        crop: gives a list of patches, or None for whole volumes.
        change: random changes of each, or None.
    """

    crop: Compose | None = None
    change: Compose | None = None

    def __call__(self, item: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
        """The patches of an item, or the item itself; everything random follows from ``seed``."""
        parts = [dict(item)] if self.crop is None else apply(self.crop, item, seed)
        if self.change is None:
            return list(parts)
        return [apply(self.change, part, seed + 1 + number) for number, part in enumerate(parts)]


class VolumeDataset(Dataset[list[tuple[Tensor, Tensor, int]]]):
    """Volumes, or patches of them, with their classes; what is random follows from the seed that comes with the index.

    Raises:
        InputError: a case has no label.
    """

    def __init__(self, ids: Sequence[str], store: VolumeStore, augment: Augment | None = None) -> None:
        self.ids, self.store, self.augment = list(ids), store, augment
        without = [case.case_id for case in store.cases.select(self.ids) if case.label is None]
        if without:
            raise InputError(f"case '{without[0]}' has no label and cannot be trained on; take it off the list.")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> list[tuple[Tensor, Tensor, int]]:
        index, seed = index if isinstance(index, tuple) else (index, 0)
        item = self.store.item(self.ids[index])
        parts = {"image": item["image"], "label": item["label"]}
        found = [parts] if self.augment is None else self.augment(parts, seed)
        return [(part["image"], part["label"][0], index) for part in found]


def make_loader(
    dataset: VolumeDataset, batch_size: int, sampler: EpochSampler | None = None, workers: int | str = "auto"
) -> DataLoader[Any]:
    """Batches of ``batch_size`` cases (times the patches of each).

    Raises:
        InputError: the batch size is below 1, or ``workers`` is no number.
    """
    if batch_size < 1:
        raise InputError(f"training.batch_size={batch_size} must be 1 or more.")
    if workers != "auto" and (not isinstance(workers, int) or workers < 0):
        raise InputError(f"data.workers={workers} must be auto or a number of processes, 0 or more.")
    on_gpu = torch.cuda.is_available()
    if workers == "auto":
        count = 0 if not on_gpu and dataset.store.cache == "memory" else min(8, os.cpu_count() or 1)
    else:
        count = int(workers)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=_collate,
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=on_gpu,
    )


def _collate(items: Sequence[list[tuple[Tensor, Tensor, int]]]) -> Batch:
    images, labels, positions = zip(*(part for item in items for part in item), strict=True)
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise InputError(
            f"volumes of the sizes {sorted(sizes)} cannot form one batch; use training.batch_size=1, or patches."
        )
    return Batch(torch.stack(images), torch.stack(labels).long(), torch.tensor(positions))


def measure_loading(
    cases: CaseSet,
    preparation: Preparation,
    augment: Augment | None = None,
    rounds: int = 3,
    folder: Path | None = None,
) -> dict[str, float]:
    """Volumes per second with each cache, after it is filled, by the median of ``rounds`` passes.

    Returns:
        ``none``, ``disk`` and ``memory``, and ``memory_augmented`` where ``augment`` is given.
    """
    ids = [case.case_id for case in cases.labelled]
    rates = {}
    for cache in ("none", "disk", "memory"):
        store = VolumeStore(cases, preparation, cache, folder=folder)
        rates[cache] = _rate(VolumeDataset(ids, store), 1 if cache == "none" else rounds, warm=cache == "disk")
        if cache == "memory" and augment is not None:
            rates["memory_augmented"] = _rate(VolumeDataset(ids, store, augment), rounds)
    return rates


def _rate(dataset: VolumeDataset, rounds: int, warm: bool = False) -> float:
    if warm:
        for number in range(len(dataset)):
            dataset[number]
    seconds = []
    for turn in range(rounds):
        start = time.perf_counter()
        for number in range(len(dataset)):
            dataset[(number, turn)]
        seconds.append(time.perf_counter() - start)
    return len(dataset) / sorted(seconds)[rounds // 2]
