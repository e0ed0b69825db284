"""Which images there are, what they are called, and a check of every one of them before anything is trained."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.classification.images import SUFFIXES
from tasks.common.tables import find_column, read_table
from tasks.common.weighted_metrics import Kind
from tasks.common.wording import listed, quoted

SIDES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"} | {
    side: side for side in ("train", "val", "test")
}


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        case_id: its path below the data folder, with slashes.
        path: the file.
        label: class index.
        patient: never on two sides of a split; the case id where none is known.
        split: train, val or test where the data say so, or None.
    """

    case_id: str
    path: Path
    label: int
    patient: str
    split: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """All images and their classes; fulfils :class:`tasks.common.results.Classified`."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        return "binary" if len(self.classes) == 2 else "multiclass"

    def labels(self, samples: Sequence[Sample] | None = None) -> NDArray[np.int64]:
        """Class indices (n,)."""
        return np.array([sample.label for sample in (self.samples if samples is None else samples)], np.int64)

    def select(self, ids: Sequence[str]) -> list[Sample]:
        """Samples by id, in the order given."""
        by_id = {sample.case_id: sample for sample in self.samples}
        return [by_id[i] for i in ids]

    def fingerprint(self) -> bytes:
        """Names, labels, patients, splits and file sizes: changes when the data do."""
        rows = [[s.case_id, s.label, s.patient, s.split, s.path.stat().st_size] for s in self.samples]
        return hashlib.sha256(json.dumps([self.classes, rows]).encode()).digest()


def load_images(settings: DictConfig) -> ImageSet:
    """List the images of ``data.path``: a folder of class folders, of train/val/test folders of those, or a CSV.

    Nothing is opened but the CSV; :func:`tasks.classification.loading.check_images` reads the images.

    Raises:
        InputError: the path or a column is missing, a class is empty, or a path leads out of the CSV's folder.
    """
    if settings.path is None:
        raise InputError("data.path is not set; give a folder with one folder per class, or a CSV: data.path=FOLDER.")
    path = Path(settings.path)
    if not path.exists():
        raise InputError(
            f"data.path={path} does not exist; give a folder with one subfolder per class, or a CSV with the columns "
            "path and label."
        )
    rows, notes = (_of_table(path, settings), []) if path.is_file() else _of_folder(path, settings.patient_pattern)
    classes = _classes(settings.classes, {row.label for row in rows}, path)
    index = {name: position for position, name in enumerate(classes)}
    samples = [
        Sample(row.case_id, row.path, index[row.label], row.patient, row.split) for row in rows if row.label in index
    ]
    return ImageSet(tuple(sorted(samples, key=lambda s: s.case_id)), classes, notes)


def refuse_rare(images: ImageSet, folds: int) -> list[str]:
    """One sentence for each class with too few images or patients for ``folds`` folds (2 for a single split)."""
    needed = max(2, folds)
    patients: dict[int, set[str]] = defaultdict(set)
    for sample in images.samples:
        patients[sample.label].add(sample.patient)
    count = Counter(sample.label for sample in images.samples)
    why = f" for crossval.folds={folds}" if folds > 2 else ""
    problems = []
    for position, name in enumerate(images.classes):
        if count[position] < needed:
            problems.append(
                f"class '{name}' has {_counted(count[position], 'image')}; {needed} are needed at least{why}."
            )
        elif len(patients[position]) < 2:
            problems.append(f"class '{name}' comes from one patient; it could not be tested on another.")
    return problems


@dataclass(frozen=True)
class _Row:
    case_id: str
    path: Path
    label: str
    patient: str
    split: str | None


def _of_folder(root: Path, patient_pattern: str | None) -> tuple[list[_Row], list[str]]:
    folders = _subfolders(root)
    notes = []
    if any(SIDES.get(folder.name.lower()) == "train" for folder in folders):
        strange = [folder.name for folder in folders if folder.name.lower() not in SIDES]
        if strange:
            raise InputError(f"{root} holds {quoted(strange)} beside train; keep only train, val and test there.")
        sides = {SIDES[folder.name.lower()]: folder for folder in folders}
        if "test" not in sides and "val" in sides:
            sides = {"train": sides["train"], "test": sides["val"]}
            notes.append("there is no test folder: the results are those of the val folder.")
        places = [(side, folder) for side, top in sides.items() for folder in _subfolders(top)]
        if "test" not in sides:
            raise InputError(
                f"{root} has a train folder but neither test nor val; add one, or set data.path={root}/train."
            )
    else:
        places = [(None, folder) for folder in folders]  # type: ignore[misc]
    if not places:
        raise InputError(f"data.path={root} has no folders; put the images of each class into a folder of its name.")
    rows, empty = [], []
    for side, folder in places:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            empty.append(f"class folder {folder} holds no image ({', '.join(SUFFIXES)}).")
        for file in files:
            case_id = file.relative_to(root).as_posix()
            rows.append(_Row(case_id, file, folder.name, _patient_in(file.name, case_id, patient_pattern), side))
    if empty:
        raise InputError(" ".join(empty))
    return rows, notes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _patient_in(name: str, case_id: str, pattern: str | None) -> str:
    if pattern is None:
        return case_id
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise InputError(f"data.patient_pattern={pattern} is no regular expression ({error}).") from error
    if match is None:
        raise InputError(f"data.patient_pattern={pattern} does not match the file name {name}.")
    return match[1] if match.groups() else match[0]


def _of_table(path: Path, settings: DictConfig) -> list[_Row]:
    table = read_table(path)
    root = Path.cwd() / path.parent
    columns = {str(name).lower(): str(name) for name in table.columns}
    path_column = find_column(table, "path", path)
    label_column = find_column(table, settings.label_column, path, "data.label_column=NAME")
    patient_column, split_column = columns.get(settings.patient_column.lower()), columns.get("split")
    rows, problems = [], []
    for number, row in enumerate(table.to_dict("records"), start=2):
        file = _below(root, row[path_column])
        word = row[split_column].lower() if split_column else ""
        if not row[path_column] or not row[label_column]:
            problems.append(f"{path} row {number} has no path or no label.")
        elif file is None:
            problems.append(f"{path} row {number}: '{row[path_column]}' lies outside {root}; paths start from there.")
        elif not file.is_file():
            problems.append(f"{path} row {number}: there is no file '{row[path_column]}' in {root}.")
        elif split_column and word not in SIDES:
            problems.append(f"{path} row {number}: {split_column} '{word}' is none of train, val and test.")
        else:
            case_id = file.relative_to(os.path.normpath(root)).as_posix()
            patient = (row[patient_column] if patient_column else "") or case_id
            rows.append(_Row(case_id, file, row[label_column], patient, SIDES[word] if split_column else None))
    twice = [name for name, count in Counter(row.case_id for row in rows).items() if count > 1]
    if twice:
        problems.append(f"{path} names {quoted(twice)} more than once.")
    if problems:
        raise InputError(listed(problems))
    return rows


def _below(root: Path, path: str) -> Path | None:
    """``path`` as it is written, from ``root``; None when it leads out. Links inside may lead anywhere."""
    file = Path(os.path.normpath(root / path))
    return file if file.is_relative_to(os.path.normpath(root)) else None


def _classes(given: Sequence[str] | None, found: set[str], path: Path) -> tuple[str, ...]:
    if given is None:
        classes = tuple(sorted(found))
    else:
        classes = tuple(str(name) for name in given)
        if missing := [name for name in classes if name not in found]:
            raise InputError(f"data.classes names {quoted(missing)}, of which {path} holds nothing.")
    if len(classes) < 2:
        raise InputError(f"{path} holds one class only, {quoted(sorted(found))}; at least two are needed.")
    return classes


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
