"""``action=train``: cross-validation by patient or the data's own split, fold by fold, then the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.checkpoints import fold_name
from tasks.common.cost import measure
from tasks.common.crossval import Fold
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.folds import run_folds
from tasks.common.progress import ProgressBars
from tasks.common.runs import Run, open_run
from tasks.common.segmentation.fitting import check_training
from tasks.qtseg.augmentation import Augmentation
from tasks.qtseg.checking import check_set, summary
from tasks.qtseg.data import ImageSet2D, folds_of, load_images
from tasks.qtseg.fold import Study, run_fold
from tasks.qtseg.loading import SegmentationDataset, Store
from tasks.qtseg.losses import as_common
from tasks.qtseg.model import build, describe
from tasks.qtseg.outcomes import read_outcomes, read_rankings, second_reader, summarise
from tasks.qtseg.places import refuse_inside
from tasks.qtseg.preprocessing import Preprocessing
from tasks.qtseg.report import print_result, write_report
from tasks.qtseg.sample_grid import write_sample_grid
from tasks.qtseg.scoring import Scoring

log = logging.getLogger(__name__)


Baseline = Callable[[ImageSet2D, Sequence[Fold]], dict[str, Any]]
"""Something to compare with: ``what`` it is and its mean ``dice`` on the test images of the folds."""


def run(cfg: DictConfig, out: Path, baseline: Baseline | None = None) -> dict[str, Any]:
    """Cross-validate on ``data.path`` and write the report; returns ``metrics.json``."""
    # All that can be wrong is found before a run folder is made.
    study = prepare(cfg, out)
    if cfg.dry_run:
        return {"cases": len(study.images.samples), "folds": len(study.folds)}
    with open_run(cfg, out, inputs=[study.images.fingerprint()]) as current:
        return cross_validate(study, cfg, current, baseline)


def prepare(cfg: DictConfig, out: Path) -> Study:
    """Check settings, network and every file, and say what the set holds.

    Raises:
        InputError: anything that would end the run later.
    """
    device_for(cfg.inference.device)
    preprocessing = Preprocessing.from_config(cfg.data)
    augment = Augmentation.from_config(cfg.data.augment)
    if not isinstance(cfg.training.draws, int) or cfg.training.draws < 1:
        raise InputError(f"training.draws={cfg.training.draws} must be a whole number, 1 or more.")
    images = load_images(cfg.data)
    refuse_inside(out, images)
    scoring = Scoring.of(cfg, images.classes)
    loss = check_training(cfg, len(images.classes), {"qtseg": as_common()})
    folds = folds_of(images, cfg)
    if preprocessing.resize != "native":
        describe(cfg, images.classes, preprocessing)  # a wrong name is answered before thousands of files are read
    store = Store(preprocessing, images.coding, cfg.data.cache)
    checked = check_set(images, store)
    notes = [*images.notes, *checked.notes]
    for line in summary(images, checked):
        log.info("%s", line)
    for note in notes:
        log.warning("%s", note)
    sizes = list(checked.sizes.values())
    smallest = min(height for height, _ in sizes), min(width for _, width in sizes)
    description = describe(cfg, images.classes, preprocessing, smallest)
    return Study(images, store, augment, folds, description, loss, scoring, notes)


def cross_validate(study: Study, cfg: DictConfig, current: Run, baseline: Baseline | None = None) -> dict[str, Any]:
    """Train and test every fold that is not finished yet, then report and mark the run as finished."""
    folder = current.folder
    if current.finished:
        log.info("this run is finished already: %s", folder / "report.html")
        done: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        print_result(done)
        return {**done, "folder": str(folder)}
    if not (folder / "samples.png").exists():
        seen = SegmentationDataset(study.images.select(study.folds[0].train), study.store, study.augment)
        write_sample_grid(seen, study.images.classes, folder / "samples.png", int(cfg.seed))
        log.info("what the network will be shown: %s", folder / "samples.png")

    def train_one(fold: Fold, place: Path, bars: ProgressBars) -> None:
        run_fold(study, fold, cfg, place, bars)

    if not run_folds(study.folds, current, train_one):
        return {}
    table = read_outcomes([folder / fold_name(fold) for fold in study.folds])
    if study.scoring.released:
        table = table.assign(protocol="released")
    with atomic_path(folder / "results.csv") as temporary:
        table.to_csv(temporary, index=False)
    rankings = read_rankings(table, folder)
    metrics = {
        "network": study.description.title,
        **summarise(table, study.images, study.scoring, rankings, cfg, chosen_here=study.scoring.released),
        "cost": _cost(study, cfg),
    }
    metrics["notes"] = [*metrics["notes"], *study.notes]
    tested = study.images.select(sorted(set(table["case_id"])))
    if (second := second_reader(tested, study.images, study.scoring, cfg)) is not None:
        metrics["second_reader"] = second
    if baseline is not None:
        metrics["baseline"] = baseline(study.images, study.folds)
    write_json(folder / "metrics.json", metrics)
    write_report(study.images, study.folds, table, rankings, metrics, cfg, folder)
    current.finish()
    print_result(metrics)
    log.info("report: %s", folder / "report.html")
    return {**metrics, "folder": str(folder)}


def _cost(study: Study, cfg: DictConfig) -> dict[str, Any]:
    """Parameters, operations and speed at the network's size, or at that of 512 pixels where images differ."""
    size = study.description.network["size"] or [512, 512]
    with torch.random.fork_rng(devices=[]):
        network = build(study.description).requires_grad_(False)
    cost = measure(network, size, device_for(cfg.inference.device), int(study.description.network["in_channels"]), 1)
    return {**asdict(cost), "size": size}
