"""Which images there are, which masks belong to them, and how they are split; nothing is decoded here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError, unknown_name
from tasks.common.crossval import Fold, check_folds, with_validation
from tasks.common.folds import Samples, only_these, plan_folds
from tasks.common.wording import listed, quoted
from tasks.qtseg.masks import MaskCoding, coding_of

SIDES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"} | {
    side: side for side in ("train", "val", "test")
}


@dataclass(frozen=True)
class Sample:
    """One image and what was drawn on it.

    Attributes:
        case_id: can be a file name.
        image: the picture.
        masks: one file or several, which are merged.
        fov: mask of the field of view, outside of which nothing counts, or None.
        patient: never on two sides of a split; the case id where none is known.
        split: train, val or test where the data say so, or None.
        second: masks of a second reader, for comparison only.
        stratum: what folds are balanced by, such as benign and malignant, or None.
    """

    case_id: str
    image: Path
    masks: tuple[Path, ...]
    fov: Path | None = None
    patient: str = ""
    split: str | None = None
    second: tuple[Path, ...] = ()
    stratum: str | None = None

    def files(self) -> Iterable[Path]:
        """Every file of the sample."""
        return (self.image, *self.masks, *([self.fov] if self.fov else []), *self.second)


@dataclass(frozen=True)
class ImageSet2D:
    """All images, what their masks mean, and what a reader should know of them.

    Attributes:
        samples: sorted by case id.
        coding: how masks become class indices.
        notes: such as a count that differs from the published one.
        published: the folds of the paper, where they are known.
    """

    samples: tuple[Sample, ...]
    coding: MaskCoding = field(default_factory=MaskCoding)
    notes: list[str] = field(default_factory=list)
    published: tuple[Fold, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, the background first."""
        return self.coding.classes

    def select(self, ids: Sequence[str]) -> list[Sample]:
        """Samples by id, in the order given."""
        by_id = {sample.case_id: sample for sample in self.samples}
        return [by_id[i] for i in ids]

    def fingerprint(self) -> bytes:
        """Names, splits, patients, meaning of the masks and sizes of the files: changes when the data do."""
        rows = [
            [s.case_id, s.patient, s.split, [[f.name, f.stat().st_size if f.is_file() else -1] for f in s.files()]]
            for s in self.samples
        ]
        return hashlib.sha256(json.dumps([self.coding.to_dict(), rows]).encode()).digest()


def load_images(settings: DictConfig) -> ImageSet2D:
    """List the images and masks of ``data.path`` in the layout of ``data.preset``.

    Nothing is opened but a CSV; :func:`tasks.qtseg.checking.check_set` reads the files.

    Raises:
        InputError: the folder, a partner or a column is missing, ids repeat, or a patient is on two sides.
    """
    from tasks.qtseg.layouts import read_folders, read_table_of_images
    from tasks.qtseg.presets import PRESETS

    if settings.preset not in ("folders", *PRESETS):
        raise unknown_name("data.preset", str(settings.preset), ["folders", *PRESETS])
    if settings.path is None:
        raise InputError("data.path is not set; give the folder of the images and masks, or a CSV: data.path=FOLDER.")
    path = Path(settings.path)
    if not path.exists():
        raise InputError(f"data.path={path} does not exist; give a folder of images and masks, or a CSV.")
    labels = None if settings.labels is None else OmegaConf.to_container(settings.labels)
    if labels is not None and not isinstance(labels, dict):
        raise InputError(f"data.labels={labels} must be {{NAME: VALUE, ...}}.")
    coding = coding_of(labels, settings.threshold)  # type: ignore[arg-type]
    if path.is_file() and path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        raise InputError(f"data.path={path} is no CSV; give a folder of images and masks, or a CSV.")
    if path.is_file() and settings.preset != "folders":
        raise InputError(f"data.path={path} is a file; a CSV goes with data.preset=folders.")
    if path.is_file():
        found = read_table_of_images(path, settings, coding)
    elif settings.preset == "folders":
        found = read_folders(path, settings, coding)
    else:
        found = PRESETS[settings.preset](path, settings, coding)
    _check(found.samples, path)
    return found


def folds_of(images: ImageSet2D, cfg: DictConfig) -> list[Fold]:
    """The folds of ``crossval``; a split that the data bring is used unless another is named.

    ``crossval.splits=published`` takes the paper's folds, with ``crossval.val_fraction`` of the rest for validation.

    Raises:
        InputError: there are no published folds, or :func:`tasks.common.folds.plan_folds` refuses the settings.
    """
    settings, samples = cfg.crossval, images.samples
    ids, patients = [s.case_id for s in samples], [s.patient for s in samples]
    names = [s.stratum or "" for s in samples]
    strata = names if len(set(names)) > 1 else None
    if settings.splits == "published":
        if not images.published:
            raise InputError("crossval.splits=published: no folds were published for these data; use crossval.folds=5.")
        folds = [
            with_validation(fold, ids, strata, patients, val_fraction=settings.val_fraction, seed=cfg.seed)
            if settings.val_fraction > 0
            else fold
            for fold in images.published
        ]
        check_folds(folds, ids, strata, patients, source="crossval.splits=published", group_word="patient")
        return only_these(folds, settings.only)
    splits = [s.split for s in samples]
    if settings.splits is None and any(splits):
        settings = OmegaConf.merge(settings, {"splits": "column"})
    return plan_folds(Samples(ids, strata, patients, splits), settings, cfg.seed)


def _check(samples: Sequence[Sample], path: Path) -> None:
    if not samples:
        raise InputError(f"{path} holds no image that has a mask.")
    problems = []
    twice = sorted(name for name, count in Counter(s.case_id for s in samples).items() if count > 1)
    if twice:
        problems.append(f"{path}: {quoted(twice)} name more than one image each; give every image a name of its own.")
    sides: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.split:
            sides[sample.patient].add(sample.split)
    for patient in sorted(p for p, found in sides.items() if len(found) > 1):
        found = " and ".join(sorted(sides[patient]))
        problems.append(f"{path}: patient '{patient}' is in {found}; keep every patient on one side.")
    if problems:
        raise InputError(listed(problems))
