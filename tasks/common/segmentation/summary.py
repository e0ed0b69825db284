"""A table of segmented cases in one dictionary: metrics with intervals, by volume and by fold, ready for a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.bootstrap import Interval, Spread
from tasks.common.report import metric_rows
from tasks.common.segmentation.intervals import Found, Statistics, case_statistics, statistic_intervals
from tasks.common.segmentation.patientwise import CONVENTIONS, VOLUME_LIMIT_ML, by_volume, pool_folds
from tasks.common.segmentation.surface import DEFINITION

Floats = NDArray[np.float64]

# How each metric of a case is written for a reader, in the order of a table.
CASE_METRIC_LABELS = {
    "dice": "Dice",
    "dice_tp": "Dice-TP (of those found)",
    "iou": "IoU",
    "patient_recall": "Recall (patient-wise)",
    "patient_precision": "Precision (patient-wise)",
    "patient_f1": "F1 (patient-wise)",
    "patient_specificity": "Specificity (patient-wise)",
    "patient_accuracy": "Accuracy (patient-wise)",
    "patient_balanced_accuracy": "Balanced accuracy (patient-wise)",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
    "accuracy": "Accuracy",
    "mae": "Mean absolute error",
    "nsd": "Surface Dice",
    "hd95": "HD95 (mm)",
    "hd95_px": "HD95 (pixels)",
    "hd100": "Hausdorff distance (mm)",
    "assd": "Mean surface distance (mm)",
    "assd_px": "Mean surface distance (pixels)",
    "asd_reference_to_predicted": "Mean distance reference to predicted (mm)",
    "asd_predicted_to_reference": "Mean distance predicted to reference (mm)",
    "cldice": "clDice",
    "topology_precision": "Topology precision",
    "topology_sensitivity": "Topology sensitivity",
    "auc": "AUC (pixels)",
    "average_precision": "Average precision (pixels)",
    "object_dice": "Dice (objects)",
    "object_recall": "Recall (voxels of objects)",
    "object_precision": "Precision (voxels of objects)",
}
_SURFACE = (
    "nsd",
    "hd95",
    "hd95_px",
    "hd100",
    "assd",
    "assd_px",
    "asd_reference_to_predicted",
    "asd_predicted_to_reference",
)
_OF_EACH_CLASS = ("patient_recall", "dice_tp")  # the others need cases without a structure


def summarise_cases(
    table: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    found: Found | None = None,
    volume_limit_ml: float = VOLUME_LIMIT_ML,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of a table of cases with intervals over patients, by volume of the structure, and over the folds.

    Args:
        table: one row for each case: ``case_id``; metrics, NaN where undefined; where known ``patient``, ``fold``,
            ``repeat``, ``reference_ml`` and ``predicted_ml``, without which there is nothing patient-wise.
        metrics: columns to average; by default those of :data:`CASE_METRIC_LABELS`, also ``dice/NAME`` of one class.
        found: when a patient counts as found; by default a Dice above 0 and any volume.
        volume_limit_ml: where the cases are split by volume.
        num_samples, level, seed: of the bootstrap.

    Returns:
        The shape of :func:`tasks.common.results.summarise`: ``cases``, ``patients``, ``interval``, ``pooled``
        (``value``, ``low``, ``high`` by metric), ``notes``, and ``folds`` (``mean``, ``sd``, ``n``) with ``per_fold``
        where there are folds; besides, ``definitions``, ``folds_pooled`` (mean weighted by size and SD of cases within
        folds) and ``by_volume`` (``cases`` and ``pooled`` by class).

    Raises:
        InputError: the table is empty, lacks ``case_id`` or holds no metric.
    """
    names = _metric_columns(table, metrics)
    patients = list(table["patient"] if "patient" in table else table["case_id"])
    patientwise = {"dice", "reference_ml", "predicted_ml"} <= set(table.columns)
    rule = (found or Found()) if patientwise else None
    sampling: dict[str, Any] = {"num_samples": num_samples, "level": level, "seed": seed}

    def pooled(statistics: Statistics) -> dict[str, dict[str, float]]:
        values = statistics(np.ones((1, len(table))))
        ends = statistic_intervals(statistics, len(table), patients, **sampling)
        ordered = sorted(values, key=_position)
        return {n: {"value": float(values[n][0]), "low": ends[n].low, "high": ends[n].high} for n in ordered}

    summary: dict[str, Any] = {
        "cases": int(table["case_id"].nunique()),
        "patients": len(set(patients)),
        "interval": f"{level:.0%}, {num_samples} bootstrap resamples of patients",
        "pooled": pooled(case_statistics(table, names, rule)),
        "definitions": _definitions(names, rule),
    }
    summary["notes"] = [*_left_out(table, names), *_degenerate(summary["pooled"], len(table))]
    if patientwise:
        summary["volume_limit_ml"] = volume_limit_ml
        summary["by_volume"] = {}
        for name, members in by_volume(table["reference_ml"].to_numpy(np.float64), volume_limit_ml).items():
            of_class = pooled(case_statistics(table, names, rule, members)) if members.any() else {}
            kept = {n: v for n, v in of_class.items() if not n.startswith("patient_") or n in _OF_EACH_CLASS}
            summary["by_volume"][name] = {"cases": int(table.loc[members, "case_id"].nunique()), "pooled": kept}
    if "fold" in table:
        summary |= _folds(table, names, rule)
    return summary


def metrics_table(summary: dict[str, Any]) -> pd.DataFrame:
    """A row for each metric of a summary: value, interval, and mean and SD over the folds."""
    values = {name: row["value"] for name, row in summary["pooled"].items()}
    ends = {name: Interval(row["low"], row["high"]) for name, row in summary["pooled"].items()}
    spread = {name: Spread(row["mean"], row["sd"], row["n"]) for name, row in summary.get("folds", {}).items()}
    rows = metric_rows(values, ends, spread or None, summary["patients"], list(values))
    rows["Metric"] = [metric_label(name) for name in values]
    return rows


def volume_table(summary: dict[str, Any]) -> pd.DataFrame:
    """A row for each volume class of a summary: cases, and each metric with its interval."""
    rows = []
    for name, part in summary.get("by_volume", {}).items():
        row = {"Volume": name, "Cases": str(part["cases"])}
        for metric in ("dice", *_OF_EACH_CLASS):
            found = part["pooled"].get(metric)
            known = found is not None and not np.isnan(found["value"])
            row[metric_label(metric)] = (
                f"{found['value']:.3f} ({found['low']:.3f} – {found['high']:.3f})" if found and known else "–"
            )
        rows.append(row)
    return pd.DataFrame(rows)


def metric_label(name: str) -> str:
    """How a column is written for a reader.

    >>> metric_label("nsd_2mm"), metric_label("dice/tumour"), metric_label("my_metric")
    ('Surface Dice at 2 mm', 'Dice, tumour', 'my_metric')
    """
    base, _, of = name.partition("/")
    if base.startswith("nsd_") and base.endswith(("mm", "px")):
        label = f"{CASE_METRIC_LABELS['nsd']} at {base[4:-2]} {base[-2:]}"
    else:
        label = CASE_METRIC_LABELS.get(base, base)
    return f"{label}, {of}" if of else label


def _metric_columns(table: pd.DataFrame, metrics: Sequence[str] | None) -> list[str]:
    if not len(table) or "case_id" not in table:
        raise InputError("the table of cases is empty or has no column 'case_id'; there is nothing to summarise.")
    if metrics is None:
        numeric = [str(c) for c in table.select_dtypes("number").columns]
        metrics = sorted((c for c in numeric if _position(c)[0] < len(CASE_METRIC_LABELS)), key=_position)
    missing = [name for name in metrics if name not in table]
    if missing or not metrics:
        known = ", ".join(map(str, table.columns))
        raise InputError(f"the table of cases has no column '{(missing or ['dice'])[0]}'; it has {known}.")
    return list(metrics)


def _position(name: str) -> tuple[int, str]:
    """Where a metric stands in a table."""
    base = name.partition("/")[0]
    base = "nsd" if base.startswith("nsd_") else base
    order = list(CASE_METRIC_LABELS)
    return (order.index(base) if base in order else len(order), name)


def _folds(table: pd.DataFrame, names: Sequence[str], rule: Found | None) -> dict[str, Any]:
    statistics = case_statistics(table, names, rule)
    split = table[["repeat", "fold"]] if "repeat" in table else table[["fold"]].assign(repeat=0)
    per_fold, deviations = [], []
    numbers = split.to_numpy(np.int64)
    for repeat, fold in np.unique(numbers, axis=0).tolist():
        members = (numbers == (repeat, fold)).all(axis=1)
        values = statistics(members[None].astype(np.float64))
        scores = {name: float(value[0]) for name, value in values.items()}
        per_fold.append({"repeat": repeat, "fold": fold, "cases": int(members.sum())} | scores)
        deviations.append(table.loc[members, list(names)].std(ddof=1).to_numpy(np.float64))
    frame = pd.DataFrame(per_fold)
    means, sizes = frame[list(names)].to_numpy(np.float64), frame["cases"].tolist()
    weighted, within = pool_folds(means, np.stack(deviations), sizes)
    return {
        "folds": {
            name: {"mean": float(column.mean()), "sd": float(column.std(ddof=1)), "n": int(column.notna().sum())}
            for name, column in frame.drop(columns=["repeat", "fold", "cases"]).items()
        },
        "folds_pooled": {
            name: {"mean": float(mean), "sd": float(sd)} for name, mean, sd in zip(names, weighted, within, strict=True)
        },
        "per_fold": per_fold,
    }


def _definitions(names: Sequence[str], rule: Found | None) -> list[str]:
    """What the metrics mean, for the foot of a table."""
    sentences = []
    if rule is not None:
        sentences.append(
            f"Patient-wise ('{rule.convention}'): {CONVENTIONS[rule.convention]}; limit {rule.volume_limit_ml:g} ml, "
            f"found when the Dice is above {rule.overlap:g}."
        )
    if any(_position(name)[0] in _surface_positions() for name in names):
        sentences.append(DEFINITION)
    return sentences


def _surface_positions() -> set[int]:
    order = list(CASE_METRIC_LABELS)
    return {order.index(name) for name in _SURFACE}


def _left_out(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """How many cases each mean leaves out."""
    missing = table[list(names)].isna().sum()
    by_count: dict[int, list[str]] = {}
    for name in names:
        if missing[name]:
            by_count.setdefault(int(missing[name]), []).append(metric_label(name))
    return [
        f"{', '.join(labels)}: undefined in {count} of {len(table)} cases (an empty mask), which their mean leaves out."
        for count, labels in by_count.items()
    ]


def _degenerate(pooled: dict[str, dict[str, float]], cases: int) -> list[str]:
    flat = [metric_label(name) for name, row in pooled.items() if row["low"] == row["high"]]
    if not flat:
        return []
    return [f"{', '.join(flat)} came out the same in every resample; on {cases} cases that is no proof of certainty."]
