"""``action=train``: cross-validation by patient, one finished fold at a time, then the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.checkpoints import FILE_NAME, fold_name, hashed
from tasks.common.crossval import Fold
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.folds import Samples, plan_folds, run_folds
from tasks.common.progress import ProgressBars
from tasks.common.runs import Run, open_run
from tasks.common.samplers import EpochSampler
from tasks.common.segmentation.checkpoint import Description, Segmenter, inference_of, save_segmenter
from tasks.common.segmentation.cutoff import best_cutoff, cutoff_counts
from tasks.common.segmentation.fitting import check_training, fit_network
from tasks.common.segmentation.inference import forward_of
from tasks.common.segmentation.losses import DeepSupervision
from tasks.common.training import discard_resume_state, first_process
from tasks.meningioma.augmentation import augmentation, patches
from tasks.meningioma.cases import CaseSet
from tasks.meningioma.data import load_cases, overview
from tasks.meningioma.loading import Augment, VolumeDataset, VolumeStore, make_loader
from tasks.meningioma.model import TASK, build, describe, seen_size
from tasks.meningioma.outcomes import Outcomes, read_outcomes, summarise
from tasks.meningioma.preparation import Preparation
from tasks.meningioma.report import print_result, write_report
from tasks.meningioma.scoring import Scoring
from tasks.meningioma.segment import Cut, probabilities_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """All that a run works on.

    Attributes:
        cases: the set.
        table: a row of statistics for each case.
        preparation: of every volume.
        folds: who trains and who tests.
        description: what every checkpoint will say of itself.
        loss: what is minimised.
        scoring: limits of the metrics.
    """

    cases: CaseSet
    table: pd.DataFrame
    preparation: Preparation
    folds: Sequence[Fold]
    description: Description
    loss: DeepSupervision
    scoring: Scoring


Baseline = Callable[[CaseSet, Sequence[Fold]], dict[str, Any]]
"""Something to compare with: ``what`` it is and its mean ``dice`` on the test cases of the folds."""


def run(cfg: DictConfig, out: Path, baseline: Baseline | None = None) -> dict[str, Any]:
    """Cross-validate on ``data.path`` and write the report; returns ``metrics.json``."""
    # All that can be wrong is found before a run folder is made.
    study = prepare(cfg)
    if cfg.dry_run:
        return {"cases": len(study.cases.labelled), "folds": len(study.folds)}
    with open_run(cfg, out, inputs=[study.cases.fingerprint()]) as current:
        return cross_validate(study, cfg, current, baseline)


def prepare(cfg: DictConfig) -> Study:
    """Check settings, network and every file, and print what the set holds.

    Raises:
        InputError: anything that would end the run later.
    """
    device_for(cfg.inference.device)
    scoring = Scoring.of(cfg.evaluation)
    preparation = Preparation.from_config(cfg.data.preparation)
    augmentation(cfg.augment.name, cfg.augment.strength)
    check_training(cfg, 2)
    checked = load_cases(cfg.data)
    for line in overview(checked):
        log.info("%s", line)
    for note in checked.cases.notes:
        log.warning("%s", note)
    cases = checked.cases
    channels = len(cases.labelled[0].images)
    description = describe(cfg, channels, cases.classes, preparation)
    loss = check_training(cfg, len(cases.classes))
    return Study(cases, checked.table, preparation, folds_of(cases, checked.table, cfg), description, loss, scoring)


def folds_of(cases: CaseSet, table: pd.DataFrame, cfg: DictConfig) -> list[Fold]:
    """The folds of ``crossval``; those that the data bring are used unless others are named.

    Without either, patients are dealt so that small, large and absent structures are in every fold.
    """
    labelled = cases.labelled
    settings = cfg.crossval
    splits = [case.split for case in labelled]
    if settings.splits is None and cases.folds is None and any(splits):
        settings = OmegaConf.merge(settings, {"splits": "column"})
    volumes = table.set_index("case_id")[[f"{name}_ml" for name in cases.classes[1:]]].sum(axis=1)
    limit = float(cfg.evaluation.limit_ml)
    kinds = [_volume_class(float(volumes[case.case_id]), limit) for case in labelled]
    patients = [case.patient for case in labelled]
    enough = min(kinds.count(kind) for kind in set(kinds)) >= max(2, int(cfg.crossval.folds))
    strata = kinds if enough and len(set(kinds)) > 1 else None
    samples = Samples([c.case_id for c in labelled], strata, patients, splits, folds=cases.folds)
    return plan_folds(samples, settings, cfg.seed)


def _volume_class(ml: float, limit: float) -> str:
    return "none" if ml <= 0 else "small" if ml <= limit else "large"


def cross_validate(study: Study, cfg: DictConfig, current: Run, baseline: Baseline | None = None) -> dict[str, Any]:
    """Train and test every fold that is not finished yet, then pool, report and mark the run as finished."""
    folder = current.folder
    if current.finished:
        log.info("this run is finished already: %s", folder / "report.html")
        done: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        print_result(done)
        return {**done, "folder": str(folder)}
    with atomic_path(folder / "cases.csv") as temporary:
        study.table.to_csv(temporary, index=False)
    store = VolumeStore(study.cases, study.preparation, cfg.data.cache, cfg.data.cache_gb)

    def train_one(fold: Fold, place: Path, bars: ProgressBars) -> None:
        run_fold(study, store, fold, cfg, place, bars)

    if not run_folds(study.folds, current, train_one):
        return {}
    table = read_outcomes([folder / fold_name(fold) for fold in study.folds])
    with atomic_path(folder / "results.csv") as temporary:
        table.to_csv(temporary, index=False)
    metrics = {"network": study.description.title, **summarise(table, study.cases, study.scoring, cfg)}
    metrics["notes"] = [*study.cases.notes, *metrics["notes"]]
    if baseline is not None:
        metrics["baseline"] = baseline(study.cases, study.folds)
    write_json(folder / "metrics.json", metrics)
    write_report(study.cases, study.folds, table, metrics, cfg, folder)
    current.finish()
    print_result(metrics)
    log.info("report: %s", folder / "report.html")
    return {**metrics, "folder": str(folder)}


def run_fold(study: Study, store: VolumeStore, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars) -> None:
    """Train on one fold, keep the network, segment its test cases; ``metrics.json`` comes last."""
    seed = int(cfg.seed) * 10_007 + fold.index
    torch.manual_seed(seed)
    checkpoint = folder / FILE_NAME
    if not checkpoint.exists():
        _train(study, store, fold, cfg, folder, bars, seed)
    with first_process() as writes:
        if writes:
            _test(study, store, fold, cfg, folder, bars)


def _train(
    study: Study, store: VolumeStore, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars, seed: int
) -> None:
    network = build(study.description)
    size = seen_size(study.preparation)
    sliding = study.preparation.recipe == "sliding"
    crop = patches(size, cfg.augment.patches_per_volume, cfg.augment.foreground) if sliding else None
    augment = Augment(crop, augmentation(cfg.augment.name, cfg.augment.strength))
    sampler = EpochSampler(len(fold.train), seed, None)
    loader = make_loader(VolumeDataset(fold.train, store, augment), cfg.training.batch_size, sampler, cfg.data.workers)
    held = make_loader(VolumeDataset(fold.val, store), 1, None, cfg.data.workers) if fold.val else None
    fitted = fit_network(
        network,
        study.loss,
        (loader, held),
        cfg,
        folder,
        bars,
        seed,
        sampler,
        forward=forward_of(study.description.how()),
        size=size,
        channels=int(study.description.network["in_channels"]),
        size_option="data.preparation.patch" if sliding else "data.preparation.size",
        per_item=int(cfg.augment.patches_per_volume) if sliding else 1,
    )
    with first_process() as writes:
        if not writes:
            return
        segmenter = Segmenter([network.eval()], study.description, [None], set())
        cutoff = _search_cutoff(study, store, fold, cfg, segmenter, bars)
        facts = {
            "fold": fold_name(fold),
            "seed": seed,
            "epoch": fitted.epoch,
            "cases": [hashed(case) for case in (*fold.train, *fold.val)],
        }
        description = replace(study.description, cutoff=cutoff, training=facts)
        save_segmenter(folder / FILE_NAME, TASK, network, description)
        discard_resume_state(folder)


def _search_cutoff(
    study: Study, store: VolumeStore, fold: Fold, cfg: DictConfig, segmenter: Segmenter, bars: ProgressBars
) -> float | None:
    """The cut-off that serves the validation cases best; None where it is not asked for or cannot be chosen."""
    if cfg.inference.cutoff != "search":
        return None
    if not fold.val:
        log.warning("%s has no validation case to choose a cut-off on; the likeliest class is taken.", fold_name(fold))
        return None
    segmenter.to(device_for(cfg.inference.device))
    counts = []
    with bars.add(f"{fold_name(fold)}: cut-off", total=len(fold.val), unit="cases", passing=True) as bar:
        for case in study.cases.select(fold.val):
            prepared = store.prepared(case.case_id)
            found = probabilities_of(segmenter, prepared, inference_of(segmenter, cfg.inference))
            structures = prepared.restore(found)[1:].sum(0).clip(0, 1)
            counts.append(cutoff_counts(structures, study.cases.read_label(case).data > 0))
            bar.advance(1)
    try:
        return best_cutoff(counts, overlaps=(float(cfg.evaluation.overlap),)).cutoff
    except InputError as error:
        log.warning("%s: %s The likeliest class is taken.", fold_name(fold), error)
        return None


def _test(study: Study, store: VolumeStore, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars) -> None:
    """Segment the test cases that are not done yet; with ``metrics.json`` the fold counts as finished."""
    from tasks.common.segmentation.checkpoint import load_segmenter

    segmenter = load_segmenter(folder / FILE_NAME, TASK, build).to(device_for(cfg.inference.device))
    outcomes = Outcomes(folder, study.cases, study.scoring, bool(cfg.evaluation.probabilities))
    cut = Cut.of(cfg.inference, segmenter.cutoff)
    left = [case for case in study.cases.select(fold.test) if not outcomes.has(case)]
    how = inference_of(segmenter, cfg.inference)
    with bars.add(f"{fold_name(fold)}: test", total=len(left), unit="cases", passing=True) as bar:
        for case in left:
            prepared = store.prepared(case.case_id)
            outcomes.add(case, prepared, probabilities_of(segmenter, prepared, how), cut)
            bar.advance(1)
    table = outcomes.table(study.cases.select(fold.test), fold)
    with atomic_path(folder / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False)
    training = segmenter.description.training
    write_json(
        folder / "metrics.json",
        {
            "epoch": training.get("epoch"),
            "cutoff": cut.cutoff,
            "dice": float(table["dice"].mean()),
            "cases": len(table),
        },
    )
