"""``action=predict``: images without labels to class probabilities, one row of ``predictions.csv`` each."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.table import Table

from kernels.errors import InputError
from tasks.classification.checkpoint import ImageClassifier, load_classifier
from tasks.classification.images import SUFFIXES, read_image
from tasks.common.devices import device_for
from tasks.common.files import atomic_path
from tasks.common.progress import ProgressBars

log = logging.getLogger(__name__)

_SHOWN_ROWS = 20


def run(cfg: DictConfig, out: Path) -> pd.DataFrame | None:
    """Predict every image of ``input`` with ``checkpoint``; a file that cannot be read is reported, the others go on.

    Raises:
        InputError: no or a wrong checkpoint or input; or, when the table is written, that some files could not be read.
    """
    if cfg.checkpoint is None:
        raise InputError("action=predict needs checkpoint=RUN, a run folder, a fold folder or a model.safetensors.")
    classifier = load_classifier(Path(cfg.checkpoint))
    files = find_inputs(cfg.input)
    device = device_for(cfg.inference.device)
    if cfg.dry_run:
        log.info("would predict %d images with %d networks", len(files), len(classifier.models))
        return None
    table, failures = predict_files(classifier.to(device), files, cfg.training.batch_size)
    with atomic_path(out / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False)
    _print(table, classifier)
    log.info("predictions: %s", out / "predictions.csv")
    if failures:
        raise InputError(f"{len(failures)} of {len(files)} images could not be read: {' '.join(failures[:5])}")
    return table


def find_inputs(given: Any) -> list[Path]:
    """The image files named by ``input=``: a file, a folder with all below it, or a list of either.

    Raises:
        InputError: nothing given or found, or a path that does not exist.
    """
    paths = [given] if isinstance(given, str | Path) else list(given or [])
    if not paths:
        raise InputError("action=predict needs input=PATH: an image, a folder of images, or a list of them.")
    found: dict[Path, None] = {}
    for path in map(Path, map(str, paths)):
        if not path.exists():
            raise InputError(f"input={path} does not exist; give an image, a folder of images, or a list of either.")
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        found |= dict.fromkeys(file for file in files if not file.name.startswith("."))
    if not found:
        raise InputError(f"input={', '.join(map(str, paths))} holds no image; looked for {', '.join(SUFFIXES)}.")
    return list(found)


def predict_files(
    classifier: ImageClassifier, files: Sequence[Path], batch_size: int
) -> tuple[pd.DataFrame, list[str]]:
    """One row per readable file (path, top class, its probability, each class), and a sentence for each other."""
    preprocessing = classifier.description.preprocessing
    transform = preprocessing.transform()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with ProgressBars() as bars:
        bar = bars.add("predicting", total=len(files), unit="images", passing=True)
        for start in range(0, len(files), batch_size):
            names, tensors = [], []
            for file in files[start : start + batch_size]:
                try:
                    tensors.append(transform(Image.fromarray(read_image(file, preprocessing.window))))
                    names.append(str(file))
                except InputError as error:
                    failures.append(str(error))
                    log.error("%s", error)
                bar.advance(1)
            if tensors:
                rows += _rows(names, classifier.predict(torch.stack(tensors)).double().numpy(), classifier.classes)
    columns = ["path", "predicted", "probability", *(f"p_{name}" for name in classifier.classes)]
    return (pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)), failures


def _rows(names: Sequence[str], each: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for probabilities (models, B, C)."""
    mean, deviation = each.mean(0), each.std(0)
    rows = []
    for k, name in enumerate(names):
        best = int(mean[k].argmax())
        row: dict[str, Any] = {"path": name, "predicted": classes[best], "probability": float(mean[k, best])}
        row |= {f"p_{c}": float(p) for c, p in zip(classes, mean[k], strict=True)}
        if len(each) > 1:
            row |= {f"sd_{c}": float(s) for c, s in zip(classes, deviation[k], strict=True)}
        rows.append(row)
    return rows


def _print(table: pd.DataFrame, classifier: ImageClassifier) -> None:
    shown = Table(title=f"{len(table)} images, {classifier.description.title}", title_justify="left")
    for column in ("image", "predicted", "probability"):
        shown.add_column(column, justify="right" if column == "probability" else "left")
    for row in table.head(_SHOWN_ROWS).to_dict("records"):
        shown.add_row(Path(row["path"]).name, str(row["predicted"]), f"{row['probability']:.3f}")
    if len(table) > _SHOWN_ROWS:
        shown.add_row(f"... and {len(table) - _SHOWN_ROWS} more", "", "")
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
