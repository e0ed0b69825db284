"""Plain folders: one per case, or one of images beside one of labels; also below train, val and test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.volumes.volume import stem_of, suffix_of
from tasks.common.wording import quoted
from tasks.meningioma.cases import Case
from tasks.meningioma.listing import SIDES, Listing, add, is_visible, patient_of

IMAGE_FOLDERS, LABEL_FOLDERS = ("images", "image", "imagestr"), ("labels", "label", "masks", "mask", "labelstr")
IMAGE_NAMES = ("t1c", "t1ce", "t1gd", "t1post", "t1km", "image", "img", "t1", "t1w", "volume", "mri")
LABEL_NAMES = ("seg", "label", "labels", "mask", "segmentation", "dseg", "gt")


def list_folders(root: Path, settings: DictConfig) -> Listing:
    """The cases of folders.

    Raises:
        InputError: there is none.
    """
    if not root.is_dir():
        raise InputError(f"data.path={root} is no folder, which data.format=folders needs.")
    listing = Listing([])
    sides = {SIDES[p.name.lower()]: p for p in _subfolders(root) if p.name.lower() in SIDES}
    if "train" in sides:
        for side, folder in sides.items():
            _one_folder(folder, side, settings, listing)
    else:
        _one_folder(root, None, settings, listing)
    if not listing.cases and not listing.problems:
        raise InputError(
            f"{root} holds no case: give a folder per case with an image and a label (CASE/t1c.nii.gz, "
            "CASE/seg.nii.gz), folders images and labels with equal names, nnU-Net's dataset.json, or a CSV."
        )
    return listing


def _one_folder(root: Path, side: str | None, settings: DictConfig, listing: Listing) -> None:
    there = {p.name.lower(): p for p in _subfolders(root)}
    images = next((there[name] for name in IMAGE_FOLDERS if name in there), None)
    labels = next((there[name] for name in LABEL_FOLDERS if name in there), None)
    if images is not None and labels is not None:
        _two_folders(images, labels, side, settings, listing)
        return
    for folder in there.values():
        _case_folder(folder, side, settings, listing)


def _two_folders(images: Path, labels: Path, side: str | None, settings: DictConfig, listing: Listing) -> None:
    masks = {stem_of(p): p for p in _volumes(labels)}
    files = {stem_of(p): p for p in _volumes(images)}
    numbered: dict[str, list[Path]] = {}
    for stem, path in files.items():
        if stem not in masks and (match := re.fullmatch(r"(.+)_(\d{4})", stem)):
            numbered.setdefault(match[1], []).append(path)
    groups = {stem: [path] for stem, path in files.items() if stem in masks or not re.fullmatch(r".+_\d{4}", stem)}
    groups |= {stem: sorted(paths) for stem, paths in numbered.items()}
    for stem, paths in sorted(groups.items()):
        case = Case(stem, patient_of(stem, settings), tuple(paths), masks.get(stem), side)
        add(listing, case, images)
    if without := [stem for stem in groups if stem not in masks]:
        listing.notes.append(f"{quoted(without)} in {images} have no label of the same name in {labels}.")
    if spare := [p.name for stem, p in masks.items() if stem not in groups]:
        listing.problems.append(f"{labels} holds labels without an image of the same name: {quoted(spare)}.")


def _case_folder(folder: Path, side: str | None, settings: DictConfig, listing: Listing) -> None:
    files = _volumes(folder)
    if not files:
        return
    label_names = [settings.label_name] if settings.label_name else LABEL_NAMES
    marked = [p for p in files if any(_named(p, folder.name, name) for name in LABEL_NAMES)]
    labels = [p for p in files if any(_named(p, folder.name, name) for name in label_names)]
    if len(labels) > 1:
        listing.problems.append(f"{folder} has several labels {_names(labels)}; choose with data.label_name=NAME.")
        return
    rest = [p for p in files if p not in labels and p not in marked]
    if settings.image_names:
        images = []
        for name in settings.image_names:
            match = [p for p in rest if _named(p, folder.name, name)]
            if len(match) != 1:
                listing.problems.append(
                    f"{folder} has {len(match) or 'no'} images called '{name}', which data.image_names asks for; "
                    f"it holds {_names(rest)}."
                )
                return
            images.append(match[0])
    elif len(rest) == 1:
        images = rest
    else:
        preferred = [[p for p in rest if _named(p, folder.name, name)] for name in IMAGE_NAMES]
        images = next((group for group in preferred if len(group) == 1), [])
        if not images:
            listing.problems.append(f"{folder} holds {_names(rest)}; choose the images with data.image_names=[NAME].")
            return
    case = Case(folder.name, patient_of(folder.name, settings), tuple(images), labels[0] if labels else None, side)
    add(listing, case, folder)


def _named(path: Path, case: str, name: str) -> bool:
    """Whether ``name`` is a word of the file's name, once the case's own name is taken off: CASE_t1c.nii.gz is t1c."""
    stem = stem_of(path).lower()
    if stem == name.lower():
        return True
    stem = stem.removeprefix(case.lower())
    words = "_".join(word for word in re.split(r"[^a-z0-9]+", stem) if word)
    return f"_{name.lower()}_".replace("-", "_") in f"_{words}_"


def _volumes(folder: Path) -> list[Path]:
    """Volume files of a folder; of a pair of header and data the header."""
    return sorted(p for p in folder.iterdir() if is_visible(p) and p.is_file() and suffix_of(p) not in (None, ".img"))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and is_visible(p) and not p.name.startswith("__"))


def _names(paths: Sequence[Path]) -> str:
    return quoted([p.name for p in paths]) or "no other volume"
