"""Benchmarks, ours beside a peer in one run: ``python -m tasks.bench [TASK ...] [--json FILE]``.

Each section is a module with ``rows() -> Iterator[BenchRow]``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernels.errors import InputError, unknown_name
from tasks.common.bench import BenchRow
from tasks.common.files import atomic_path

SECTIONS = {
    "wsi_mil": {"training": "tasks.wsi_mil.bench_training", "slides": "tasks.wsi_mil.bench_slides"},
    "backbones": {"throughput": "tasks.common.bench_backbones"},
}
"""The module of each section, by what is benchmarked."""

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named on the command line, print a table, return the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as every task does
    parser = argparse.ArgumentParser(prog="python -m tasks.bench", description="Time the toolkit beside its peers.")
    parser.add_argument("task", nargs="*", help=f"which task's benchmarks: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw what can be drawn (backbones) as PNG")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        for task in chosen.task:
            if task not in SECTIONS:
                raise unknown_name("task", task, SECTIONS)
        rows = [row for task in chosen.task or SECTIONS for row in _task_rows(task, console)]
        if chosen.plot is not None:
            from tasks.common.bench_backbones import plot

            with atomic_path(chosen.plot) as path:
                plot(rows, path)
        if chosen.json is not None:
            with atomic_path(chosen.json) as path:
                path.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=2))
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    return 0


def _task_rows(task: str, console: Console) -> Iterator[BenchRow]:
    """Rows of every section of ``task``; each section's table is printed when it is complete."""
    for section, module in SECTIONS[task].items():
        if importlib.util.find_spec(module) is None:
            console.print(f"{task} {section}: absent, there is no {module}")
            continue
        rows = []
        for row in importlib.import_module(module).rows():
            _log.info("%s: ratio %.2f", row.name, row.ratio)
            rows.append(row)
        console.print(table(f"{task} {section}", rows))
        yield from rows


def table(title: str, rows: Sequence[BenchRow]) -> Table:
    """``rows`` for the terminal; a ratio above 1 says that ours is better."""
    shown = Table("what", "ours", "peer", "ratio", "our peak", "peer is", title=title, title_justify="left")
    for column in shown.columns[1:5]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        peak = "" if row.peak_mb is None else f"{row.peak_mb:,.0f} MB"
        shown.add_row(
            row.name,
            quantity(row.ours, row.unit),
            quantity(row.peer, row.unit),
            f"{row.ratio:.2f}",
            peak,
            row.peer_name,
        )
    return shown


def quantity(value: float, unit: str) -> str:
    """A number of sensible length with its unit; short times in milliseconds."""
    if unit == "s" and value < 1:
        return f"{value * 1e3:.1f} ms"
    return f"{value:,.4g} {unit}" if value < 1e4 else f"{value:,.0f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
