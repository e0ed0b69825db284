"""The table at the end of a sweep: one row per job, the metrics side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from tasks.common.files import atomic_path
from tasks.common.runs import COMPARISON

_SHOWN = (
    "dice",
    "iou",
    "cldice",
    "auc",
    "f1_macro",
    "balanced_accuracy",
    "accuracy",
    "accuracy_top5",
    "kappa_quadratic",
)
# What a model costs, where the task says so, with how it is written.
_COST = {"parameters": "{:,.0f}", "flops": "{:.3g}", "images_per_second": "{:.4g}"}


def write_comparison(outcomes: Sequence[tuple[list[str], Path, dict[str, Any] | None]]) -> None:
    """Print the jobs' pooled metrics with intervals, and write ``comparison.csv`` into the sweep's folder."""
    if not outcomes:
        return
    rows = []
    common = set.intersection(*(set(overrides) for overrides, _, _ in outcomes))
    for overrides, out, metrics in outcomes:
        if not metrics or "pooled" not in metrics:
            continue
        row: dict[str, Any] = {"job": " ".join(o for o in overrides if o not in common) or " ".join(overrides)}
        for name, pooled in metrics["pooled"].items():
            row[name] = pooled["value"]
            if "low" in pooled:
                row |= {f"{name}_low": pooled["low"], f"{name}_high": pooled["high"]}
        row |= {name: metrics["cost"][name] for name in _COST if name in metrics.get("cost", {})}
        rows.append({**row, "folder": metrics.get("folder", str(out))})
    if not rows:
        return
    frame = pd.DataFrame(rows)
    path = Path(rows[0]["folder"]).parent / COMPARISON
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)
    table = Table(title="Over all folds, with intervals over patients")
    table.add_column("job", overflow="fold", min_width=24)
    shown = [name for name in _SHOWN if name in frame]
    for name in shown:
        table.add_column(name, justify="right")
    costs = [name for name in _COST if name in frame]
    for name in costs:
        table.add_column(name.replace("_per_", "/").replace("_", " "), justify="right")
    for record in json.loads(frame.to_json(orient="records")):
        cells = []
        for name in shown:
            low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
            value = record[name]
            text = "-" if value is None else f"{value:.3f}"
            cells.append(text + (f" ({low:.3f}-{high:.3f})" if low is not None and high is not None else ""))
        cells += ["-" if record[name] is None else _COST[name].format(record[name]) for name in costs]
        table.add_row(record["job"], *cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"comparison: {path}")
