"""Splits that a user brings, in the forms other tools write, and the one form that we write.

Read: CLAM's ``splits_K.csv`` (columns train, val, test that hold ids, ragged) and ``splits_K_bool.csv`` (a row per id,
True or False in each), one file or a folder of them; a table with a ``Split`` column; JSON with ``train``, ``val`` and
``test``, or ``train_names``, ``val_names`` and ``test_names``, one object or a list. Written: ``splits_K.csv``.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from kernels.errors import InputError, nearest_name
from tasks.common.crossval import Fold
from tasks.common.files import atomic_path
from tasks.common.tables import find_column, read_table
from tasks.common.wording import quoted

_SIDES = ("train", "val", "test")
_SIDE_OF_WORD = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"} | {
    s: s for s in _SIDES
}
_BOOLEAN = {"true": True, "false": False, "1": True, "0": False, "": False}


def read_splits(path: str | Path, ids: Collection[str], *, id_column: str = "id", need_val: bool = True) -> list[Fold]:
    """The folds of a file, or of a folder of ``splits_K.csv``, in order of K. Ids in no set are left out of the fold.

    Args:
        path: a CSV or JSON file, or a folder.
        ids: every id there is, as text.
        id_column: the column of ids in a table with a ``Split`` column, whatever its case.
        need_val: refuse a fold without validation ids (see :func:`tasks.common.crossval.with_validation`).

    Raises:
        InputError: the file cannot be understood; an id is unknown, listed twice or in two sets; or a set is empty.
    """
    path = Path(path)
    if path.is_dir():
        folds = [
            fold for index, file in _numbered(path) for fold in _of_table(read_table(file), file, id_column, index)
        ]
        files = [file for _, file in _numbered(path)]
    else:
        folds = _of_json(path) if path.suffix.lower() == ".json" else _of_table(read_table(path), path, id_column)
        files = [path] * len(folds)
    known = set(ids)
    for fold, file in zip(folds, files, strict=True):
        _check_ids(fold, file, known, need_val)
    return folds


def write_splits(folds: Sequence[Fold], directory: str | Path) -> list[Path]:
    """Write ``splits_K.csv`` for each fold, in CLAM's form; :func:`read_splits` gives the same folds again.

    Raises:
        InputError: the folder cannot be written.
    """
    written = []
    for fold in folds:
        target = Path(directory) / f"splits_{fold.index}.csv"
        with atomic_path(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["", *_SIDES])
            for row, members in enumerate(zip_longest(fold.train, fold.val, fold.test, fillvalue="")):
                writer.writerow([row, *members])
        written.append(target)
    return written


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Files ``splits_K.csv`` by K, or ``splits_K_bool.csv`` where there are no others."""
    for pattern in (r"splits_(\d+)\.csv", r"splits_(\d+)_bool\.csv"):
        matches = [(re.fullmatch(pattern, file.name), file) for file in folder.iterdir()]
        found = sorted((int(match[1]), file) for match, file in matches if match)
        if found:
            return found
    raise InputError(f"{folder} holds no split; its files must be called splits_0.csv, splits_1.csv and so on.")


def _of_table(table: pd.DataFrame, path: Path, id_column: str, index: int | None = None) -> list[Fold]:
    if index is None:
        match = re.fullmatch(r"splits_(\d+)(_bool)?\.csv", path.name)
        index = int(match[1]) if match else 0
    by_name = {str(column).lower(): str(column) for column in table.columns}
    if "split" in by_name:
        sets = _of_split_column(table, by_name["split"], find_column(table, id_column, path), path)
    elif {"train", "test"} <= by_name.keys():
        columns = {side: table[by_name[side]] for side in _SIDES if side in by_name}
        words = {value.lower() for column in columns.values() for value in column}
        if words <= _BOOLEAN.keys() and words & {"true", "false"}:
            sets = {side: _marked(table.iloc[:, 0], column) for side, column in columns.items()}
        else:
            sets = {side: [value for value in column if value] for side, column in columns.items()}
    else:
        raise InputError(
            f"{path} is no split: it needs columns train, val and test, or a column Split; it has "
            f"{', '.join(map(str, table.columns))}."
        )
    return [Fold(sets.get("train", []), sets.get("val", []), sets.get("test", []), index)]


def _marked(ids: pd.Series, column: pd.Series) -> list[str]:
    return [i for i, value in zip(ids, column, strict=True) if _BOOLEAN[value.lower()]]


def _of_split_column(table: pd.DataFrame, split_column: str, id_column: str, path: Path) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {side: [] for side in _SIDES}
    for number, (identifier, word) in enumerate(zip(table[id_column], table[split_column], strict=True), start=2):
        if not word:
            continue  # a row that takes no part
        if word.lower() not in _SIDE_OF_WORD:
            raise InputError(f"{path} row {number}: {split_column} '{word}' is none of train, val and test.")
        sets[_SIDE_OF_WORD[word.lower()]].append(identifier)
    return sets


def _of_json(path: Path) -> list[Fold]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from None
    objects = content if isinstance(content, list) else [content]
    if not objects:
        raise InputError(f"{path} is an empty list; it needs an object with train, val and test for each fold.")
    return [_of_object(item, path, index) for index, item in enumerate(objects)]


def _of_object(item: Any, path: Path, index: int) -> Fold:
    sets: dict[str, list[str]] = {}
    for key, value in item.items() if isinstance(item, dict) else ():
        side = _SIDE_OF_WORD.get(str(key).lower().removesuffix("_names"))
        if side is None:
            continue
        if not isinstance(value, list) or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in value):
            raise InputError(f"{path}, fold {index}: '{key}' must be a list of ids in quotes.")
        sets[side] = [str(i).strip() for i in value]
    if not {"train", "test"} <= sets.keys():
        raise InputError(
            f"{path}, fold {index}: expected an object with lists train, val and test (or train_names, val_names and "
            "test_names)."
        )
    return Fold(sets["train"], sets.get("val", []), sets["test"], index)


def _check_ids(fold: Fold, path: Path, known: set[str], need_val: bool) -> None:
    where = f"{path}, fold {fold.index}"
    for side in _SIDES:
        members: list[str] = getattr(fold, side)
        if not members and (side != "val" or need_val):
            raise InputError(f"{where}: the {side} set is empty.")
        twice = [i for i, count in Counter(members).items() if count > 1]
        if twice:
            raise InputError(f"{where}: the {side} set lists {quoted(twice)} more than once.")
        unknown = [i for i in members if i not in known]
        if unknown:
            near = nearest_name(unknown[0], known)
            hint = f" Did you mean '{near}' for the first?" if near else ""
            raise InputError(f"{where}: the {side} set names {quoted(unknown)}, which the cohort does not have.{hint}")
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = [i for i in getattr(fold, a) if i in set(getattr(fold, b))]
        if shared:
            raise InputError(f"{where}: {quoted(shared)} in both the {a} and the {b} set; keep each id in one.")
