"""Accuracy of a network that may be left early, against what that saves (see :mod:`backbones.early_exit`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from backbones.early_exit import evaluate_exits, find_thresholds, geometric_shares

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)


def curve(
    val: Sequence[Tensor], test: Sequence[Tensor], target: Tensor, costs: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Accuracy on the test images (N, K) for thresholds of the validation images, from hasty to patient.

    Args:
        costs: of computing up to each exit; None where they are not known.

    Returns:
        rows of ``ratio``, ``thresholds``, ``images``, ``right``, ``shares`` per exit, and ``flops`` and ``saved`` (the
        share of the last exit's cost) where costs are known.
    """
    rows = []
    for ratio in _RATIOS:
        limits = find_thresholds(val, geometric_shares(ratio, len(val)))
        found = evaluate_exits(test, target, limits, costs)
        row: dict[str, Any] = {"ratio": ratio, "images": len(target), "right": round(found.accuracy * len(target))}
        row["shares"] = found.shares
        row["thresholds"] = [limit if math.isfinite(limit) else None for limit in limits]
        if costs is not None and found.cost is not None:
            row["flops"] = found.cost
            row["saved"] = 1 - found.cost / costs[-1]
        rows.append(row)
    return rows


def pooled(curves: Sequence[Sequence[dict[str, Any]]]) -> pd.DataFrame:
    """The curves of all folds as one: columns ratio, accuracy, flops, saved and share_1 ... of the exits."""
    table = []
    for rows in zip(*curves, strict=True):
        images = sum(row["images"] for row in rows)
        mean = {"ratio": rows[0]["ratio"], "accuracy": sum(row["right"] for row in rows) / images}
        for name in ("flops", "saved"):
            if name in rows[0]:
                mean[name] = sum(row[name] * row["images"] for row in rows) / images
        for k in range(len(rows[0]["shares"])):
            mean[f"share_{k + 1}"] = sum(row["shares"][k] * row["images"] for row in rows) / images
        table.append(mean)
    return pd.DataFrame(table)


def figure(table: pd.DataFrame, full: float) -> Figure:
    """Accuracy against the share of operations saved; ``full`` is the accuracy of the last exit for every image."""
    drawn = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = drawn.add_subplot()
    axes.plot(100 * table["saved"], table["accuracy"], "o-", color="#0072B2", label="thresholds of the validation set")
    axes.axhline(full, color="#777777", linestyle="--", linewidth=1, label="last exit for all")
    axes.set(xlabel="Operations saved (%)", ylabel="Accuracy")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
