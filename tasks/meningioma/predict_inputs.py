"""Which scans ``input=`` means: files, DICOM folders, folders of either, or a CSV with patients and dates."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.common.files import safe_id
from tasks.common.volumes.volume import SUFFIXES, stem_of, suffix_of
from tasks.common.wording import listed
from tasks.meningioma.cases import Case, size_of
from tasks.meningioma.layout_table import list_table
from tasks.meningioma.listing import is_visible


def find_scans(given: Any, channels: int = 1) -> list[Case]:
    """The scans, each with a name that its results are kept under.

    Args:
        given: a file or DICOM folder, a folder of volumes or DICOM folders, a CSV (case_id, image[, image2, ...]
            [, patient][, date]), or a list of files.
        channels: of the network; more than 1 needs a CSV, or a folder of nnU-Net's names (CASE_0000, CASE_0001, ...).

    Raises:
        InputError: nothing given or found, a path that does not exist, or scans that have not as many channels.
    """
    paths = [given] if isinstance(given, str | Path) else list(given or [])
    if not paths:
        raise InputError("action=predict needs input=PATH: a volume, a DICOM folder, a folder of those, or a CSV.")
    scans: list[Case] = []
    for path in map(Path, map(str, paths)):
        if not path.exists():
            raise InputError(
                f"input={path} does not exist; give a volume, a DICOM folder, a folder of those, or a CSV."
            )
        if path.suffix.lower() == ".csv":
            scans += _of_table(path)
        elif path.is_dir():
            scans += _of_folder(path, channels)
        else:
            scans.append(_scan(path))
    if not scans:
        named = ", ".join(map(str, paths))
        raise InputError(f"input={named} holds no volume; looked for {', '.join(SUFFIXES)} and DICOM series.")
    for scan in scans:
        if len(scan.images) != channels:
            raise InputError(
                f"scan '{scan.case_id}' has {len(scan.images)} channels, the checkpoint needs {channels}; give a CSV "
                "with the columns image, image2, ... or files named CASE_0000, CASE_0001, ..."
            )
    return _with_distinct_names(scans)


def fingerprint_of(scans: list[Case]) -> bytes:
    """Changes when the scans do."""
    rows = [[scan.case_id, [[str(file), size_of(file)] for file in scan.images]] for scan in scans]
    return hashlib.sha256(json.dumps(rows).encode()).digest()


def _of_table(path: Path) -> list[Case]:
    listing = list_table(path, OmegaConf.create({"patient_pattern": None}))
    if listing.problems:
        raise InputError(listed(listing.problems))
    return list(listing.cases)


def _of_folder(folder: Path, channels: int) -> list[Case]:
    volumes = sorted(p for p in folder.iterdir() if p.is_file() and is_visible(p) and suffix_of(p) is not None)
    if volumes and channels > 1:
        by_case: dict[str, list[Path]] = {}
        for file in volumes:
            by_case.setdefault(stem_of(file).rpartition("_")[0], []).append(file)
        return [_scan(files[0], name, tuple(files)) for name, files in by_case.items()]
    found = [_scan(file) for file in volumes]
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and is_visible(p))
    for place in inner:
        found += _of_folder(place, channels)
    if not found and any(p.is_file() and is_visible(p) for p in folder.iterdir()):
        found.append(_scan(folder))  # files without a known suffix are a DICOM series, or the reader says what is wrong
    return found


def _scan(path: Path, name: str = "", images: tuple[Path, ...] = ()) -> Case:
    called = name or (path.resolve().name if path.is_dir() else stem_of(path))
    called = safe_id(called, str(path))
    return Case(called, called, images or (path,))


def _with_distinct_names(scans: list[Case]) -> list[Case]:
    """Scans of one name in several folders get the folder's name in front."""
    count = Counter(scan.case_id for scan in scans)
    found = []
    for scan in scans:
        name = scan.case_id
        if count[name] > 1:
            name = safe_id(f"{scan.images[0].resolve().parent.name}_{name}", str(scan.images[0]))
        found.append(Case(name, scan.patient, scan.images, date=scan.date, channels=scan.channels))
    twice = [name for name, number in Counter(scan.case_id for scan in found).items() if number > 1]
    if twice:
        raise InputError(f"input has more than one scan called '{twice[0]}'; rename one, or give a CSV with case_id.")
    return found
