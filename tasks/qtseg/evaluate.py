"""``action=evaluate``: a trained segmenter, or the ensemble of a run's folds, on labelled images."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.progress import ProgressBars
from tasks.common.runs import open_run
from tasks.common.segmentation.new_cases import not_trained_on
from tasks.qtseg.checking import check_set, summary
from tasks.qtseg.data import ImageSet2D, load_images
from tasks.qtseg.loading import Store, read_sample
from tasks.qtseg.model import load
from tasks.qtseg.outcomes import Outcomes, read_rankings, second_reader, summarise, worst_first
from tasks.qtseg.places import refuse_inside
from tasks.qtseg.preprocessing import Preprocessing
from tasks.qtseg.report import print_result, write_report
from tasks.qtseg.scoring import Scoring
from tasks.qtseg.segment import Cut, how_to_infer, segment

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Segment and score every labelled image of ``data.path``; masks, metrics and a report go to ``out``.

    A run that was stopped goes on with the images that are left. With ``evaluation.unseen`` the images that the
    checkpoint was trained or chosen on are left out.

    Raises:
        InputError: no checkpoint, images that cannot be used, or classes that are not the checkpoint's.
    """
    segmenter = load(cfg)
    description = segmenter.description
    how = how_to_infer(segmenter, cfg.inference)
    device = device_for(cfg.inference.device)
    images = load_images(cfg.data)
    refuse_inside(out, images)
    images = _named_alike(images, description.classes, cfg)
    scoring = Scoring.of(cfg, images.classes)
    samples = list(images.samples)
    kept, seen = not_trained_on(
        samples, [s.case_id for s in samples], segmenter, bool(cfg.evaluation.unseen), cfg.checkpoint, "images"
    )
    images = replace(images, samples=tuple(kept))
    preprocessing = Preprocessing.from_dict(description.preparation)
    checked = check_set(images, Store(preprocessing, images.coding, False), foreground=False)
    notes = [*images.notes, *checked.notes]
    for line in (*summary(images, checked), *notes):
        log.info("%s", line)
    if cfg.dry_run:
        log.info("would segment %d images with %d networks", len(images.samples), len(segmenter.models))
        return {}
    with open_run(cfg, out, inputs=[images.fingerprint()]) as current:
        folder = current.folder
        segmenter.to(device)
        outcomes = Outcomes(folder, images, scoring, preprocessing, bool(cfg.inference.probabilities))
        cut = Cut.of(cfg.inference, segmenter.cutoff)
        todo = [sample for sample in images.samples if not outcomes.has(sample)]
        with ProgressBars() as bars, bars.add("segmenting", total=len(todo), unit="images", passing=True) as bar:
            for sample in todo:
                image, reference, fov = read_sample(sample, images.coding)
                outcomes.add(sample, reference, fov, segment(segmenter, preprocessing, image, how), cut)
                bar.advance(1)
        table = worst_first(outcomes.table(images.samples))
        if scoring.released:
            table = table.assign(protocol="released")
        with atomic_path(folder / "results.csv") as temporary:
            table.to_csv(temporary, index=False)
        rankings = read_rankings(table, folder)
        metrics: dict[str, Any] = {
            "network": description.title,
            "checkpoint": str(cfg.checkpoint),
            "cutoff": cut.cutoff,
            **summarise(table, images, scoring, rankings, cfg, chosen_here=False),
        }
        metrics["notes"] = [*metrics["notes"], *notes]
        if seen:
            metrics["notes"].append(f"{seen} images were used to train or choose this checkpoint")
        if (second := second_reader(images.samples, images, scoring, cfg)) is not None:
            metrics["second_reader"] = second
        write_json(folder / "metrics.json", metrics)
        write_report(images, [], table, rankings, metrics, cfg, folder, f"Evaluation of {description.title}")
        current.finish()
    print_result(metrics)
    log.info("report: %s", folder / "report.html")
    return {**metrics, "folder": str(folder)}


def _named_alike(images: ImageSet2D, classes: tuple[str, ...], cfg: DictConfig) -> ImageSet2D:
    """The set under the checkpoint's class names, where the masks are black and white and name nothing themselves.

    Raises:
        InputError: there are other classes than the checkpoint knows.
    """
    if images.classes == classes:
        return images
    if images.coding.kind == "binary" and len(classes) == 2:
        return replace(images, coding=replace(images.coding, classes=classes))
    raise InputError(
        f"data.path={cfg.data.path} has the {len(images.classes)} classes {list(images.classes)}, the checkpoint the "
        f"{len(classes)} classes {list(classes)}; name them alike with data.labels."
    )
