"""The parts of a report that follow from predictions and metrics alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tasks.common import plots
from tasks.common.bootstrap import Interval, Spread
from tasks.common.checkpoints import fold_name
from tasks.common.crossval import Fold
from tasks.common.metrics import METRIC_LABELS
from tasks.common.report import Report, format_value, metric_rows
from tasks.common.results import Classified, arrays


def metrics_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """One row per metric: pooled value with interval, and mean and SD over the folds."""
    spread = {name: Spread(f["mean"], f["sd"], f["n"]) for name, f in metrics.get("folds", {}).items()}
    values = {name: pooled["value"] for name, pooled in metrics["pooled"].items()}
    return metric_rows(values, intervals_of(metrics), spread or None, metrics["patients"])


def key_figures(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The three numbers a reader looks for first: label, value, interval."""
    figures = []
    for name in ("auc", "f1_macro", "balanced_accuracy"):
        pooled = metrics["pooled"].get(name)
        if pooled is not None:
            span = f"{format_value(pooled['low'])} – {format_value(pooled['high'])}" if "low" in pooled else ""
            figures.append((METRIC_LABELS[name], format_value(pooled["value"]), span))
    return figures


def intervals_of(metrics: dict[str, Any]) -> dict[str, Interval]:
    """The bootstrap intervals stored in ``metrics.json``."""
    return {name: Interval(p["low"], p["high"]) for name, p in metrics["pooled"].items() if "low" in p}


def prediction_figures(predictions: pd.DataFrame, target: Classified) -> dict[str, Figure]:
    """ROC, precision-recall, confusion matrix and calibration of a table of predictions."""
    probabilities, truth = arrays(predictions, target)
    about = (probabilities, truth, target.kind, target.classes)
    folds = predictions["fold"].to_numpy() if "fold" in predictions else None
    patients = list(predictions["patient"])
    return {
        "roc": plots.roc_curves(*about, folds=folds, groups=patients),
        "precision_recall": plots.precision_recall_curves(*about, folds=folds, groups=patients),
        "confusion_matrix": plots.confusion_matrix(*about),
        "calibration": plots.calibration_curve(*about),
    }


def training_figures(folds: Sequence[Fold], folder: Path, metrics: dict[str, Any]) -> dict[str, Figure]:
    """Learning curves of the folds of the run in ``folder``, and the metrics fold by fold."""
    figures = {}
    histories = []
    for fold in folds:
        path = folder / fold_name(fold) / "history.csv"
        if path.exists():
            histories.append(pd.read_csv(path).assign(fold=fold.index))
    if histories:
        best = {
            fold.index: json.loads((folder / fold_name(fold) / "metrics.json").read_text())["epoch"] for fold in folds
        }
        figures["learning_curves"] = plots.learning_curves(pd.concat(histories), best_epochs=best)
    figures["folds"] = plots.fold_metrics(
        metrics["per_fold"],
        {name: pooled["value"] for name, pooled in metrics["pooled"].items()},
        intervals_of(metrics),
    )
    return figures


def add_figures(report: Report, figures: dict[str, Figure], folder: Path) -> None:
    """Write each figure to ``plots/`` and show them together."""
    paths = {name: plots.save_png(figure, folder / "plots" / f"{name}.png") for name, figure in figures.items()}
    report.add_heading("Curves")
    report.add_gallery([(path, name.replace("_", " ")) for name, path in paths.items()])
