"""Folders with a ``dataset.json``: nnU-Net's second and first version, and the Medical Segmentation Decathlon's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.volumes.volume import stem_of, suffix_of
from tasks.common.wording import quoted
from tasks.meningioma.cases import Case
from tasks.meningioma.listing import Listing, add, below, is_visible, patient_of, read_json


def list_nnunet(folder: Path, settings: DictConfig) -> Listing:
    """The training cases of ``dataset.json``, with the folds of ``splits_final.json`` where it is there.

    Raises:
        InputError: a file is missing or cannot be understood.
    """
    file = folder / "dataset.json"
    if not file.is_file():
        raise InputError(f"{folder} has no dataset.json, which data.format=nnunet needs.")
    about = read_json(file)
    if not isinstance(about, dict) or not isinstance(about.get("labels"), dict):
        raise InputError(f"{file} is no description of a data set: it needs an object with 'labels' at least.")
    channels = about.get("channel_names") or about.get("modality") or {"0": "image"}
    if not isinstance(channels, dict):
        raise InputError(f"{file}: 'channel_names' must be an object such as {{'0': 'T1'}}.")
    names = tuple(str(channels[key]) for key in sorted(channels, key=str))
    listing = Listing([], _label_values(about["labels"], file), names)
    if any(name.lower() == "ct" for name in names):
        listing.notes.append(f"{file} names a CT channel: clip intensities with data.preparation.window=[low, high].")
    if isinstance(about.get("dataset"), dict):
        _listed_by_name(about["dataset"], folder, file, settings, listing)
    elif isinstance(about.get("training"), list):
        _listed_in_order(about["training"], folder, file, settings, listing)
    else:
        _in_images_tr(folder, str(about.get("file_ending", ".nii.gz")), settings, listing)
    if listing.cases and (unseen := sorted((folder / "imagesTs").glob("*"))):
        listing.notes.append(f"{folder / 'imagesTs'} holds {len(unseen)} files without labels: they are not used.")
    if (splits := folder / "splits_final.json").is_file():
        listing.folds = _folds(splits, {case.case_id for case in listing.cases}, listing)
    return listing


def _folds(file: Path, known: set[str], listing: Listing) -> list[Fold] | None:
    """nnU-Net's validation cases are the ones a fold is judged on: our test set."""
    content = read_json(file)
    sound = isinstance(content, list) and content and all(isinstance(fold, dict) for fold in content)
    if not sound or not all(isinstance(fold.get(side), list) for fold in content for side in ("train", "val")):
        raise InputError(f"{file} must be a list of objects with the lists 'train' and 'val'.")
    folds = []
    for number, fold in enumerate(content):
        train, test = ([str(i) for i in fold[side]] for side in ("train", "val"))
        if not train or not test:
            listing.problems.append(f"{file}, fold {number}: 'train' or 'val' is empty.")
        if strange := sorted({*train, *test} - known):
            listing.problems.append(f"{file}, fold {number} names {quoted(strange)}, which the data set does not have.")
        if both := sorted({*train} & {*test}):
            listing.problems.append(f"{file}, fold {number} has {quoted(both)} in both 'train' and 'val'.")
        folds.append(Fold(train, [], test, number))
    listing.notes.append(f"{file} gives {len(folds)} folds; its validation cases are the test cases of each.")
    return folds


def _label_values(labels: dict[str, Any], file: Path) -> dict[str, Any]:
    if all(re.fullmatch(r"\d+", str(key)) for key in labels):  # the first version: value -> name
        return {str(name): int(value) for value, name in labels.items()}
    if "ignore" in labels:
        raise InputError(f"{file} has an 'ignore' label, which is not supported; choose classes with data.labels.")
    return dict(labels)


def _listed_by_name(entries: dict[str, Any], folder: Path, file: Path, settings: DictConfig, listing: Listing) -> None:
    for name, entry in entries.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list):
            listing.problems.append(f"{file}: 'dataset' entry '{name}' needs a list 'images' and a 'label'.")
            continue
        _add_paths(name, [str(i) for i in images], entry.get("label"), folder, file, settings, listing)


def _listed_in_order(entries: list[Any], folder: Path, file: Path, settings: DictConfig, listing: Listing) -> None:
    for entry in entries:
        image = entry.get("image") if isinstance(entry, dict) else entry
        if isinstance(image, str):
            images = [image]
        elif isinstance(image, list) and image and all(isinstance(i, str) for i in image):
            images = image
        else:
            listing.problems.append(f"{file}: an entry of 'training' has no 'image'.")
            continue
        label = entry.get("label") if isinstance(entry, dict) else None
        name = stem_of(Path(PurePosixPath(label or images[0]).name))
        if len(images) == 1 and not (folder / images[0]).exists():  # nnU-Net's first version leaves out the channel
            base = PurePosixPath(images[0])
            stem, suffix = stem_of(Path(base.name)), suffix_of(Path(base.name)) or ""
            images = [str(base.parent / f"{stem}_{c:04d}{suffix}") for c in range(len(listing.channel_names))]
        _add_paths(name, images, label, folder, file, settings, listing, len(listing.channel_names))


def _add_paths(
    name: str,
    images: Sequence[str],
    label: str | None,
    folder: Path,
    file: Path,
    settings: DictConfig,
    listing: Listing,
    channels: int = 0,
) -> None:
    paths, wrong = [], []
    for text in [*images, *([str(label)] if label else [])]:
        path = below(folder, text)
        if path is None:
            wrong.append(f"{file}: '{text}' lies outside {folder}; paths start from there.")
        elif not path.exists():
            wrong.append(f"{file}: case '{name}': there is no file '{text}'.")
        else:
            paths.append(path)
    if wrong:
        listing.problems.extend(wrong)
        return
    found, mask = (paths[:-1], paths[-1]) if label else (paths, None)
    which: tuple[int | None, ...] = ()
    if len(found) == 1 and channels > 1:  # the decathlon's: all channels in one file
        found, which = found * channels, tuple(range(channels))
    add(listing, Case(name, patient_of(name, settings), tuple(found), mask, channels=which), file)


def _in_images_tr(folder: Path, ending: str, settings: DictConfig, listing: Listing) -> None:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    if not images.is_dir() or not labels.is_dir():
        raise InputError(f"{folder} needs the folders imagesTr and labelsTr beside dataset.json.")
    masks = {p.name[: -len(ending)]: p for p in sorted(labels.iterdir()) if is_visible(p) and p.name.endswith(ending)}
    if not masks:
        raise InputError(f"{labels} holds no label that ends in '{ending}', as dataset.json says they do.")
    used = set()
    for name, mask in masks.items():
        paths = [images / f"{name}_{c:04d}{ending}" for c in range(len(listing.channel_names))]
        used |= set(paths)
        if missing := [path.name for path in paths if not path.is_file()]:
            listing.problems.append(f"case '{name}' has a label but no image {quoted(missing)} in {images}.")
        else:
            add(listing, Case(name, patient_of(name, settings), tuple(paths), mask), labels)
    if spare := [
        p.name for p in sorted(images.iterdir()) if is_visible(p) and p.name.endswith(ending) and p not in used
    ]:
        listing.problems.append(f"{images} holds images without a label: {quoted(spare)}; add labels or remove them.")
