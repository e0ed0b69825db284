"""The report of a cross-validation: figures, cost, early exits, and the images that were judged worst."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.table import Table

from tasks.classification import exits
from tasks.classification.checkpoint import load_checkpoint
from tasks.classification.data import ImageSet
from tasks.classification.loading import Images
from tasks.common.checkpoints import FILE_NAME, fold_name
from tasks.common.cost import measure
from tasks.common.crossval import Fold
from tasks.common.devices import device_for
from tasks.common.files import atomic_path
from tasks.common.metrics import METRIC_LABELS
from tasks.common.plots import save_png
from tasks.common.report import Report, format_value
from tasks.common.result_report import add_figures, metrics_table, prediction_figures, training_figures

_THUMBNAIL = 320  # pixels of the longer side
KEY = ("accuracy", "accuracy_top5", "balanced_accuracy", "f1_macro", "auc")


def measure_cost(fold: Path, cfg: DictConfig) -> dict[str, Any]:
    """Parameters, operations and speed of the network in a fold's folder."""
    model, description = load_checkpoint(fold / FILE_NAME)
    return asdict(measure(model, description.preprocessing.img_size, device_for(cfg.inference.device)))


def write_report(
    images: ImageSet,
    store: Images,
    folds: Sequence[Fold],
    predictions: pd.DataFrame,
    metrics: dict[str, Any],
    cfg: DictConfig,
    folder: Path,
) -> None:
    """Write ``report.html``, ``plots/`` and ``worst/``."""
    report = Report(f"Image classification with {title(metrics)}", _subtitle(metrics))
    report.add_heading("Results on images the networks had not seen")
    report.add_key_figures(key_figures(metrics))
    report.add_notes(metrics["notes"])
    baseline = metrics["baseline"]
    report.add_text(
        f"For comparison: {baseline['what']}, has an accuracy of {baseline['accuracy']:.3f}; naming the largest class "
        f"always, {baseline['largest_class']:.3f}."
    )
    report.add_table(metrics_table(metrics), f"Intervals: {metrics['interval']}; they speak of other patients.")
    report.add_heading("Cost")
    report.add_table([{"": name, "value": value} for name, value in cost_rows(metrics["cost"])])
    figures = prediction_figures(predictions, images) | training_figures(folds, folder, metrics)
    add_figures(report, figures, folder)
    _add_exits(report, folds, metrics, folder)
    add_worst(report, predictions, images, store, cfg.evaluation.worst, folder)
    report.add_heading("All images")
    report.add_details(f"All {len(predictions)} predictions", predictions.round(4).to_string(index=False))
    report.add_details("Configuration", (folder / "config.yaml").read_text())
    report.add_details("Versions", json.dumps(json.loads((folder / "run.json").read_text())["versions"], indent=2))
    report.write(folder / "report.html")


def title(metrics: dict[str, Any]) -> str:
    """Backbone and attention in a few words."""
    return metrics["backbone"] + (f" + {metrics['attention']}" if metrics.get("attention") else "")


def _subtitle(metrics: dict[str, Any]) -> str:
    of = f" of {metrics['patients']} patients" if metrics["patients"] < metrics["cases"] else ""
    return f"{metrics['cases']} images{of}, {metrics['img_size']} pixels; classes {', '.join(metrics['classes'])}"


def key_figures(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers a reader looks for first: label, value, interval."""
    figures = []
    for name in KEY:
        pooled = metrics["pooled"].get(name)
        if pooled is not None:
            span = f"{format_value(pooled['low'])} – {format_value(pooled['high'])}" if "low" in pooled else ""
            figures.append((METRIC_LABELS[name], format_value(pooled["value"]), span))
    if "baseline" in metrics:
        figures.append(("Accuracy of mean colours", format_value(metrics["baseline"]["accuracy"]), "linear classifier"))
    return figures


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each cost, as text."""
    partial = f", without {', '.join(cost['uncounted'])}" if cost["uncounted"] else ""
    return [
        ("Parameters", f"{cost['parameters'] / 1e6:.3g} M"),
        ("Operations per image", f"{cost['flops'] / 1e9:.3g} G (a multiply-add is two{partial})"),
        ("Speed", f"{cost['images_per_second']:.4g} images/s ({cost['device']}, batches of {cost['batch']})"),
    ]


def print_result(metrics: dict[str, Any]) -> None:
    """The result and what it costs, on standard output."""
    table = Table(title=f"{title(metrics)}: {_subtitle(metrics)}", show_header=False, title_justify="left")
    for label, value, span in key_figures(metrics):
        table.add_row(label, f"{value} ({span})" if span else value)
    for label, value in cost_rows(metrics["cost"]) if "cost" in metrics else ():
        table.add_row(label, value)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _add_exits(report: Report, folds: Sequence[Fold], metrics: dict[str, Any], folder: Path) -> None:
    found = [folder / fold_name(fold) / "exits.json" for fold in folds]
    contents = [json.loads(path.read_text()) for path in found if path.exists()]
    if not contents:
        return
    table = exits.pooled([content["curve"] for content in contents])
    with atomic_path(folder / "exits.csv") as temporary:
        table.to_csv(temporary, index=False)
    report.add_heading("Leaving early")
    report.add_text(
        "An image leaves the network at the first exit that is sure enough of it. The thresholds were chosen on the "
        "validation images of each fold, the accuracy is that of its test images."
    )
    if "saved" in table:
        drawn = exits.figure(table, metrics["pooled"]["accuracy"]["value"])
        report.add_figure(save_png(drawn, folder / "plots" / "exits.png"), "accuracy against operations saved")
    report.add_table(table)


def add_worst(
    report: Report, predictions: pd.DataFrame, images: ImageSet, store: Images, count: int, folder: Path
) -> None:
    """Thumbnails of the images whose true class got the lowest probability; ``predictions`` has the worst first."""
    by_id = {sample.case_id: sample for sample in images.samples}
    chosen = predictions.drop_duplicates("case_id").head(count)
    if not len(chosen):
        return
    pictures: list[tuple[Path, str]] = []
    for number, row in enumerate(chosen.to_dict("records"), start=1):
        picture = Image.fromarray(store.get(by_id[row["case_id"]]))
        scale = _THUMBNAIL / max(picture.size)
        side = [max(1, round(length * scale)) for length in picture.size]
        picture = picture.resize((side[0], side[1]), Image.Resampling.BICUBIC)
        path = folder / "worst" / f"{number:02d}.png"
        with atomic_path(path) as temporary:
            picture.save(temporary)
        caption = f"{row['case_id']}: {row['label']}, taken for {row['predicted']}; probability of {row['label']} "
        pictures.append((path, f"{caption}{row['p_true']:.2f}"))
    report.add_heading("Judged worst")
    report.add_gallery(pictures)
