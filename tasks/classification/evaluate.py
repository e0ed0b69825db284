"""``action=evaluate``: a trained classifier, or an ensemble of folds, on a labelled set."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.classification.checkpoint import Description, load_checkpoint, load_classifier
from tasks.classification.data import ImageSet, load_images
from tasks.classification.loading import Images, check_set
from tasks.classification.report import add_worst, key_figures, print_result
from tasks.classification.results import predict_samples, summarise, worst_first
from tasks.common.checkpoints import find_checkpoints, hashed
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.report import Report
from tasks.common.result_report import add_figures, metrics_table, prediction_figures

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Predict every labelled image of ``data.path`` and write predictions, metrics, plots and a report to ``out``.

    With ``evaluation.unseen`` the images that the checkpoint was trained or chosen on are left out; of the data it was
    trained on, that leaves the test images of its fold.

    Raises:
        InputError: no checkpoint, unreadable images, or labels the classifier does not know.
    """
    if cfg.checkpoint is None:
        raise InputError("action=evaluate needs checkpoint=RUN, a run folder, a fold folder or a model.safetensors.")
    classifier = load_classifier(Path(cfg.checkpoint))
    description = classifier.description
    images = with_classes_of(load_images(cfg.data), description)
    known = trained_on(Path(cfg.checkpoint))
    seen = [sample for sample in images.samples if hashed(sample.case_id) in known]
    if cfg.evaluation.unseen:
        left = tuple(sample for sample in images.samples if hashed(sample.case_id) not in known)
        images, seen = replace(images, samples=left), []
        if not left:
            raise InputError(f"every image was used to train checkpoint={cfg.checkpoint}; name one fold of it.")
    if seen:
        log.warning(
            "%d of %d images were used to train this checkpoint (%s ...): the figures are too good for them; "
            "evaluation.unseen=true leaves them out.",
            len(seen), len(images.samples), seen[0].case_id,
        )  # fmt: skip
    device = device_for(cfg.inference.device)
    store = Images(description.preprocessing.window, cfg.data.cache)
    checked = check_set(images, store)
    if cfg.dry_run:
        log.info("would evaluate %d images with %d networks", len(images.samples), len(classifier.models))
        return {}
    predictions = predict_samples(classifier.to(device), images.samples, store, cfg.training.batch_size)
    predictions = worst_first(predictions)
    metrics: dict[str, Any] = {
        "backbone": description.backbone["name"],
        "attention": description.attention["name"] if description.attention else None,
        "img_size": description.preprocessing.img_size,
        "checkpoint": str(cfg.checkpoint),
        **summarise(predictions, images, cfg),
    }
    metrics["notes"] += [*images.notes, *checked.notes]
    if seen:
        metrics["notes"].append(f"{len(seen)} images were used to train this checkpoint")
    with atomic_path(out / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    write_json(out / "metrics.json", metrics)
    report = Report(f"Evaluation of {description.title}", f"{metrics['cases']} images; checkpoint {cfg.checkpoint}")
    report.add_heading("Results")
    report.add_key_figures(key_figures(metrics))
    report.add_notes(metrics["notes"])
    report.add_table(metrics_table(metrics), f"Intervals: {metrics['interval']}.")
    add_figures(report, prediction_figures(predictions, images), out)
    add_worst(report, predictions, images, store, cfg.evaluation.worst, out)
    report.add_details("All predictions", predictions.round(4).to_string(index=False))
    report.write(out / "report.html")
    print_result(metrics)
    log.info("report: %s", out / "report.html")
    return metrics


def with_classes_of(images: ImageSet, description: Description) -> ImageSet:
    """The images with their labels counted as the classifier counts them.

    Raises:
        InputError: a label the classifier does not know.
    """
    known = {name: position for position, name in enumerate(description.classes)}
    strange = [name for name in images.classes if name not in known]
    if strange:
        raise InputError(f"label {', '.join(strange)} is not one of the checkpoint's classes {list(known)}.")
    samples = tuple(replace(s, label=known[images.classes[s.label]]) for s in images.samples)
    return replace(images, samples=samples, classes=description.classes)


def trained_on(checkpoint: Path) -> set[str]:
    """Hashes of the images in the training or validation set of the checkpoint, or of any of its folds."""
    descriptions = [load_checkpoint(path)[1] for path in find_checkpoints(checkpoint)]
    return {name for description in descriptions for name in description.training.get("cases", [])}
