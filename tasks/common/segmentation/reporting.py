"""The parts of a segmentation report that are the same for images and volumes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tasks.common import plots
from tasks.common.checkpoints import fold_name
from tasks.common.crossval import Fold
from tasks.common.report import Report, format_value
from tasks.common.segmentation.summary import metric_label


def key_figures(metrics: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The numbers a reader looks for first, those of ``names`` that are there: label, value, interval."""
    figures = []
    for name in names:
        row = metrics["pooled"].get(name)
        if row is not None and not is_missing(row["value"]):
            span = "" if is_missing(row["low"]) else f"{format_value(row['low'])} – {format_value(row['high'])}"
            figures.append((metric_label(name), format_value(row["value"]), span))
    if "baseline" in metrics:
        figures.append(("Dice of thresholding", format_value(metrics["baseline"]["dice"]), "for comparison"))
    return figures


def with_interval(row: dict[str, float] | None) -> str:
    """``0.912 (0.880 – 0.941)``, or a dash where nothing is known."""
    if row is None or is_missing(row["value"]):
        return "–"
    if is_missing(row.get("low")):
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({row['low']:.3f} – {row['high']:.3f})"


def is_missing(value: float | None) -> bool:
    """None or NaN."""
    return value is None or math.isnan(value)


def learning_curves(folds: Sequence[Fold], folder: Path) -> dict[str, Figure]:
    """``learning_curves`` of the folds of the run in ``folder``; nothing without any history."""
    histories, best = [], {}
    for fold in folds:
        place = folder / fold_name(fold)
        if (place / "history.csv").exists():
            histories.append(pd.read_csv(place / "history.csv").assign(fold=fold.index))
            best[fold.index] = int(json.loads((place / "metrics.json").read_text())["epoch"])
    return {"learning_curves": plots.learning_curves(pd.concat(histories), best_epochs=best)} if histories else {}


def add_run_details(report: Report, folder: Path) -> None:
    """Configuration and versions of the run in ``folder``, folded away."""
    if (folder / "config.yaml").exists():
        report.add_details("Configuration", (folder / "config.yaml").read_text())
        versions = json.loads((folder / "run.json").read_text())["versions"]
        report.add_details("Versions", json.dumps(versions, indent=2))
