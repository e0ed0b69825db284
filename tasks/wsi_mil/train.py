"""``action=train``: cross-validation of a slide classifier, one finished fold at a time, then the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.balance import balanced_weights, sampling_weights
from tasks.common.checkpoints import FILE_NAME, fold_name, hashed
from tasks.common.crossval import Fold
from tasks.common.files import atomic_path, write_json
from tasks.common.folds import Samples, read_predictions, run_folds
from tasks.common.folds import plan_folds as common_folds
from tasks.common.metrics import classification_metrics
from tasks.common.optimisation import Recipe
from tasks.common.progress import ProgressBars
from tasks.common.results import arrays
from tasks.common.runs import Run, open_run
from tasks.common.samplers import EpochSampler
from tasks.common.training import Plan, discard_resume_state, first_process, fit
from tasks.wsi_mil.checkpoint import Description, SlideClassifier, save_checkpoint
from tasks.wsi_mil.data import (
    BagDataset,
    Case,
    Cohort,
    FeatureCache,
    load_cohort,
    make_cache,
    make_loader,
)
from tasks.wsi_mil.module import SlideModule
from tasks.wsi_mil.provenance import read_provenance
from tasks.wsi_mil.report import write_report
from tasks.wsi_mil.results import chosen_attention, predict_cases, summarise
from tasks.wsi_mil.targets import Target

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

    def train_one(fold: Fold, folder: Path, bars: ProgressBars) -> None:
        run_fold(cohort, fold, cfg, folder, cache, bars)

    if not run_folds(folds, current, train_one):
        return {}
    predictions = read_predictions(folds, current.folder)
    with atomic_path(current.folder / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    metrics = summarise(predictions, cohort.target, cfg)
    write_json(current.folder / "metrics.json", metrics)
    write_report(cohort, folds, predictions, metrics, cfg, current.folder, cache)
    write_json(current.folder / "metrics.json", metrics)
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
    sampler = EpochSampler(len(train), seed, sampling_weights(settings.sampling, cohort.target.kind, labels))
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
            bar.reach(epoch)

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
    write_json(folder / "metrics.json", {"epoch": description.training["epoch"], "bags": sizes, **scores})
    discard_resume_state(folder)


def plan_folds(cohort: Cohort, cfg: DictConfig) -> list[Fold]:
    """The user's splits when given, else stratified folds grouped by patient, for every repeat.

    Raises:
        InputError: a patient on two sides, too few patients, an unknown id, or a training set of one class.
    """
    names = cohort.target.classes
    labels: Any = cohort.labels() if cohort.target.kind == "multilabel" else [names[int(c.label)] for c in cohort.cases]  # type: ignore[arg-type]
    samples = Samples(
        [case.case_id for case in cohort.cases],
        labels,
        [case.patient for case in cohort.cases],
        [case.split for case in cohort.cases],
    )
    return common_folds(samples, cfg.crossval, cfg.seed)


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
