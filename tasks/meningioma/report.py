"""The report of a cross-validation or an evaluation: figures, tables, the worst cases as slices with outlines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tasks.common import plots
from tasks.common.crossval import Fold
from tasks.common.files import atomic_path
from tasks.common.report import Report
from tasks.common.result_report import add_figures
from tasks.common.segmentation.metrics_plots import bland_altman_plot, dice_by_volume, metric_per_fold, recall_by_volume
from tasks.common.segmentation.pictures import volume_figure
from tasks.common.segmentation.reporting import add_run_details, is_missing, key_figures, learning_curves, with_interval
from tasks.common.segmentation.summary import metrics_table, volume_table
from tasks.common.volumes.reading import read_label
from tasks.meningioma.cases import CaseSet
from tasks.meningioma.outcomes import growth_table

KEY = ("dice", "dice_tp", "patient_f1", "patient_recall", "patient_precision", "hd95")
_COLUMNS = ("case_id", "patient", "fold", "dice", "reference_ml", "predicted_ml", "hd95", "found_objects")
_RATES = {"recall": "Recall", "precision": "Precision", "f1": "F1", "specificity": "Specificity"}
_OBJECTS = {
    "recall": "objects found",
    "recall_large": "of the large ones",
    "recall_small": "of the small ones",
    "precision": "predicted objects that are right",
    "f1": "F1",
}


def write_report(
    cases: CaseSet,
    folds: Sequence[Fold],
    table: pd.DataFrame,
    metrics: dict[str, Any],
    cfg: DictConfig,
    folder: Path,
    title: str = "",
) -> None:
    """Write ``report.html``, ``plots/``, ``worst/`` and, where patients have several dated scans, ``growth.csv``."""
    report = Report(title or f"Segmentation with {metrics['network']}", _subtitle(metrics))
    report.add_heading("Results on cases the networks had not seen" if folds else "Results")
    report.add_key_figures(key_figures(metrics, KEY))
    report.add_notes(metrics["notes"])
    if "baseline" in metrics:
        baseline = metrics["baseline"]
        report.add_text(f"For comparison: {baseline['what']} has a mean Dice of {baseline['dice']:.3f}.")
    report.add_table(metrics_table(metrics), f"Intervals: {metrics['interval']}; they speak of other patients.")
    for sentence in metrics["definitions"]:
        report.add_text(sentence)
    report.add_heading("By volume")
    limit = metrics["volume_limit_ml"]
    report.add_table(volume_table(metrics), f"Structures up to and above {limit:g} ml in the reference.")
    report.add_heading("Found or missed")
    report.add_table(_convention_rows(metrics), "Patients, under three conventions.")
    report.add_table(_object_rows(metrics), "Objects: connected components, matched one to one.")
    _add_growth(report, cases, table, cfg, folder)
    add_figures(report, _figures(folds, table, metrics, folder), folder)
    _add_worst(report, cases, table, int(cfg.evaluation.worst), folder)
    report.add_heading("All cases")
    shown = table[[column for column in _COLUMNS if column in table]]
    report.add_details(f"All {len(table)} cases, worst first", shown.round(3).to_string(index=False))
    if (folder / "cases.csv").exists():
        facts = pd.read_csv(folder / "cases.csv")
        report.add_details("What the set holds", facts.round(2).to_string(index=False))
    add_run_details(report, folder)
    report.write(folder / "report.html")


def print_result(metrics: dict[str, Any]) -> None:
    """The key figures on standard output."""
    table = Table(title=f"{metrics['network']}: {_subtitle(metrics)}", show_header=False, title_justify="left")
    for label, value, span in key_figures(metrics, KEY):
        table.add_row(label, f"{value} ({span})" if span else value)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _subtitle(metrics: dict[str, Any]) -> str:
    of = f" of {metrics['patients']} patients" if metrics["patients"] < metrics["cases"] else ""
    return f"{metrics['cases']} cases{of}; {', '.join(metrics['classes'][1:])}"


def _convention_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name, values in metrics["conventions"].items():
        row = {"Convention": name}
        for rate, label in _RATES.items():
            row[label] = with_interval(values.get(f"patient_{rate}"))
        row["Dice-TP"] = with_interval(values.get("dice_tp"))
        rows.append(row)
    return rows


def _object_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    objects = metrics["objects"]
    return [
        {"Objects": label, "Share": with_interval(objects[name]), "Of": str(objects[name]["of"])}
        for name, label in _OBJECTS.items()
    ]


def _figures(folds: Sequence[Fold], table: pd.DataFrame, metrics: dict[str, Any], folder: Path) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    with_reference = table[table["reference_ml"] > 0]
    if len(with_reference):
        figures["dice_by_volume"] = dice_by_volume(
            with_reference["dice"], with_reference["reference_ml"], metrics["volume_limit_ml"]
        )
        figures["recall_by_volume"] = recall_by_volume(metrics)
    if metrics["volumes"]:
        there = table[(table["reference_ml"] > 0) | (table["predicted_ml"] > 0)]
        figures["volume_agreement"] = bland_altman_plot(there["predicted_ml"], there["reference_ml"])
    if "fold" in table and table["fold"].nunique() > 1:
        figures["dice_by_fold"] = metric_per_fold(table)
    return figures | learning_curves(folds, folder)


def _add_growth(report: Report, cases: CaseSet, table: pd.DataFrame, cfg: DictConfig, folder: Path) -> None:
    masks = {row["case_id"]: folder / row["mask"] for row in table.to_dict("records")}
    found = growth_table(cases.cases, masks, float(cfg.evaluation.level), int(cfg.seed))
    if not len(found):
        return
    with atomic_path(folder / "growth.csv") as temporary:
        found.to_csv(temporary, index=False)
    report.add_heading("Growth")
    report.add_table(
        found.round(2),
        "Between successive scans, from the predicted masks; intervals hold what the voxels' size and place alone do.",
    )


def _add_worst(report: Report, cases: CaseSet, table: pd.DataFrame, count: int, folder: Path) -> None:
    chosen = table.drop_duplicates("case_id").head(count)
    if not len(chosen):
        return
    by_id = {case.case_id: case for case in cases.cases}
    pictures: list[tuple[Path, str]] = []
    for number, row in enumerate(chosen.to_dict("records"), start=1):
        case = by_id[row["case_id"]]
        image = case.read_images()[0]
        predicted = read_label(folder / row["mask"]).data
        drawn = volume_figure(image.data, image.affine, cases.read_label(case).data, predicted)
        path = plots.save_png(drawn, folder / "worst" / f"{number:02d}.png")
        dice = "no structure" if is_missing(row["dice"]) else f"Dice {row['dice']:.3f}"
        caption = f"{case.case_id}: {dice}; {row['reference_ml']:.2f} ml in the reference, {row['predicted_ml']:.2f} ml"
        pictures.append((path, f"{caption} predicted"))
    report.add_heading("Worst cases")
    report.add_gallery(pictures)
