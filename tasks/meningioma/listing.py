"""What a layout of files says of a data set, and the pieces that all layouts need."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.files import safe_id
from tasks.meningioma.cases import Case

SIDES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"} | {
    side: side for side in ("train", "val", "test")
}


@dataclass
class Listing:
    """What a layout says of a set.

    Attributes:
        labels: name -> value or values, where the layout defines them.
        channel_names: of the images, where known.
        problems: a sentence for each thing that is wrong.
        folds: the splits that come with it, or None.
    """

    cases: list[Case]
    labels: dict[str, Any] | None = None
    channel_names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    folds: list[Fold] | None = None


def add(listing: Listing, case: Case, where: str | Path) -> None:
    """Append ``case``, or the sentence that its id cannot be a file name."""
    try:
        safe_id(case.case_id, str(where))
    except InputError as error:
        listing.problems.append(str(error))
    else:
        listing.cases.append(case)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from None


def patient_of(name: str, settings: DictConfig) -> str:
    """The part of a case's name that ``data.patient_pattern`` finds, or the name.

    Raises:
        InputError: the pattern is none, or does not match.
    """
    pattern = settings.patient_pattern
    if pattern is None:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise InputError(f"data.patient_pattern={pattern} is no regular expression ({error}).") from error
    if match is None:
        raise InputError(f"data.patient_pattern={pattern} does not match the case '{name}'.")
    return match[1] if match.groups() else match[0]


def below(root: Path, text: str) -> Path | None:
    """``text`` from ``root``; None when it is absolute or has a part ``..``. Links inside may lead anywhere."""
    parts = re.split(r"[/\\]", text)
    if ".." in parts or Path(text).is_absolute() or re.match(r"[A-Za-z]:", text) or "\0" in text:
        return None
    return Path(os.path.normpath(root / text))


def is_visible(path: Path) -> bool:
    """Whether a file or folder is not hidden."""
    return not path.name.startswith(".")
