"""``action=train``: cross-validation of an image classifier, one finished fold at a time, then the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.classification import exits
from tasks.classification.baseline import colour_baseline
from tasks.classification.checkpoint import Description, ImageClassifier, save_checkpoint
from tasks.classification.data import ImageSet, load_images, refuse_rare
from tasks.classification.loading import (
    Checked,
    ImageDataset,
    Images,
    Preprocessing,
    check_set,
    make_loader,
)
from tasks.classification.model import build_network, check_network, own_input_size, preprocessing_of
from tasks.classification.module import ClassifierModule, Objective
from tasks.classification.report import measure_cost, print_result, write_report
from tasks.classification.results import exit_logits, predict_samples, summarise, worst_first
from tasks.common.balance import balanced_weights, sampling_weights
from tasks.common.checkpoints import FILE_NAME, fold_name, hashed
from tasks.common.cost import exit_flops
from tasks.common.crossval import Fold
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.folds import Samples, plan_folds, read_predictions, run_folds
from tasks.common.metrics import classification_metrics
from tasks.common.optimisation import Recipe, check_optimizer
from tasks.common.progress import ProgressBars
from tasks.common.results import arrays
from tasks.common.runs import Run, open_run
from tasks.common.samplers import EpochSampler
from tasks.common.training import Plan, check_accelerator, discard_resume_state, first_process, fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """All that a run works on.

    Attributes:
        images: the set.
        store: their pixels.
        checked: mean colours and remarks.
        folds: who trains and who tests.
        description: what every checkpoint will say of itself.
    """

    images: ImageSet
    store: Images
    checked: Checked
    folds: Sequence[Fold]
    description: Description


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Cross-validate on ``data.path`` and write the report; returns ``metrics.json``."""
    # All that can be wrong is found before a run folder is made.
    study = prepare(cfg)
    if cfg.dry_run:
        return describe(study)
    with open_run(cfg, out, inputs=[study.images.fingerprint()]) as current:
        return cross_validate(study, cfg, current)


def prepare(cfg: DictConfig) -> Study:
    """Check settings, network and every image.

    Raises:
        InputError: anything that would end the run later.
    """
    check_accelerator(cfg.trainer)
    device_for(cfg.inference.device)
    make_plan(cfg, validated=True)
    check_optimizer(cfg.training.optimizer)
    sampling_weights(cfg.training.sampling, "binary", torch.tensor([0, 1]))
    if cfg.training.batch_size < 1:
        raise InputError(f"training.batch_size={cfg.training.batch_size} must be 1 or more.")
    classes = 2 if cfg.data.classes is None else len(cfg.data.classes)
    _objective(cfg, max(classes, 2), None)
    images = load_images(cfg.data)
    description = describe_model(cfg, images.classes)
    description.preprocessing.augmentation(cfg.augment)
    own_splits = any(sample.split for sample in images.samples) or cfg.crossval.splits is not None
    store = Images(description.preprocessing.window, cfg.data.cache)
    rare = refuse_rare(images, 2 if own_splits else cfg.crossval.folds)
    checked = check_set(images, store, rare)
    folds = folds_of(images, cfg)
    for note in (*images.notes, *checked.notes):
        log.warning(note)
    return Study(images, store, checked, folds, description)


def describe_model(cfg: DictConfig, classes: Sequence[str]) -> Description:
    """What the checkpoints will say of themselves; the network is built once and tried on two images.

    Raises:
        InputError: backbone, attention, weights or image size cannot be used.
    """
    backbone: dict[str, Any] = {"name": str(cfg.backbone.name), "params": _plain(cfg.backbone.get("params")) or {}}
    attention = _plain(cfg.get("attention"))
    size = own_input_size(backbone["name"]) if cfg.data.img_size is None else cfg.data.img_size
    if not isinstance(size, int) or size < 1:
        raise InputError(f"data.img_size={size} must be a whole number of pixels, 1 or more.")
    window = cfg.data.window
    if window is not None and (len(window) != 2 or not window[0] < window[1]):
        raise InputError(f"data.window={list(window)} must be two intensities, the lower first.")
    if cfg.data.crop_mode not in ("center", "squash", "border"):
        raise InputError(f"data.crop_mode={cfg.data.crop_mode} is not known; use center, squash or border.")
    with torch.random.fork_rng(devices=[]):
        network = build_network(_with_weights(cfg, backbone), attention, len(classes), size)
        check_network(network, backbone["name"], len(classes), size)
    stated = preprocessing_of(network)
    preprocessing = Preprocessing(
        size,
        tuple(cfg.data.mean or stated["mean"]),
        tuple(cfg.data.std or stated["std"]),
        cfg.data.crop_mode,
        window=None if window is None else (float(window[0]), float(window[1])),
    )
    return Description(backbone, attention, tuple(classes), preprocessing)


def folds_of(images: ImageSet, cfg: DictConfig) -> list[Fold]:
    """The folds of ``crossval``; a split that the data bring is used unless another is named."""
    names = [images.classes[sample.label] for sample in images.samples]
    splits = [sample.split for sample in images.samples]
    settings = cfg.crossval
    if settings.splits is None and any(splits):
        settings = OmegaConf.merge(settings, {"splits": "column"})
    patients = [sample.patient for sample in images.samples]
    pure = len(set(zip(patients, names, strict=True))) == len(set(patients))
    # A patient with images of several classes belongs to all of them when folds are dealt.
    labels: Any = names if pure else np.eye(len(images.classes), dtype=np.int64)[images.labels()]
    samples = Samples([s.case_id for s in images.samples], labels, patients, splits, images.classes)
    return plan_folds(samples, settings, cfg.seed)


def cross_validate(study: Study, cfg: DictConfig, current: Run) -> dict[str, Any]:
    """Train and test every fold that is not finished yet, then pool, report and mark the run as finished."""
    folder, images = current.folder, study.images
    if current.finished:
        log.info("this run is finished already: %s", folder / "report.html")
        done: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        print_result(done)
        return {**done, "folder": str(folder)}

    def train_one(fold: Fold, place: Path, bars: ProgressBars) -> None:
        run_fold(study, fold, cfg, place, bars)

    if not run_folds(study.folds, current, train_one):
        return {}
    predictions = worst_first(read_predictions(study.folds, folder))
    with atomic_path(folder / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    metrics: dict[str, Any] = {
        "backbone": study.description.backbone["name"],
        "attention": study.description.attention["name"] if study.description.attention else None,
        "img_size": study.description.preprocessing.img_size,
        **summarise(predictions, images, cfg),
        "baseline": colour_baseline(images, study.checked.colours, study.folds),
        "cost": measure_cost(folder / fold_name(study.folds[0]), cfg),
    }
    metrics["notes"] = [*images.notes, *study.checked.notes, *metrics["notes"]]
    write_json(folder / "metrics.json", metrics)
    write_report(study.images, study.store, study.folds, predictions, metrics, cfg, folder)
    current.finish()
    print_result(metrics)
    log.info("report: %s", folder / "report.html")
    return {**metrics, "folder": str(folder)}


def run_fold(study: Study, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars) -> None:
    """Train on one fold, keep the network, write the predictions for its test images; ``metrics.json`` comes last."""
    settings, images = cfg.training, study.images
    seed = int(cfg.seed) * 10_007 + fold.index
    torch.manual_seed(seed)
    train, val = images.select(fold.train), images.select(fold.val)
    facts = {"fold": fold_name(fold), "seed": seed, "cases": [hashed(s.case_id) for s in (*train, *val)]}
    description = replace(study.description, training=facts)
    preprocessing, labels = description.preprocessing, torch.from_numpy(images.labels(train))
    network = build_network(
        _with_weights(cfg, description.backbone), description.attention, len(images.classes), preprocessing.img_size
    )
    sampler = EpochSampler(len(train), seed, sampling_weights(settings.sampling, images.kind, labels))
    dataset = ImageDataset(train, study.store, preprocessing.augmentation(cfg.augment))
    loader = make_loader(dataset, settings.batch_size, sampler, cfg.data.workers)
    held = ImageDataset(val, study.store, preprocessing.transform())
    val_loader = make_loader(held, settings.batch_size, None, cfg.data.workers) if val else None
    weights = balanced_weights(images.kind, labels, len(images.classes)) if settings.class_weights else None
    recipe = Recipe(
        settings.lr, settings.min_lr, settings.weight_decay, tuple(settings.betas), settings.epochs,
        settings.warmup_epochs, settings.optimizer,
    )  # fmt: skip
    objective = _objective(cfg, len(images.classes), weights)
    with bars.add(fold_name(fold), total=settings.epochs, unit="epochs", passing=True) as bar:

        def show(epoch: int, _epochs: int, row: Mapping[str, float]) -> None:
            shown = [f"{name} {row[key]:.3f}" for name, key in _SHOWN if key in row]
            bar.describe("  ".join([fold_name(fold), *shown]))
            bar.reach(epoch)

        fitted = fit(
            ClassifierModule(network, objective, images.kind, recipe, seed),
            loader,
            val_loader,
            make_plan(cfg, validated=bool(val)),
            folder,
            _plain(cfg.trainer),
            seed=seed,
            sampler=sampler,
            on_epoch=show,
            tensorboard=bool(settings.tensorboard),
        )
    facts["epoch"] = fitted.epoch
    with first_process() as writes:
        if writes:
            write_fold(study, ImageClassifier([network], description), fold, cfg, folder)


def write_fold(study: Study, classifier: ImageClassifier, fold: Fold, cfg: DictConfig, folder: Path) -> None:
    """Network, test predictions and metrics of a fitted fold; with ``metrics.json`` the fold counts as finished."""
    images, batch = study.images, cfg.training.batch_size
    network = classifier.models[0]
    save_checkpoint(folder / FILE_NAME, network, classifier.description)
    classifier.to(device_for(cfg.inference.device))
    val, test = images.select(fold.val), images.select(fold.test)
    predictions = predict_samples(classifier, test, study.store, batch)
    if hasattr(network, "forward_exits") and val:
        on_val, on_test = (exit_logits(network, classifier, side, study.store, batch) for side in (val, test))
        costs = exit_flops(network, classifier.description.preprocessing.img_size)
        rows = exits.curve(on_val, on_test, torch.from_numpy(images.labels(test)), costs)
        write_json(folder / "exits.json", {"flops": costs, "curve": rows})
    predictions.insert(0, "repeat", fold.repeat)
    predictions.insert(1, "fold", fold.index)
    with atomic_path(folder / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    scores = classification_metrics(*arrays(predictions, images), images.kind, images.classes)
    sizes = {"train": len(fold.train), "val": len(val), "test": len(test)}
    write_json(folder / "metrics.json", {"epoch": classifier.description.training["epoch"], "images": sizes, **scores})
    discard_resume_state(folder)


def make_plan(cfg: DictConfig, validated: bool) -> Plan:
    """How long to train and what to keep; without validation images the last epoch."""
    settings = cfg.training
    select = settings.select if validated else "last"
    patience = settings.patience if validated else None
    return Plan(settings.epochs, select, patience, settings.min_epochs, settings.average_from, settings.ema)


def describe(study: Study) -> dict[str, Any]:
    """Log what would be done."""
    for fold in study.folds:
        sizes = [len(part) for part in (fold.train, fold.val, fold.test)]
        log.info("%s: %d training, %d validation, %d test images", fold_name(fold), *sizes)
    names, size = ", ".join(study.images.classes), study.description.preprocessing.img_size
    log.info("%d images; classes %s", len(study.images.samples), names)
    log.info("%s on images of %d pixels", study.description.title, size)
    return {}


_SHOWN = (("loss", "train_loss"), ("validation loss", "val_loss"), ("accuracy", "val_accuracy"))


def _objective(cfg: DictConfig, num_classes: int, weights: Sequence[float] | None) -> Objective:
    if cfg.training.class_weights not in (None, "balanced"):
        raise InputError(f"training.class_weights={cfg.training.class_weights} is not known; use null or balanced.")
    augment = cfg.augment
    return Objective(
        num_classes, cfg.training.label_smoothing, augment.mixup, augment.cutmix, augment.mix_prob, weights
    )


def _with_weights(cfg: DictConfig, backbone: Mapping[str, Any]) -> dict[str, Any]:
    return {**backbone, "pretrained": cfg.backbone.get("pretrained"), "checkpoint": cfg.backbone.get("checkpoint")}


def _plain(node: Any) -> Any:
    return None if node is None else OmegaConf.to_container(node, resolve=True)
