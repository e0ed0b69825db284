"""Finding image and mask files: folders of each, masks beside their images, and CSV files."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.files import safe_id
from tasks.common.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from tasks.common.tables import find_column, read_table
from tasks.common.wording import listed, quoted
from tasks.qtseg.data import SIDES, ImageSet2D, Sample
from tasks.qtseg.masks import MaskCoding

_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "inputs", "input", "original")
_MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "targets",
    "target",
    "ground truth",
    "groundtruth",
    "gt",
    "annotations",
)
_FOV_FOLDERS = ("fov", "fovs", "roi")
_USUAL_SUFFIX = re.compile(
    r"[_\-. ](mask|masks|seg|segmentation|label|labels|gt|groundtruth|target|annotation|manual1?)([_\-. ]?\d+)?$", re.I
)


@dataclass(frozen=True)
class Place:
    """Where images and masks lie.

    Attributes:
        images, masks: folders; the same one when masks lie beside their images.
        fov: folder of the fields of view, or None.
        split: the side that all of it is on, or None.
    """

    images: Path
    masks: Path
    fov: Path | None = None
    split: str | None = None


def read_folders(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """``images`` and ``masks`` (or train, val and test of those, or ``inputs`` and ``targets``), or both in one folder.

    A mask is called as its image, or with ``_mask``, ``_Segmentation`` and the like after it, or with
    ``data.mask_suffix``; several masks of an image (``_mask``, ``_mask_1``) are merged.

    Raises:
        InputError: an image or mask has no partner, or the folders are not understood.
    """
    sides = {SIDES[f.name.lower()]: f for f in _folders(root) if f.name.lower() in SIDES}
    notes: list[str] = []
    if "train" in sides:
        if "test" not in sides and "val" in sides:
            sides = {"train": sides["train"], "test": sides["val"]}
            notes.append("there is no test folder: the results are those of the validation folder.")
        if "test" not in sides:
            raise InputError(
                f"{root} has a train folder but neither test nor val; add one, or set data.path={root}/train."
            )
        places = [_place(folder, side) for side, folder in sides.items()]
    else:
        places = [_place(root, None)]
    samples, problems = [], []
    for place in places:
        found, missing = pair(place, settings.mask_suffix, settings.patient_pattern)
        samples += found
        problems += missing
    if problems:
        raise InputError(listed(problems))
    return ImageSet2D(tuple(sorted(samples, key=lambda s: s.case_id)), coding, notes)


def pair(place: Place, suffix: str | None = None, patient_pattern: str | None = None) -> tuple[list[Sample], list[str]]:
    """Images with their masks, and a sentence for each group of files without a partner.

    Args:
        suffix: what a mask's name has after the image's (a number may follow); None for the usual ones.
        patient_pattern: regular expression whose group is the patient in a file's path below the folder.
    """
    together = place.images == place.masks
    ending = _USUAL_SUFFIX if suffix is None else re.compile(rf"{re.escape(suffix)}([_\-. ]?\d+)?$", re.I)
    images = files_below(place.images, IMAGE_SUFFIXES)
    masks = files_below(place.masks, MASK_SUFFIXES)
    if together:
        masks = [file for file in masks if ending.search(file.stem)]
        images = [file for file in images if not ending.search(file.stem)]
    by_key = {_key(file, place.images): file for file in images}
    problems = []
    if len(by_key) < len(images):
        copies = sorted(set(images) - set(by_key.values()))
        problems.append(f"{place.images} holds two images of one name, such as {copies[0].name}; keep one of them.")
    found: dict[str, list[Path]] = defaultdict(list)
    orphans = []
    for file in masks:
        key = _key(file, place.masks)
        short = ending.sub("", key)
        if not together and suffix is None and key in by_key:
            found[key].append(file)
        elif short in by_key and (short != key or not together):
            found[short].append(file)
        else:
            orphans.append(file.name)
    lonely = [file.name for key, file in by_key.items() if key not in found]
    if lonely:
        hint = " Masks that are called otherwise need data.mask_suffix." if orphans or together else ""
        where = "in the same folder" if together else f"in {place.masks}"
        problems.append(f"{_have(lonely, 'image', place.images)} no mask {where}: {quoted(lonely)}.{hint}")
    if orphans:
        where = "in the same folder" if together else f"in {place.images}"
        problems.append(f"{_have(orphans, 'mask', place.masks)} no image {where}: {quoted(orphans)}.")
    fovs = {} if place.fov is None else {_key(f, place.fov): f for f in files_below(place.fov, MASK_SUFFIXES)}
    if place.fov is not None and (without := [k for k in found if k not in fovs]):
        problems.append(f"{_have(without, 'image', place.images)} no field of view in {place.fov}: {quoted(without)}.")
    samples = []
    for key, paths in found.items():
        name = f"{place.split}_{key}" if place.split else key
        case_id = safe_id(name.replace("/", "_"), str(by_key[key]))
        patient = patient_in(f"{key}{by_key[key].suffix}", case_id, patient_pattern)
        samples.append(Sample(case_id, by_key[key], tuple(sorted(paths)), fovs.get(key), patient, place.split))
    return samples, problems


def read_table_of_images(path: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """A CSV with the columns image, mask and where known patient, split, fov, id, second and stratum.

    Paths start from the CSV's folder and stay in it; several masks of an image stand in several rows, or in one field
    with ``|`` between them.

    Raises:
        InputError: a column or file is missing, a path leads out of the folder, or an id cannot be a file name.
    """
    table = read_table(path)
    root = Path(os.path.normpath(Path.cwd() / path.parent))
    image_column, mask_column = find_column(table, "image", path), find_column(table, "mask", path)
    columns = {str(name).lower(): str(name) for name in table.columns}
    problems: list[str] = []
    merged: dict[str, Sample] = {}
    for number, row in enumerate(table.to_dict("records"), start=2):
        where = f"{path} row {number}"
        given = {key: str(row[columns[key]]) if key in columns else "" for key in ("patient", "split", "id", "stratum")}
        faults = len(problems)
        named = {"image": image_column, "mask": mask_column, "fov": columns.get("fov"), "second": columns.get("second")}
        files = {
            key: [_inside(root, part.strip(), where, problems) for part in str(row[column]).split("|") if part.strip()]
            for key, column in named.items()
            if column
        }
        if not files["image"] or not files["mask"]:
            problems.append(f"{where} has no image or no mask.")
        word = given["split"].lower()
        if word and word not in SIDES:
            problems.append(f"{where}: split '{word}' is none of train, val and test.")
        if len(problems) > faults:
            continue
        image = files["image"][0]
        relative = image.relative_to(root).with_suffix("").as_posix()
        try:
            case_id = safe_id(given["id"] or relative.replace("/", "_"), where)
        except InputError as error:
            problems.append(str(error))
            continue
        patient = given["patient"] or patient_in(relative, case_id, settings.patient_pattern)
        fov = files["fov"][0] if files.get("fov") else None
        sample = Sample(
            case_id, image, tuple(files["mask"]), fov, patient, SIDES.get(word), tuple(files.get("second", [])),
            given["stratum"] or None,
        )  # fmt: skip
        before = merged.get(case_id)
        if before is not None and before.image != image:
            problems.append(f"{where}: id '{case_id}' is that of {before.image.name} too.")
        elif before is not None and set(before.masks) & set(sample.masks):
            problems.append(f"{where} repeats {image.name} with the same mask.")
        elif before is not None and (before.patient, before.split) != (sample.patient, sample.split):
            problems.append(f"{where}: {image.name} has another patient or split than in a row before.")
        elif before is not None:
            merged[case_id] = Sample(**{**before.__dict__, "masks": before.masks + sample.masks})
        else:
            merged[case_id] = sample
    if 0 < sum(s.split is None for s in merged.values()) < len(merged):
        problems.append(f"{path} gives a split for some images only; give one for all or for none.")
    if problems:
        raise InputError(listed(problems))
    return ImageSet2D(tuple(sorted(merged.values(), key=lambda s: s.case_id)), coding)


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with one of the suffixes in the folder and below, sorted; what starts with a dot is left out."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}.")
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def patient_in(path: str, case_id: str, pattern: str | None) -> str:
    """The patient that ``pattern`` finds in a path, or the case id without a pattern."""
    if pattern is None:
        return case_id
    try:
        match = re.search(pattern, path)
    except re.error as error:
        raise InputError(f"data.patient_pattern={pattern} is no regular expression ({error}).") from error
    if match is None:
        raise InputError(f"data.patient_pattern={pattern} does not match the file {path}.")
    return match[1] if match.groups() else match[0]


def _place(root: Path, split: str | None) -> Place:
    by_name = {folder.name.lower(): folder for folder in _folders(root)}

    def first(names: Iterable[str]) -> Path | None:
        return next((by_name[name] for name in names if name in by_name), None)

    # DRIVE's folder called mask holds fields of view, which must not be learnt as if they were vessels.
    if "1st_manual" in by_name:
        raise InputError(f"{root} is arranged as DRIVE is; set data.preset=drive, or name the files in a CSV.")
    several = [name for name in _MASK_FOLDERS if name in by_name]
    if len(several) > 1:
        raise InputError(f"{root} has the folders {quoted(several)}, any of which may hold the masks; use a CSV.")
    images, masks = first(_IMAGE_FOLDERS), first(_MASK_FOLDERS)
    if (images is None) != (masks is None):
        there, what = (images, "masks") if images else (masks, "images")
        raise InputError(
            f"{root} has a folder {there.name if there else ''} but none called {what}; add it, or use a CSV."
        )
    if images is None or masks is None:
        return Place(root, root, None, split)
    return Place(images, masks, first(_FOV_FOLDERS), split)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _key(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _have(names: Sequence[str], word: str, folder: Path) -> str:
    return f"1 {word} in {folder} has" if len(names) == 1 else f"{len(names)} {word}s in {folder} have"


def _inside(root: Path, path: str, where: str, problems: list[str]) -> Path:
    """``path`` as it is written, from ``root``; what leads out or is not there becomes a problem."""
    file = Path(os.path.normpath(root / path))
    if Path(path).is_absolute() or ".." in Path(path).parts or not file.is_relative_to(root):
        problems.append(f"{where}: '{path}' is absolute or lies outside {root}; paths start from there.")
    elif not file.is_file():
        problems.append(f"{where}: there is no file '{path}' in {root}.")
    return file
