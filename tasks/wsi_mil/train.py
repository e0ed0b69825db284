"""``action=train``: cross-validation of a slide classifier, one finished fold at a time, then the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.crossval import Fold, check_folds, make_folds, with_validation
from tasks.common.files import atomic_path
from tasks.common.metrics import classification_metrics
from tasks.common.progress import ProgressBars
from tasks.common.runs import Run, global_rank, open_run
from tasks.common.splits import read_splits, write_splits
from tasks.common.training import Plan, discard_resume_state, first_process, fit
from tasks.wsi_mil.checkpoint import FILE_NAME, Description, SlideClassifier, fold_name, hashed, save_checkpoint
from tasks.wsi_mil.data import (
    BagDataset,
    Case,
    Cohort,
    EpochSampler,
    FeatureCache,
    load_cohort,
    make_cache,
    make_loader,
)
from tasks.wsi_mil.module import Recipe, SlideModule
from tasks.wsi_mil.provenance import read_provenance
from tasks.wsi_mil.report import write_report
from tasks.wsi_mil.results import AS_TEXT, arrays, chosen_attention, predict_cases, summarise
from tasks.wsi_mil.targets import Target, balanced_weights

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Cross-validate on ``data.features`` and ``data.labels`` and write the report; returns ``metrics.json``."""
    # All that can be wrong is found before a run folder is made.
    cohort = load_cohort(cfg.data)
    folds = plan_folds(cohort, cfg)
    _describe_model(cohort, cohort.target, cfg).build()
    if cfg.dry_run:
        return _describe(cohort, folds)
    with open_run(cfg, out, inputs=[Path(cfg.data.labels)]) as current:
        return cross_validate(cohort, folds, cfg, current, make_cache(cohort.cases, cfg.data.cache))


def cross_validate(
    cohort: Cohort, folds: Sequence[Fold], cfg: DictConfig, current: Run, cache: FeatureCache | None
) -> dict[str, Any]:
    """Train and test every fold that is not finished yet, then pool, report and mark the run as finished."""
    if current.finished:
        log.info("this run is finished already: %s", current.folder / "report.html")
        return {**json.loads((current.folder / "metrics.json").read_text()), "folder": str(current.folder)}
    first = global_rank() == 0
    if first:
        write_splits(folds, current.folder / "splits")
    left = [fold for fold in folds if not (current.folder / fold_name(fold) / "metrics.json").exists()]
    if current.resumed and len(left) < len(folds):
        log.info("%d of %d folds are finished already", len(folds) - len(left), len(folds))
    with ProgressBars() as bars:
        total = bars.add("cross-validation", total=len(left), unit="folds")
        for fold in left:
            run_fold(cohort, fold, cfg, current.folder / fold_name(fold), cache, bars)
            total.advance(1)
    if not first:  # of a distributed run; pooling and reporting are one process's work
        return {}
    predictions = pd.concat(
        [
            pd.read_csv(current.folder / fold_name(fold) / "predictions.csv", dtype=AS_TEXT, keep_default_na=False)
            for fold in folds
        ],
        ignore_index=True,
    )
    with atomic_path(current.folder / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    metrics = summarise(predictions, cohort.target, cfg)
    _write_json(current.folder / "metrics.json", metrics)
    write_report(cohort, folds, predictions, metrics, cfg, current.folder, cache)
    _write_json(current.folder / "metrics.json", metrics)
    current.finish()
    log.info("report: %s", current.folder / "report.html")
    return {**metrics, "folder": str(current.folder)}


def run_fold(
    cohort: Cohort, fold: Fold, cfg: DictConfig, folder: Path, cache: FeatureCache | None, bars: ProgressBars
) -> None:
    """Train on one fold, keep the model, and write the predictions for its test bags; ``metrics.json`` comes last."""
    settings = cfg.training
    seed = int(cfg.seed) * 10_007 + fold.index
    torch.manual_seed(seed)
    train, val, test = (cohort.select(ids) for ids in (fold.train, fold.val, fold.test))
    labels = torch.from_numpy(cohort.labels(train))
    target = _with_weights(cohort.target, settings.class_weights, labels)
    description = _describe_model(cohort, target, cfg)
    facts = {
        "fold": fold_name(fold),
        "seed": seed,
        "cases": [hashed(c.case_id) for c in (*train, *val)],
    }
    description.training.update(facts)
    model = description.build()
    dataset = BagDataset(train, settings.max_instances, cache)
    if description.standardise:
        model.fit_scaler(torch.cat([dataset.features(case) for case in train]).float())
    sampler = EpochSampler(len(train), seed, _sampling_weights(settings.sampling, cohort.target, labels))
    loader = make_loader(dataset, settings.batch_size, sampler, cfg.data.workers)
    val_loader = make_loader(BagDataset(val, None, cache), 1, None, cfg.data.workers) if val else None
    select = settings.select if val else "last"
    plan = Plan(settings.epochs, select, settings.patience if val else None, settings.min_epochs, settings.average_from)
    recipe = Recipe(
        settings.lr, settings.min_lr, settings.weight_decay, tuple(settings.betas), settings.epochs,
        settings.warmup_epochs, settings.optimizer,
    )  # fmt: skip
    with bars.add(fold_name(fold), total=settings.epochs, unit="epochs", passing=True) as bar:

        def show(epoch: int, _epochs: int, row: Mapping[str, float]) -> None:
            bar.describe(f"{fold_name(fold)}  {_epoch_note(row)}")
            bar.advance(epoch - bar.done)

        fitted = fit(
            SlideModule(model, target, recipe),
            loader,
            val_loader,
            plan,
            folder,
            OmegaConf.to_container(cfg.trainer, resolve=True),  # type: ignore[arg-type]
            seed=seed,
            sampler=sampler,
            on_epoch=show,
            tensorboard=bool(settings.tensorboard),
        )
    description.training["epoch"] = fitted.epoch
    with first_process() as writes:
        if writes:
            write_fold(
                SlideClassifier([model.cpu()], description),
                fold,
                {"train": train, "val": val, "test": test},
                folder,
                cache,
            )


def write_fold(
    classifier: SlideClassifier,
    fold: Fold,
    sides: Mapping[str, Sequence[Case]],
    folder: Path,
    cache: FeatureCache | None,
) -> None:
    """Model, test predictions and metrics of a fitted fold; with ``metrics.json`` the fold counts as finished."""
    description = classifier.description
    save_checkpoint(folder / FILE_NAME, classifier.models[0], description)
    predictions = predict_cases(classifier, sides["test"], cache)
    predictions.insert(0, "repeat", fold.repeat)
    predictions.insert(1, "fold", fold.index)
    with atomic_path(folder / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    target = classifier.target
    scores = classification_metrics(*arrays(predictions, target), target.kind, target.classes)
    sizes = {name: len(cases) for name, cases in sides.items()}
    _write_json(folder / "metrics.json", {"epoch": description.training["epoch"], "bags": sizes, **scores})
    discard_resume_state(folder)


def plan_folds(cohort: Cohort, cfg: DictConfig) -> list[Fold]:
    """The user's splits when given, else stratified folds grouped by patient, for every repeat.

    Raises:
        InputError: a patient on two sides, too few patients, an unknown id, or a training set of one class.
    """
    settings = cfg.crossval
    ids = [case.case_id for case in cohort.cases]
    patients = [case.patient for case in cohort.cases]
    names = cohort.target.classes
    labels: Any = cohort.labels() if cohort.target.kind == "multilabel" else [names[int(c.label)] for c in cohort.cases]  # type: ignore[arg-type]
    if settings.splits is None:
        folds = make_folds(
            ids,
            labels,
            patients,
            num_folds=settings.folds,
            seed=cfg.seed,
            val_fraction=settings.val_fraction,
            repeats=settings.repeats,
            group_word="patient",
        )
        source = f"crossval.folds={settings.folds}"
    else:
        source = str(settings.splits)
        folds = [_split_column(cohort)] if source == "column" else read_splits(source, ids, need_val=False)
        if settings.val_fraction > 0:
            held = {"val_fraction": settings.val_fraction, "seed": cfg.seed}
            folds = [fold if fold.val else with_validation(fold, ids, labels, patients, **held) for fold in folds]
    for note in check_folds(folds, ids, labels, patients, source=source, group_word="patient"):
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


def _split_column(cohort: Cohort) -> Fold:
    """The one fold that the Split column of the labels describes."""
    sides: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    usual = {"valid": "val", "validation": "val", "dev": "val", "training": "train", "testing": "test"}
    for case in cohort.cases:
        word = usual.get(case.split or "", case.split or "")
        if word not in sides:
            raise InputError(f"Split column: case '{case.case_id}' has '{case.split or ''}'; use train, val or test.")
        sides[word].append(case.case_id)
    for word in ("train", "test"):
        if not sides[word]:
            raise InputError(f"Split column: no case is marked '{word}'; crossval.splits=column needs train and test.")
    return Fold(sides["train"], sides["val"], sides["test"])


def _describe_model(cohort: Cohort, target: Target, cfg: DictConfig) -> Description:
    """What the checkpoints of this cross-validation will say of themselves."""
    return Description(
        dim=cohort.dim,
        attention=chosen_attention(cfg),
        target=target,
        standardise=bool(cfg.model.standardise),
        **read_provenance(cohort.cases[0].bags[0]),
    )


def _with_weights(target: Target, setting: Any, labels: torch.Tensor) -> Target:
    if setting is None:
        return target
    if setting == "balanced":
        return Target(target.kind, target.classes, balanced_weights(target.kind, labels, len(target.classes)))
    weights = tuple(float(w) for w in setting)
    if len(weights) != len(target.classes):
        raise InputError(f"training.class_weights holds {len(weights)} values for {len(target.classes)} classes.")
    return Target(target.kind, target.classes, weights)


def _sampling_weights(setting: str, target: Target, labels: torch.Tensor) -> list[float] | None:
    if setting == "shuffle":
        return None
    if setting != "weighted":
        raise InputError(f"training.sampling={setting} is not known; use shuffle or weighted.")
    if target.kind == "multilabel":
        _, labels = torch.unique(labels, dim=0, return_inverse=True)
    counts = torch.bincount(labels).double()
    return list((1 / counts[labels]).tolist())


def _epoch_note(row: Mapping[str, float]) -> str:
    parts = [f"loss {row['train_loss']:.3f}"] if "train_loss" in row else []
    parts += [f"{name[4:]} {row[name]:.3f}" for name in ("val_auc", "val_f1_macro") if name in row]
    return "  ".join(parts)


def _describe(cohort: Cohort, folds: Sequence[Fold]) -> dict[str, Any]:
    for fold in folds:
        sizes = [len(part) for part in (fold.train, fold.val, fold.test)]
        log.info("%s: %d training, %d validation, %d test bags", fold_name(fold), *sizes)
    log.info("%d bags, %d features each; classes %s", len(cohort.cases), cohort.dim, ", ".join(cohort.target.classes))
    return {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=True))
