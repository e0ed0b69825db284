"""Which images ``input=`` means: files, folders of them, or a CSV."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import InputError
from tasks.common.files import safe_id
from tasks.common.images import IMAGE_SUFFIXES
from tasks.common.tables import find_column, read_table
from tasks.qtseg.layouts import files_below


@dataclass(frozen=True)
class NewImage:
    """One image to segment.

    Attributes:
        name: its results are kept under.
        path: of the file.
    """

    name: str
    path: Path


def find_images(given: Any) -> list[NewImage]:
    """The images, sorted by name.

    Args:
        given: a file, a folder (subfolders too), a CSV (image[, id], paths from its folder), or a list of those.

    Raises:
        InputError: nothing given or found, a path that does not exist, or names that cannot be told apart.
    """
    paths = [given] if isinstance(given, str | Path) else list(given or [])
    if not paths:
        raise InputError("action=predict needs input=PATH: an image, a folder of images, or a CSV.")
    found: list[NewImage] = []
    for path in map(Path, map(str, paths)):
        if not path.exists():
            raise InputError(f"input={path} does not exist; give an image, a folder of images, or a CSV.")
        if path.is_dir():
            files = files_below(path, IMAGE_SUFFIXES)
            found += [_new(file, "_".join(file.relative_to(path).with_suffix("").parts)) for file in files]
        elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
            found += _of_table(path)
        else:
            found.append(_new(path, path.stem))
    if not found:
        named = ", ".join(map(str, paths))
        raise InputError(f"input={named} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}.")
    return _with_distinct_names(found)


def fingerprint_of(images: list[NewImage]) -> bytes:
    """Changes when the images do."""
    rows = [[image.name, str(image.path), image.path.stat().st_size] for image in images]
    return hashlib.sha256(json.dumps(rows).encode()).digest()


def _of_table(path: Path) -> list[NewImage]:
    table = read_table(path)
    column = find_column(table, "image", path)
    ids = next((name for name in table.columns if name.lower() in ("id", "case_id")), None)
    found = []
    for number, row in enumerate(table.to_dict("records"), start=2):
        file = path.parent / row[column]
        if not row[column] or not file.is_file():
            raise InputError(f"{path} row {number}: image '{row[column]}' does not exist.")
        name = row[ids] if ids else file.stem
        found.append(NewImage(safe_id(name, f"{path} row {number}"), file))
    return found


def _new(file: Path, name: str) -> NewImage:
    return NewImage(safe_id(name, str(file)), file)


def _with_distinct_names(images: list[NewImage]) -> list[NewImage]:
    """Images of one name get their file's suffix behind it, as ``a.png`` and ``a.jpg`` differ by nothing else."""
    count = Counter(image.name for image in images)
    renamed = [
        NewImage(safe_id(f"{image.name}_{image.path.suffix[1:].lower()}", str(image.path)), image.path)
        if count[image.name] > 1
        else image
        for image in images
    ]
    twice = [name for name, number in Counter(image.name for image in renamed).items() if number > 1]
    if twice:
        raise InputError(f"input has more than one image called '{twice[0]}'; rename one, or give a CSV with ids.")
    return sorted(renamed, key=lambda image: image.name)
