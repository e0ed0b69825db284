"""Pictures of segmentation metrics, one function each; every function gives a matplotlib figure of its own.

As in :mod:`tasks.common.plots`, without pyplot and in the same colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from kernels.errors import InputError
from tasks.common.plots import PALETTE, class_colour
from tasks.common.segmentation.agreement import Unit, bland_altman, differences, volume_pairs
from tasks.common.segmentation.patientwise import VOLUME_LIMIT_ML
from tasks.common.segmentation.ranking import PixelRanking
from tasks.common.segmentation.ranking_counts import RankingCounts

_GREY = "#8a8a8a"
_DASHED = (0, (4, 4))


def bland_altman_plot(predicted: ArrayLike, reference: ArrayLike, unit: Unit = "absolute", of: str = "ml") -> Figure:
    """Difference of predicted and reference volume against their mean, with bias, limits and their 95 % intervals.

    Args:
        predicted, reference: (n,) volumes.
        unit: ``absolute`` differences in ``of``, or ``percent`` of the mean.
        of: unit of the volumes.
    """
    found = bland_altman(predicted, reference, unit)
    mean, difference = differences(*volume_pairs(predicted, reference), unit)
    figure, axes = _axes(6.0, 4.2)
    axes.plot(mean, difference, "o", color=PALETTE[0], markersize=4, alpha=0.7)
    percent = unit == "percent"
    sign = "%" if percent else of
    for value, ends, name in (
        (found.upper, found.upper_interval, "upper limit"),
        (found.bias, found.bias_interval, "bias"),
        (found.lower, found.lower_interval, "lower limit"),
    ):
        colour = PALETTE[1] if name == "bias" else _GREY
        axes.axhspan(ends.low, ends.high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(value, color=colour, linewidth=1.4, linestyle="-" if name == "bias" else _DASHED)
        label = f"{name} {value:+.3g} {sign}"
        axes.annotate(
            label, (1, value), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip
    positive = mean[mean > 0]
    if positive.size and positive.max() > 30 * positive.min():
        axes.set_xscale("symlog", linthresh=float(positive.min()))
    axes.set(xlabel=f"Mean of both volumes ({of})", ylabel=f"Predicted − reference ({sign})")
    return figure


def dice_by_volume(dice: ArrayLike, reference_ml: ArrayLike, limit_ml: float = VOLUME_LIMIT_ML) -> Figure:
    """Dice of each case against the volume of its reference on a logarithmic axis, with the median on either side.

    Cases that were missed (Dice 0) are crosses; cases without a reference have no place and are counted in the title.
    """
    d, v = np.asarray(dice, dtype=np.float64), np.asarray(reference_ml, dtype=np.float64)
    shown = (v > 0) & np.isfinite(d)
    figure, axes = _axes(6.0, 4.2)
    for marker, members, name in (("o", shown & (d > 0), "found"), ("x", shown & (d == 0), "missed")):
        if members.any():
            colour = PALETTE[0] if name == "found" else PALETTE[1]
            label = f"{name} ({members.sum()})"
            axes.plot(v[members], d[members], marker, color=colour, markersize=5, alpha=0.75, label=label)
    if shown.any():
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        for members, (start, stop) in ((v < limit_ml, (left, limit_ml)), (v >= limit_ml, (limit_ml, right))):
            if (shown & members).any() and stop > start:
                median = float(np.median(d[shown & members]))
                axes.plot([max(start, left), min(stop, right)], [median, median], color="black", linewidth=1.2)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.axvline(limit_ml, color=_GREY, linewidth=1, linestyle=_DASHED)
    axes.set(xlabel="Volume of the reference (ml)", ylabel="Dice", ylim=(-0.03, 1.03))
    if not shown.all():
        axes.set_title(f"{(~shown).sum()} cases without a reference are not shown", fontsize=9)
    return figure


def recall_by_volume(summary: Mapping[str, Any]) -> Figure:
    """Share of structures found in each volume class of :func:`~tasks.common.segmentation.summary.summarise_cases`.

    Raises:
        InputError: the summary has no volume classes.
    """
    classes = summary.get("by_volume") or {}
    shown = {name: part for name, part in classes.items() if "patient_recall" in part["pooled"]}
    if not shown:
        raise InputError("the summary has no volume classes; the table of cases needs 'reference_ml', 'predicted_ml'.")
    figure, axes = _axes(1.8 + 1.3 * len(shown), 3.8)
    for k, part in enumerate(shown.values()):
        recall = part["pooled"]["patient_recall"]
        axes.bar(k, recall["value"], width=0.6, color=PALETTE[5])
        axes.plot([k, k], [recall["low"], recall["high"]], color="black", linewidth=1.4)
        axes.annotate(f"{recall['value']:.2f}", (k, 0.02), ha="center", fontsize=9)
    axes.set_xticks(range(len(shown)), [f"{name}\n{part['cases']} cases" for name, part in shown.items()])
    axes.set(ylabel="Recall (patient-wise)", ylim=(0, 1.03))
    return figure


def metric_per_fold(table: pd.DataFrame, metric: str = "dice", label: str = "Dice", seed: int = 0) -> Figure:
    """A box and every case of each fold.

    Args:
        table: one row for each case, with ``fold`` and the column ``metric``; NaN is left out.
        seed: of the sideways scatter of the points.

    Raises:
        InputError: a column is missing.
    """
    missing = [name for name in ("fold", metric) if name not in table]
    if missing:
        raise InputError(
            f"the table of cases has no column '{missing[0]}'; it has {', '.join(map(str, table.columns))}."
        )
    known = table.dropna(subset=[metric])
    folds = sorted(known["fold"].unique())
    rng = np.random.default_rng(seed)
    figure, axes = _axes(1.6 + 0.9 * max(1, len(folds)), 3.8)
    for k, fold in enumerate(folds):
        values = known.loc[known["fold"] == fold, metric].to_numpy(np.float64)
        axes.boxplot(values, positions=[k], widths=0.6, showfliers=False, medianprops={"color": "black"})
        sideways = k + rng.uniform(-0.18, 0.18, len(values))
        axes.plot(sideways, values, "o", color=class_colour(k), markersize=4, alpha=0.6)
    axes.set_xticks(range(len(folds)), [f"fold {fold}" for fold in folds])
    axes.set_ylabel(label)
    return figure


def pixel_curves(rankings: Mapping[str, PixelRanking | RankingCounts]) -> Figure:
    """ROC and precision-recall curves of pixels, side by side, a line for each name.

    Raises:
        InputError: pixels of one kind only.
    """
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    roc, recall_precision = figure.subplots(1, 2)
    for k, (name, ranking) in enumerate(rankings.items()):
        fpr, recall, precision = ranking.curve()
        colour = class_colour(k)
        roc.plot(np.r_[0, fpr], np.r_[0, recall], color=colour, linewidth=2, label=f"{name}  AUC {ranking.auc:.4f}")
        label = f"{name}  AP {ranking.average_precision:.4f}"
        recall_precision.step(recall, precision, where="pre", color=colour, linewidth=2, label=label)
        recall_precision.axhline(ranking.prevalence, color=colour, linewidth=0.8, linestyle=_DASHED, zorder=0)
    roc.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=_DASHED, zorder=0)
    roc.set(xlabel="1 − specificity", ylabel="Sensitivity")
    recall_precision.set(xlabel="Recall", ylabel="Precision")
    for axes, corner in ((roc, "lower right"), (recall_precision, "lower left")):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.legend(frameon=False, fontsize=9, loc=corner)
        _tidy(axes)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
