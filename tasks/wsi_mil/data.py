"""From a labels table and feature files to packed bags."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kernels.errors import InputError, unknown_name
from tasks.common.files import safe_id
from tasks.common.samplers import EpochSampler
from tasks.wsi_mil.features import BagInfo, find_bags, read_features
from tasks.wsi_mil.labels import LabelTable, encode_labels, join_features, read_labels, some
from tasks.wsi_mil.targets import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One bag with its label: a slide, or all slides of a patient.

    Attributes:
        case_id: slide id, or patient id when bags are patients.
        patient: never on two sides of a split; the slide id where the table names no patient.
        label: class index, or one 0/1 value per label.
        bags: the feature files whose tiles form the bag.
        split: what the table's Split column says, or None.
    """

    case_id: str
    patient: str
    label: int | tuple[int, ...]
    bags: tuple[BagInfo, ...]
    split: str | None = None

    @property
    def num_tiles(self) -> int:
        return sum(bag.num_tiles for bag in self.bags)


@dataclass(frozen=True)
class Cohort:
    """All cases, what their labels mean, and the size of their features."""

    cases: tuple[Case, ...]
    target: Target
    dim: int

    def labels(self, cases: Sequence[Case] | None = None) -> np.ndarray:
        """Class indices (n,), or a 0/1 matrix (n, labels)."""
        return np.asarray([case.label for case in (self.cases if cases is None else cases)])

    def select(self, ids: Sequence[str]) -> list[Case]:
        """Cases by id, in the order given."""
        by_id = {case.case_id: case for case in self.cases}
        return [by_id[i] for i in ids]


def load_cohort(data: Any) -> Cohort:
    """Read ``data.labels`` and ``data.features`` and join them.

    Raises:
        InputError: one sentence for each kind of fault in either.
    """
    if data.features is None or data.labels is None:
        missing = "data.features=DIR" if data.features is None else "data.labels=labels.csv"
        raise InputError(f"training needs both features and labels; add {missing}.")
    table = read_labels(Path(data.labels), data)
    bags = find_bags(Path(data.features))
    table = join_features(table, bags, Path(data.labels), Path(data.features), data.missing)
    kind, classes, labels = encode_labels(table, data)
    cases = _cases(table, labels, bags, data.bag)
    _check_bags(cases, Path(data.features))
    return Cohort(tuple(cases), Target(kind, classes), cases[0].bags[0].dim)


def _cases(table: LabelTable, labels: list[int | tuple[int, ...]], bags: dict[str, BagInfo], unit: str) -> list[Case]:
    if unit not in ("slide", "patient"):
        raise unknown_name("data.bag", unit, ["slide", "patient"])
    rows = table.rows
    records = list(zip(rows["slide_id"], rows["patient"], rows["split"], labels, strict=True))
    if unit == "slide":
        return [Case(s, p, label, (bags[s],), split or None) for s, p, split, label in records]
    grouped: dict[str, list[tuple[str, str, str, int | tuple[int, ...]]]] = {}
    for record in records:
        grouped.setdefault(safe_id(record[1], "patient column"), []).append(record)
    cases = []
    for patient, members in grouped.items():
        found = {label for *_, label in members}
        if len(found) > 1:
            raise InputError(
                f"patient '{patient}' has slides with different labels; data.bag=patient needs one label each."
            )
        cases.append(Case(patient, patient, members[0][3], tuple(bags[s] for s, *_ in members), members[0][2] or None))
    return cases


def _check_bags(cases: Sequence[Case], features: Path) -> None:
    infos = [bag for case in cases for bag in case.bags]
    empty = [bag.slide_id for bag in infos if bag.num_tiles == 0]
    if empty:
        raise InputError(
            f"{features}: no tiles in the features of {some(empty)}; prepare them again or leave them out."
        )
    dims: dict[int, list[str]] = {}
    for bag in infos:
        dims.setdefault(bag.dim, []).append(bag.slide_id)
    if len(dims) > 1:
        listing = "; ".join(f"{dim}: {some(ids)}" for dim, ids in sorted(dims.items()))
        raise InputError(f"{features}: features of different size cannot be mixed ({listing}).")


class PackedBatch(NamedTuple):
    """B bags one after the other.

    Attributes:
        features: (T, D).
        cu_seqlens: (B + 1,) int64 boundaries.
        target: (B,) class indices or (B, labels).
        position: (B,) of each bag in the data set.
    """

    features: Tensor
    cu_seqlens: Tensor
    target: Tensor
    position: Tensor


class BagDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Bags read from disk when asked for, or from the cache when there is one.

    Args:
        max_instances: draw at most this many tiles of a bag; which ones follows from the index's seed.
        cache: features in memory.
    """

    def __init__(
        self, cases: Sequence[Case], max_instances: int | None = None, cache: FeatureCache | None = None
    ) -> None:
        self.cases = list(cases)
        self.max_instances = max_instances
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        index, seed = index if isinstance(index, tuple) else (index, 0)
        case = self.cases[index]
        features = self.features(case)
        if self.max_instances is not None and len(features) > self.max_instances:
            generator = torch.Generator().manual_seed(seed)
            features = features[torch.randperm(len(features), generator=generator)[: self.max_instances].sort().values]
        return features, torch.tensor(case.label), index

    def features(self, case: Case) -> Tensor:
        """All tiles of a case, (N, D), in the type they are stored in."""
        if self.cache is not None:
            return self.cache.get(case)
        return load_features(case)


class FeatureCache:
    """Features in memory, shared by the data sets of all folds; read once each."""

    def __init__(self) -> None:
        self._bags: dict[str, Tensor] = {}

    def put(self, case: Case, features: Tensor) -> None:
        """Keep features that are in memory already."""
        self._bags[case.case_id] = features

    def get(self, case: Case) -> Tensor:
        """The case's features, read at the first call."""
        if case.case_id not in self._bags:
            self._bags[case.case_id] = load_features(case)
        return self._bags[case.case_id]


def load_features(case: Case) -> Tensor:
    """Features (N, D) of all slides of a case, refused when they hold NaN or infinity."""
    parts = []
    for bag in case.bags:
        features = torch.from_numpy(np.ascontiguousarray(read_features(bag)))
        # A sum is finite exactly when every value is (short of overflow, which double cannot reach here).
        if not torch.isfinite(features.sum(dtype=torch.float64)):
            rows = int((~torch.isfinite(features).all(1)).sum())
            raise InputError(
                f"{bag.path}: {rows} of {len(features)} tiles of slide '{bag.slide_id}' have NaN or infinite features; "
                "prepare the slide again or leave it out."
            )
        parts.append(features)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def make_cache(cases: Sequence[Case], setting: str | bool) -> FeatureCache | None:
    """A cache when ``data.cache`` asks for one, or is 'auto' and the cohort takes less than half of the free memory."""
    if setting is True or setting is False:
        return FeatureCache() if setting else None
    if setting != "auto":
        raise unknown_name("data.cache", str(setting), ["auto", "true", "false"])
    size = sum(case.num_tiles * bag.dim * 4 for case in cases for bag in case.bags[:1])
    return FeatureCache() if size < free_memory_bytes() / 2 else None


def free_memory_bytes() -> int:
    """Memory that can still be taken, bytes; a cautious 4 GB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def pack(items: Sequence[tuple[Tensor, Tensor, int]]) -> PackedBatch:
    """Collate bags into one packed batch; nothing is padded."""
    features = [item[0] for item in items]
    lengths = torch.tensor([0, *(len(f) for f in features)])
    joined = features[0] if len(features) == 1 else torch.cat(features)
    return PackedBatch(
        joined, lengths.cumsum(0), torch.stack([item[1] for item in items]), torch.tensor([item[2] for item in items])
    )


def make_loader(
    dataset: BagDataset, batch_size: int, sampler: EpochSampler | None = None, workers: int | str = "auto"
) -> DataLoader[Any]:
    """Batches of packed bags; worker processes read ahead when the features are not in memory."""
    count = min(4, os.cpu_count() or 1) if workers == "auto" else int(workers)
    count = 0 if dataset.cache is not None else count
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=pack,
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=torch.cuda.is_available(),
    )
