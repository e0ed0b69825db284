"""Cases: whose volumes there are, their labels, and which of the labels' values are which class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.volumes.reading import read_label, read_volume
from tasks.common.volumes.volume import Volume

Values = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
        case_id: safe as a file name.
        patient: never on two sides of a split; the case id where none is known.
        images: a file (or folder of a DICOM series) for each channel.
        label: the label map, or None.
        split: train, val or test where the data say so, or None.
        date: of the examination, or None.
        channels: which volume of each image's fourth axis; None where it has none.
    """

    case_id: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None = None
    split: str | None = None
    date: date | None = None
    channels: tuple[int | None, ...] = ()

    def read_images(self) -> list[Volume]:
        """The channels.

        Raises:
            InputError: a file cannot be used.
        """
        chosen = self.channels or (None,) * len(self.images)
        return [read_volume(path, channel) for path, channel in zip(self.images, chosen, strict=True)]

    def files(self) -> list[Path]:
        """Every file of the case."""
        return [*self.images, *([self.label] if self.label else [])]


@dataclass(frozen=True)
class CaseSet:
    """All cases and their classes.

    Attributes:
        cases: sorted by id.
        classes: (K,) background first.
        values: (K - 1,) which values of a label map are each class; everything else is background.
        notes: what a reader should know.
        folds: the splits that the data bring, or None.
    """

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    values: Values = ((1,),)
    notes: list[str] = field(default_factory=list)
    folds: tuple[Fold, ...] | None = None

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that can be trained and tested on."""
        return tuple(case for case in self.cases if case.label is not None)

    def select(self, ids: Sequence[str]) -> list[Case]:
        """Cases by id, in the order given."""
        by_id = {case.case_id: case for case in self.cases}
        return [by_id[i] for i in ids]

    def read_label(self, case: Case) -> Volume:
        """The label map of a case as classes 0..K-1, uint8.

        Raises:
            InputError: the case has none, or the file cannot be used.
        """
        if case.label is None:
            raise InputError(f"case '{case.case_id}' has no label.")
        volume = read_label(case.label)
        return Volume(as_classes(volume.data, self.values), volume.affine, volume.path, volume.nifti)

    def fingerprint(self) -> bytes:
        """Ids, patients, splits, classes and file sizes: changes when the data do."""
        rows = [
            [c.case_id, c.patient, c.split, str(c.date), c.channels, [[f.name, size_of(f)] for f in c.files()]]
            for c in self.cases
        ]
        folds = None if self.folds is None else [[fold.train, fold.val, fold.test] for fold in self.folds]
        return hashlib.sha256(json.dumps([self.classes, self.values, folds, rows]).encode()).digest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size


def as_classes(labels: NDArray[Any], values: Values) -> NDArray[np.uint8]:
    """Class numbers of a label map: k where the value is one of ``values[k - 1]``, else 0."""
    if values == ((1,),) and labels.dtype == np.uint8 and labels.max(initial=0) <= 1:
        return labels
    table = np.zeros(max(int(labels.max(initial=0)), *(v for group in values for v in group)) + 1, np.uint8)
    for number, group in enumerate(values, start=1):
        table[list(group)] = number
    return table[labels]


def parse_labels(labels: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], Values]:
    """Class names (background first) and their values from ``{name: value | [values]}``.

    Raises:
        InputError: a value is no whole number, is 0 for a class, or belongs to two classes.
    """
    names: list[str] = []
    values: list[tuple[int, ...]] = []
    owner: dict[int, str] = {}
    for name, given in labels.items():
        group = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        if str(name).lower() == "background":
            if group != [0]:
                raise InputError(f"{where}: background must be 0, not {given}.")
            continue
        if not group or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31 for v in group):
            raise InputError(f"{where}: '{name}: {given}' must be a whole number above 0, or a list of such.")
        for value in group:
            if value in owner:
                raise InputError(
                    f"{where}: value {value} belongs to both '{owner[value]}' and '{name}'; classes must not overlap, "
                    "choose disjoint ones with data.labels."
                )
            owner[value] = str(name)
        names.append(str(name))
        values.append(tuple(group))
    if not names:
        raise InputError(f"{where}: there is no class beside background.")
    if len(names) > 254:
        raise InputError(f"{where}: {len(names)} classes are more than the 254 that a result file can hold.")
    return ("background", *names), tuple(values)
