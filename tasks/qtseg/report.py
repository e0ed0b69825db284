"""The report of a cross-validation or an evaluation: figures, tables, the worst images with outlines and errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tasks.common import plots
from tasks.common.crossval import Fold
from tasks.common.report import Report
from tasks.common.result_report import add_figures
from tasks.common.segmentation.metrics_plots import metric_per_fold, pixel_curves
from tasks.common.segmentation.overlays import segmentation_figure
from tasks.common.segmentation.ranking_counts import RankingCounts
from tasks.common.segmentation.reporting import add_run_details, is_missing, key_figures, learning_curves, with_interval
from tasks.common.segmentation.summary import metric_label, metrics_table
from tasks.qtseg.data import ImageSet2D
from tasks.qtseg.loading import read_sample
from tasks.qtseg.mask_files import read_mask_of

KEY = ("dice", "iou", "cldice", "hd95_px", "auc")
_COLUMNS = ("case_id", "patient", "fold", "dice", "iou", "sensitivity", "precision", "hd95_px", "auc", "cldice", "mae")


def write_report(
    images: ImageSet2D,
    folds: Sequence[Fold],
    table: pd.DataFrame,
    rankings: RankingCounts | None,
    metrics: dict[str, Any],
    cfg: DictConfig,
    folder: Path,
    title: str = "",
) -> None:
    """Write ``report.html``, ``plots/`` and ``worst/``."""
    released = metrics["protocol"] == "released"
    heading = title or f"Segmentation with {metrics['network']}"
    report = Report(f"{heading} (released protocol)" if released else heading, _subtitle(metrics))
    unseen = "Results on the images that the epoch was chosen on" if released else "Results on images not seen before"
    report.add_heading(unseen if folds else "Results")
    report.add_key_figures(key_figures(metrics, KEY))
    report.add_notes(metrics["notes"])
    if "baseline" in metrics:
        baseline = metrics["baseline"]
        report.add_text(f"For comparison: {baseline['what']} has a mean Dice of {baseline['dice']:.3f}.")
    report.add_table(metrics_table(metrics), f"Mean of the images. Intervals: {metrics['interval']}.")
    for sentence in metrics["definitions"]:
        report.add_text(sentence)
    report.add_heading("All pixels together")
    report.add_table(_pixel_rows(metrics), "Counts of all images added up; large images weigh more. F1 is the Dice.")
    if "cost" in metrics:
        report.add_text(_cost_sentence(metrics["cost"]))
    add_figures(report, _figures(folds, table, rankings, folder), folder)
    if (folder / "samples.png").exists():
        report.add_heading("What the network was shown")
        report.add_figure(folder / "samples.png", "Training images as they were augmented; grey does not count.")
    _add_worst(report, images, table, int(cfg.evaluation.worst), folder)
    report.add_heading("All images")
    shown = table[[column for column in _COLUMNS if column in table]]
    report.add_details(f"All {len(table)} images, worst first", shown.round(3).to_string(index=False))
    add_run_details(report, folder)
    report.write(folder / "report.html")


def print_result(metrics: dict[str, Any]) -> None:
    """The key figures on standard output."""
    released = "RELEASED PROTOCOL; " if metrics["protocol"] == "released" else ""
    title = f"{metrics['network']}: {released}{_subtitle(metrics)}"
    table = Table(title=title, show_header=False, title_justify="left")
    for label, value, span in key_figures(metrics, KEY):
        table.add_row(label, f"{value} ({span})" if span else value)
    if "second_reader" in metrics:
        table.add_row("Dice of the second reader", with_interval(metrics["second_reader"]["pooled"]["dice"]))
    table.add_row("F1 of all pixels together", with_interval(metrics["pixels"]["dice"]))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _subtitle(metrics: dict[str, Any]) -> str:
    of = f" of {metrics['patients']} patients" if metrics["patients"] < metrics["cases"] else ""
    return f"{metrics['cases']} images{of}; {', '.join(metrics['classes'][1:])}"


def _pixel_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    second = metrics.get("second_reader")
    rows = []
    for name, row in metrics["pixels"].items():
        shown = {"Metric": "F1" if name == "dice" else metric_label(name), "All pixels": with_interval(row)}
        if second is not None:
            shown["Second reader"] = with_interval(second["pixels"].get(name))
            shown["Second reader, mean of images"] = with_interval(second["pooled"].get(name))
        rows.append(shown)
    if second is not None and "cldice" in second["pooled"]:
        mean = with_interval(second["pooled"]["cldice"])
        rows.append({"Metric": "clDice", "Second reader, mean of images": mean})
    return rows


def _cost_sentence(cost: dict[str, Any]) -> str:
    height, width = cost["size"]
    left_out = f" without {', '.join(cost['uncounted'])}," if cost["uncounted"] else ""
    return (
        f"The network has {cost['parameters'] / 1e6:.2f} million parameters; an image of {height} x {width} pixels "
        f"takes {cost['flops'] / 1e9:.2f} x 10⁹ operations,{left_out} a multiply-add being two, and "
        f"{1 / cost['images_per_second']:.3f} s ({cost['device']})."
    )


def _figures(
    folds: Sequence[Fold], table: pd.DataFrame, rankings: RankingCounts | None, folder: Path
) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if rankings is not None:
        together = RankingCounts(rankings.inside.sum(0), rankings.outside.sum(0))
        if together.inside.any() and together.outside.any():
            figures["pixel_curves"] = pixel_curves({"all pixels": together})
    if "fold" in table and table["fold"].nunique() > 1:
        figures["dice_by_fold"] = metric_per_fold(table)
    return figures | learning_curves(folds, folder)


def _add_worst(report: Report, images: ImageSet2D, table: pd.DataFrame, count: int, folder: Path) -> None:
    chosen = table.drop_duplicates("case_id").head(count)
    if not len(chosen):
        return
    pictures: list[tuple[Path, str]] = []
    for number, row in enumerate(chosen.to_dict("records"), start=1):
        (sample,) = images.select([row["case_id"]])
        image, reference, fov = read_sample(sample, images.coding)
        drawn = segmentation_figure(image, reference, read_mask_of(folder / row["mask"]), images.classes, region=fov)
        path = plots.save_png(drawn, folder / "worst" / f"{number:02d}.png")
        dice = "no structure" if is_missing(row["dice"]) else f"Dice {row['dice']:.3f}"
        share = float(np.mean(reference > 0))
        pictures.append((path, f"{sample.case_id}: {dice}; {share:.1%} of the image in the reference"))
    report.add_heading("Worst images")
    for picture, caption in pictures:
        report.add_figure(picture, caption)
