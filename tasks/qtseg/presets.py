"""Public data sets in the folders in which they are handed out, with their published splits.

Every preset also takes the generic folders (see :mod:`tasks.qtseg.layouts`), as many copies are arranged so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.files import safe_id
from tasks.common.images import IMAGE_SUFFIXES
from tasks.common.wording import listed
from tasks.qtseg.data import ImageSet2D, Sample
from tasks.qtseg.layouts import Place, files_below, pair, read_folders
from tasks.qtseg.masks import MaskCoding

Preset = Callable[[Path, DictConfig, MaskCoding], ImageSet2D]


def isic2016(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """ISIC 2016, task 1, skin lesions: 900 training and 379 test images (Gutman et al., arXiv 1605.01397)."""
    parts = [
        (
            side,
            _folder(root, f"ISBI2016_ISIC_Part1_{name}_Data"),
            _folder(root, f"ISBI2016_ISIC_Part1_{name}_GroundTruth"),
        )
        for side, name in (("train", "Training"), ("test", "Test"))
    ]
    if not any(images or masks for _, images, masks in parts):
        return _expect(read_folders(root, settings, _named(coding, "lesion")), {"train": 900, "test": 379})
    samples, problems = [], []
    for side, images, masks in parts:
        if images is None or masks is None:
            problems.append(
                f"{root} lacks ISBI2016_ISIC_Part1_{'Training' if side == 'train' else 'Test'}_Data or _GroundTruth."
            )
            continue
        found, missing = pair(Place(images, masks, None, side), "_Segmentation", settings.patient_pattern)
        samples += [_unprefixed(sample, f"{side}_") for sample in found]
        problems += missing
    return _expect(_result(samples, problems, _named(coding, "lesion")), {"train": 900, "test": 379})


def busi(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """Breast ultrasound images (Al-Dhabyani et al., 2020): 437 benign and 210 malignant, the normal ones left out.

    Published folds: fold k tests the k-th fifth of the sorted file names of either class, whole fifths only (87 and 42
    images), so that the two benign images that are left over are never tested.
    """
    coding = _named(coding, "tumour")
    places = {word: _folder(root, word) for word in ("benign", "malignant")}
    if not all(places.values()):
        return read_folders(root, settings, coding)
    samples, problems = [], []
    for word, folder in places.items():
        assert folder is not None
        found, missing = pair(Place(folder, folder), "_mask", settings.patient_pattern)
        samples += [replace(sample, stratum=word) for sample in found]
        problems += missing
    images = _result(samples, problems, coding)
    folds = _fifths({word: sorted(s.case_id for s in samples if s.stratum == word) for word in places})
    return _expect(replace(images, published=folds), {"": 647})


def bkai(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """BKAI-IGH NeoPolyp (Lan et al., 2021): 1000 images with masks; red is neoplastic, green is not.

    Two classes (polyp) as in most work, or three with ``data.polyps=both``.
    """
    classes = ("background", "polyp") if settings.polyps == "one" else ("background", "non-neoplastic", "neoplastic")
    if settings.polyps not in ("one", "both"):
        raise InputError(
            f"data.polyps={settings.polyps} is not known; use one (polyp) or both (non-neoplastic, neoplastic)."
        )
    hues = MaskCoding("hues", classes)
    # The archive holds every folder in another of the same name.
    images, masks = (_folder(root, f"{name}/{name}") or _folder(root, name) for name in ("train", "train_gt"))
    if images is None or masks is None:
        return _expect(read_folders(root, settings, hues), {"": 1000})
    found, problems = pair(Place(images, masks), settings.mask_suffix, settings.patient_pattern)
    return _expect(_result(found, problems, hues), {"": 1000})


def dsb2018(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """Data Science Bowl 2018, stage 1 (Caicedo et al., Nature Methods 2019): 670 images, a mask per nucleus, merged."""
    coding = _named(coding, "nucleus")
    folder = _folder(root, "stage1_train") or root
    cases = sorted(f.parent for f in folder.glob("*/images") if (f.parent / "masks").is_dir())
    if not cases:
        return read_folders(root, settings, coding)
    samples, problems = [], []
    for case in cases:
        images, masks = (files_below(case / name, IMAGE_SUFFIXES) for name in ("images", "masks"))
        if len(images) != 1 or not masks:
            problems.append(
                f"{case} holds {len(images)} images and {len(masks)} masks; one image and its masks are expected."
            )
            continue
        case_id = safe_id(case.name, str(case))
        samples.append(Sample(case_id, images[0], tuple(masks), patient=case_id))
    return _expect(_result(samples, problems, coding), {"": 670})


def fives(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """FIVES retinal vessels (Jin et al., 2022): 600 training and 200 test images; the letter is the disease."""
    coding = _named(coding, "vessel")
    samples, problems = [], []
    for side in ("train", "test"):
        images, masks = (_folder(root, f"{side}/{name}") for name in ("Original", "Ground truth"))
        if images is None or masks is None:
            return _expect(read_folders(root, settings, coding), {"train": 600, "test": 200})
        found, missing = pair(Place(images, masks, None, side), settings.mask_suffix, settings.patient_pattern)
        samples += [replace(sample, stratum=sample.case_id.rpartition("_")[2]) for sample in found]
        problems += missing
    return _expect(_result(samples, problems, coding), {"train": 600, "test": 200})


def drive(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """DRIVE retinal vessels (Staal et al., 2004): 20 training and 20 test images, scored inside the field of view.

    Of the test images there is a second reader.
    """
    coding = _named(coding, "vessel")
    samples, problems = [], []
    for side, name in (("train", "training"), ("test", "test")):
        folder = _folder(root, name)
        if folder is None:
            return _expect(read_folders(root, settings, coding), {"train": 20, "test": 20})
        if not (folder / "1st_manual").is_dir():
            problems.append(
                f"{folder} has no folder 1st_manual; some copies of DRIVE lack the test masks, get them too."
            )
            continue
        for image in files_below(folder / "images", IMAGE_SUFFIXES):
            number = image.stem.partition("_")[0]
            mask, fov, second = (
                _one(folder / sub, f"{number}_{ending}")
                for sub, ending in (("1st_manual", "manual1"), ("mask", f"{name}_mask"), ("2nd_manual", "manual2"))
            )
            if mask is None or fov is None:
                missing = "1st_manual" if mask is None else "mask"
                problems.append(f"{image} has no partner in {folder / missing}.")
                continue
            case_id = safe_id(image.stem, str(image))
            samples.append(Sample(case_id, image, (mask,), fov, case_id, side, (second,) if second else ()))
    return _expect(_result(samples, problems, coding), {"train": 20, "test": 20})


def chase(root: Path, settings: DictConfig, coding: MaskCoding) -> ImageSet2D:
    """CHASE_DB1 retinal vessels (Fraz et al., 2012): both eyes of 14 children, two readers.

    The usual split: the first 20 images train, the last 8 are tested (children 1 to 10 and 11 to 14).
    """
    coding = _named(coding, "vessel")
    images = [f for f in files_below(root, IMAGE_SUFFIXES) if re.fullmatch(r"Image_\d+[LR]", f.stem, re.I)]
    if not images:
        return read_folders(root, settings, coding)
    samples, problems = [], []
    for image in images:
        masks = [_one(image.parent, f"{image.stem}_{reader}HO") for reader in ("1st", "2nd")]
        if masks[0] is None:
            problems.append(f"{image} has no mask {image.stem}_1stHO beside it.")
            continue
        child = image.stem[6:-1]
        second = (masks[1],) if masks[1] else ()
        side = "train" if int(child) <= 10 else "test"
        samples.append(
            Sample(safe_id(image.stem, str(image)), image, (masks[0],), None, f"child_{child}", side, second)
        )
    return _expect(_result(samples, problems, coding), {"train": 20, "test": 8})


PRESETS: dict[str, Preset] = {
    "isic2016": isic2016,
    "busi": busi,
    "bkai": bkai,
    "dsb2018": dsb2018,
    "fives": fives,
    "drive": drive,
    "chase": chase,
}


def _result(samples: Sequence[Sample], problems: Sequence[str], coding: MaskCoding) -> ImageSet2D:
    if problems:
        raise InputError(listed(problems))
    return ImageSet2D(tuple(sorted(samples, key=lambda s: s.case_id)), coding)


def _expect(images: ImageSet2D, published: dict[str, int]) -> ImageSet2D:
    """With a note for every side whose number of images is not the published one."""
    notes = list(images.notes)
    for side, count in published.items():
        there = sum(not side or s.split == side for s in images.samples)
        if there != count:
            notes.append(f"{there} {side + ' ' if side else ''}images, where the published set has {count}.")
    return replace(images, notes=notes)


def _named(coding: MaskCoding, word: str) -> MaskCoding:
    """Two classes get the data set's word; what the user named stays."""
    return replace(coding, classes=("background", word)) if coding.kind == "binary" else coding


def _fifths(names: dict[str, list[str]]) -> tuple[Fold, ...]:
    everyone = [name for of_class in names.values() for name in of_class]
    folds = []
    for k in range(5):
        tested = [n for of in names.values() for n in of[k * (len(of) // 5) : (k + 1) * (len(of) // 5)]]
        folds.append(Fold(sorted(set(everyone) - set(tested)), [], sorted(tested), k))
    return tuple(folds) if all(fold.test for fold in folds) else ()


def _folder(root: Path, name: str) -> Path | None:
    """``root/name``, or the same below the one folder that an archive was unpacked to."""
    places = [root, *(p for p in root.iterdir() if p.is_dir())]
    return next((place / name for place in places if (place / name).is_dir()), None)


def _one(folder: Path, stem: str) -> Path | None:
    return next(
        (folder / f"{stem}{suffix}" for suffix in IMAGE_SUFFIXES if (folder / f"{stem}{suffix}").is_file()), None
    )


def _unprefixed(sample: Sample, prefix: str) -> Sample:
    patient = sample.patient.removeprefix(prefix) if sample.patient == sample.case_id else sample.patient
    return replace(sample, case_id=sample.case_id.removeprefix(prefix), patient=patient)
