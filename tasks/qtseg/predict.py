"""``action=predict``: new images to masks at their own size, outlines as GeoJSON, areas in pixels, and a report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from kernels.errors import InputError
from tasks.common.contours import write_geojson
from tasks.common.devices import device_for
from tasks.common.files import atomic_path
from tasks.common.images import read_image
from tasks.common.mask_outlines import class_contours
from tasks.common.report import Report
from tasks.common.runs import open_run
from tasks.common.segmentation.checkpoint import Segmenter
from tasks.common.segmentation.inference import Inference
from tasks.common.segmentation.new_cases import segment_each
from tasks.qtseg.mask_files import colours_of, write_mask
from tasks.qtseg.model import load
from tasks.qtseg.outcomes import CHOSEN_ON_TEST, write_probabilities
from tasks.qtseg.pictures import write_outlines
from tasks.qtseg.places import refuse_within
from tasks.qtseg.predict_inputs import NewImage, find_images, fingerprint_of
from tasks.qtseg.preprocessing import Preprocessing
from tasks.qtseg.segment import Cut, how_to_infer, segment

log = logging.getLogger(__name__)
_SHOWN = 60  # pictures in the report; more make it too heavy to open


def run(cfg: DictConfig, out: Path) -> pd.DataFrame | None:
    """Segment every image of ``input``; one that cannot be read is reported and the others go on.

    Each image's folder in ``out`` has ``mask.png``, ``contours.geojson`` and ``overlay.png``; ``areas.csv`` has a row
    for each image. A run that was stopped goes on with the images that are left.

    Raises:
        InputError: no or a wrong checkpoint or input; or, when all is written, that some images could not be segmented.
    """
    segmenter = load(cfg)
    images = find_images(cfg.input)
    refuse_within(out, {image.path.resolve().parent for image in images})
    how, cut = how_to_infer(segmenter, cfg.inference), Cut.of(cfg.inference, segmenter.cutoff)
    device = device_for(cfg.inference.device)
    if cfg.dry_run:
        log.info("would segment %d images with %d networks", len(images), len(segmenter.models))
        return None
    preprocessing = Preprocessing.from_dict(segmenter.description.preparation)
    segmenter.to(device)
    with open_run(cfg, out, inputs=[fingerprint_of(images)]) as current:

        def one(number: int, folder: Path) -> dict[str, Any]:
            keep = bool(cfg.inference.probabilities)
            return _segment(segmenter, images[number], preprocessing, how, cut, folder, keep)

        table, failures = segment_each([image.name for image in images], current.folder, one, "images")
        with atomic_path(current.folder / "areas.csv") as temporary:
            table.to_csv(temporary, index=False)
        _report(segmenter, table, failures, cfg, current.folder)
        if not failures:
            current.finish()
        if len(table):
            _print(table, segmenter.description.classes[1:], segmenter.description.title)
        log.info("report: %s", current.folder / "report.html")
    if failures:
        raise InputError(f"{len(failures)} of {len(images)} images could not be segmented: {' '.join(failures[:5])}")
    return table


def _segment(
    segmenter: Segmenter,
    image: NewImage,
    preprocessing: Preprocessing,
    how: Inference,
    cut: Cut,
    folder: Path,
    keep_probabilities: bool,
) -> dict[str, Any]:
    """Segment one image, write its files, and say what was found."""
    classes = segmenter.description.classes
    pixels = read_image(image.path)
    probabilities = segment(segmenter, preprocessing, pixels, how).probabilities()
    mask = cut.mask(probabilities)
    write_mask(folder / "mask.png", mask, classes)
    if keep_probabilities:
        write_probabilities(folder, "probability", probabilities, classes)
    contours = class_contours(mask, dict(enumerate(classes[1:], start=1)))
    write_geojson(folder / "contours.geojson", contours, colours_of(classes))
    write_outlines(folder / "overlay.png", pixels, mask)
    counts = np.bincount(mask.ravel(), minlength=len(classes))
    row: dict[str, Any] = {
        "image": image.name,
        "path": str(image.path),
        "height": mask.shape[0],
        "width": mask.shape[1],
    }
    for k, name in enumerate(classes[1:], start=1):
        row |= {
            f"{name}_pixels": int(counts[k]),
            f"{name}_share": float(counts[k] / mask.size),
            f"{name}_pieces": len(contours[name]),
        }
    return {**row, "cutoff": cut.cutoff, "networks": len(segmenter.models)}


def _report(segmenter: Segmenter, table: pd.DataFrame, failures: list[str], cfg: DictConfig, folder: Path) -> None:
    description = segmenter.description
    report = Report(f"Segmentation with {description.title}", f"{len(table)} images; checkpoint {cfg.checkpoint}")
    released = description.training.get("protocol") == "released"
    report.add_notes([*([f"Of the run that trained this network: {CHOSEN_ON_TEST}"] if released else []), *failures])
    report.add_text("For research use; not a medical device. Areas are those of the pixels in the mask.")
    if len(table):
        report.add_heading("Areas")
        report.add_table(table.drop(columns=["path", "networks", "cutoff"]))
        report.add_heading("Outlines")
        shown = list(table["image"])[:_SHOWN]
        report.add_gallery([(folder / name / "overlay.png", name) for name in shown])
        if len(shown) < len(table):
            report.add_text(f"The first {len(shown)} of {len(table)} images; the others are in their folders.")
    report.write(folder / "report.html")


def _print(table: pd.DataFrame, classes: Sequence[str], title: str) -> None:
    shown = Table(title=f"{len(table)} images, {title}", title_justify="left")
    shown.add_column("image")
    for name in classes:
        shown.add_column(f"{name} (share)", justify="right")
        shown.add_column("pieces", justify="right")
    for row in table.head(20).to_dict("records"):
        cells = [(f"{row[f'{name}_share']:.1%}", str(row[f"{name}_pieces"])) for name in classes]
        shown.add_row(row["image"], *(cell for pair in cells for cell in pair))
    if len(table) > 20:
        shown.add_row(f"... and {len(table) - 20} more")
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
