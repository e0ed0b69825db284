"""Cross-validation as a run: which folds there are, the folds still to be done, and their predictions put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.checkpoints import fold_name
from tasks.common.crossval import Fold, Labels, check_folds, make_folds, with_validation
from tasks.common.progress import ProgressBars
from tasks.common.results import AS_TEXT
from tasks.common.runs import Run, global_rank
from tasks.common.splits import read_splits, write_splits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """What a split is made from, one entry per sample.

    Attributes:
        ids: distinct.
        labels: class of each, (n, c) 0/1, or None where nothing is to be spread evenly.
        patients: never on two sides of a split.
        splits: what the user's table says (train, val, test), or None.
        class_names: (c,) of the columns, for messages.
        folds: a cross-validation that the data bring, or None.
    """

    ids: Sequence[str]
    labels: Labels | None
    patients: Sequence[str]
    splits: Sequence[str | None]
    class_names: Sequence[str] | None = None
    folds: Sequence[Fold] | None = None


def plan_folds(samples: Samples, settings: DictConfig, seed: int) -> list[Fold]:
    """The user's splits when given, else stratified folds grouped by patient, for every repeat.

    Args:
        settings: the section ``crossval`` of the configuration.

    Raises:
        InputError: a patient on two sides, too few patients, an unknown id, or a training set of one class.
    """
    ids, labels, patients = samples.ids, samples.labels, samples.patients
    if settings.splits is None and samples.folds is None:
        folds = make_folds(
            ids,
            labels,
            patients,
            num_folds=_parts(settings, patients),
            seed=seed,
            val_fraction=settings.val_fraction,
            repeats=settings.repeats,
            allow_rare=settings.folds == 1,
            group_word="patient",
        )
        if settings.folds == 1:
            folds = [
                replace(fold, index=fold.repeat) for fold in folds if fold.index % (len(folds) // settings.repeats) == 0
            ]
        source = f"crossval.folds={settings.folds}"
    else:
        source = "the folds that come with the data" if settings.splits is None else str(settings.splits)
        if settings.splits is None:
            folds = list(samples.folds or [])
        else:
            folds = [_split_column(samples)] if source == "column" else read_splits(source, ids, need_val=False)
        if settings.val_fraction > 0:
            held: dict[str, Any] = {"val_fraction": settings.val_fraction, "seed": seed}
            folds = [fold if fold.val else with_validation(fold, ids, labels, patients, **held) for fold in folds]
    named: dict[str, Any] = {"source": source, "group_word": "patient", "class_names": samples.class_names}
    for note in check_folds(folds, ids, labels, patients, **named):
        log.warning(note)
    return only_these(folds, settings.only)


def only_these(folds: list[Fold], numbers: Sequence[int] | None) -> list[Fold]:
    """The folds named by ``crossval.only``, or all of them."""
    if numbers is None:
        return folds
    beyond = sorted(set(numbers) - {fold.index for fold in folds})
    if beyond:
        raise InputError(
            f"crossval.only={list(numbers)}: there is no fold {beyond[0]}; there are 0 to {len(folds) - 1}."
        )
    return [fold for fold in folds if fold.index in numbers]


def run_folds(folds: Sequence[Fold], current: Run, run_fold: Callable[[Fold, Path, ProgressBars], None]) -> bool:
    """Call ``run_fold`` for each fold whose ``metrics.json`` is not written yet.

    Returns:
        Whether this process goes on to pool and report; only the first of a distributed run does.
    """
    first = global_rank() == 0
    if first:
        write_splits(folds, current.folder / "splits")
    left = [fold for fold in folds if not (current.folder / fold_name(fold) / "metrics.json").exists()]
    if current.resumed and len(left) < len(folds):
        log.info("%d of %d folds are finished already", len(folds) - len(left), len(folds))
    with ProgressBars() as bars:
        total = bars.add("cross-validation", total=len(left), unit="folds")
        for fold in left:
            run_fold(fold, current.folder / fold_name(fold), bars)
            total.advance(1)
    return first


def read_predictions(folds: Sequence[Fold], folder: Path) -> pd.DataFrame:
    """The predictions of all folds of the run in ``folder``, one table."""
    paths = [folder / fold_name(fold) / "predictions.csv" for fold in folds]
    tables = [pd.read_csv(path, dtype=AS_TEXT, keep_default_na=False) for path in paths]
    return pd.concat(tables, ignore_index=True)


def _parts(settings: DictConfig, patients: Sequence[str]) -> int:
    """Into how many parts the samples are dealt; of a single split, one of them is the test set."""
    test_fraction = settings.get("test_fraction")
    if settings.folds != 1:
        return int(settings.folds)
    if test_fraction is None:
        raise InputError("crossval.folds=1 leaves nothing to test on; use 2 folds or more.")
    if not 0 < test_fraction <= 0.5:
        raise InputError(f"crossval.test_fraction={test_fraction} must be more than 0 and at most 0.5.")
    parts, there = max(2, round(1 / test_fraction)), len(set(patients))
    if there < parts:
        raise InputError(f"crossval.test_fraction={test_fraction} of {there} patients is less than one; raise it.")
    return parts


def _split_column(samples: Samples) -> Fold:
    """The one fold that the Split column of the labels describes."""
    sides: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    usual = {"valid": "val", "validation": "val", "dev": "val", "training": "train", "testing": "test"}
    for case_id, split in zip(samples.ids, samples.splits, strict=True):
        word = usual.get(split or "", split or "")
        if word not in sides:
            raise InputError(f"Split column: case '{case_id}' has '{split or ''}'; use train, val or test.")
        sides[word].append(case_id)
    for word in ("train", "test"):
        if not sides[word]:
            raise InputError(f"Split column: no case is marked '{word}'; crossval.splits=column needs train and test.")
    return Fold(sides["train"], sides["val"], sides["test"])
