"""Benchmarks, ours beside a peer in one run: ``python -m tasks.bench [TASK ...] [--json FILE] [--markdown FILE]``.

Each section is a module with ``rows() -> Iterator[BenchRow]``. With ``--matrix``, every combination of a task's parts
is tried instead, and the exit code says whether all could be.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernels.bench import check_places, describe, write, write_json
from kernels.errors import InputError, unknown_name
from kernels.threads import spin_briefly
from tasks.common.bench import BenchRow
from tasks.common.files import atomic_path

SECTIONS = {
    "wsi_mil": {"training": "tasks.wsi_mil.bench_training", "slides": "tasks.wsi_mil.bench_slides"},
    "meningioma": {"data": "tasks.meningioma.bench_data", "networks": "tasks.meningioma.bench_networks"},
    "qtseg": {"data": "tasks.qtseg.bench_data", "networks": "tasks.qtseg.bench_networks"},
    "backbones": {"throughput": "tasks.common.bench_backbones"},
}
"""The module of each section, by what is benchmarked."""
MATRICES = {"qtseg": "tasks.qtseg.bench_networks"}
"""The module whose ``matrix()`` tries everything that a task can be put together from, by task."""

SPINNER_HZ = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named on the command line, print a table, return the exit code."""
    spin_briefly()
    parser = argparse.ArgumentParser(prog="python -m tasks.bench", description="Time the toolkit beside its peers.")
    parser.add_argument("task", nargs="*", help=f"which task's benchmarks: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write tables to FILE, as in RESULTS.md")
    parser.add_argument("--matrix", action="store_true", help="one training step with every backbone and attention")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw what can be drawn (backbones) as PNG")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        for task in chosen.task:
            if task not in SECTIONS:
                raise unknown_name("task", task, SECTIONS)
        if chosen.matrix:
            return max([run_matrix(task, console) for task in chosen.task or MATRICES], default=0)
        found: dict[str, list[BenchRow]] = {}
        check_places(chosen.json, chosen.markdown, chosen.plot)
        try:
            for task in chosen.task or SECTIONS:
                for title, row in _measured(task, console):
                    found.setdefault(title, []).append(row)
                    _save(chosen, found)  # at once: what was measured must outlive what comes next
        finally:
            _draw(chosen.plot, found)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        kept = [str(path) for path in (chosen.json, chosen.markdown, chosen.plot) if path is not None and path.exists()]
        where = f"; what is finished is in {' and '.join(kept)}" if kept else ""
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"stopped{where}.", markup=False)
        return 130
    return 0


def run_matrix(task: str, console: Console) -> int:
    """Try all that a task can be put together from, a line for each; 1 where anything fails, else 0.

    Raises:
        InputError: the task has no such list.
    """
    if task not in MATRICES:
        raise InputError(f"--matrix is there for {', '.join(MATRICES)}, not for {task}.")
    tried = failed = 0
    for outcome in importlib.import_module(MATRICES[task]).matrix():
        tried, failed = tried + 1, failed + (not outcome.ok)
        console.print(f"{'ok    ' if outcome.ok else 'FAILED'} {outcome.name}: {outcome.said}", markup=False)
    console.print(f"{task}: {tried - failed} of {tried} combinations can be trained and used")
    return int(failed > 0)


def _measured(task: str, console: Console) -> Iterator[tuple[str, BenchRow]]:
    """Each row with the title of its section; a section's table is printed when it is complete."""
    for section, module in SECTIONS[task].items():
        title = f"{task} {section}"
        if importlib.util.find_spec(module) is None:
            console.print(f"{title}: absent, there is no {module}")
            continue
        rows: list[BenchRow] = []
        # On a terminal: which row is done, while the next is timed. Rarely drawn, so as not to disturb the times.
        with console.status(title, refresh_per_second=SPINNER_HZ) as status:
            for row in importlib.import_module(module).rows():
                rows.append(row)
                status.update(f"{title}: {len(rows)} rows, {row.name}: ratio {row.ratio:.2f}")
                yield title, row
        console.print(table(title, rows))


def _save(chosen: argparse.Namespace, found: Mapping[str, Sequence[BenchRow]]) -> None:
    if chosen.json is not None:
        write_json(chosen.json, [asdict(row) | {"ratio": row.ratio} for row in _all(found)])
    if chosen.markdown is not None:
        write(chosen.markdown, markdown(found))


def _draw(file: Path | None, found: Mapping[str, Sequence[BenchRow]]) -> None:
    if file is None or not found:
        return
    from tasks.common.bench_plot import plot

    with atomic_path(file) as path:
        plot(_all(found), path)


def _all(found: Mapping[str, Sequence[BenchRow]]) -> list[BenchRow]:
    return [row for rows in found.values() for row in rows]


def markdown(sections: Mapping[str, Sequence[BenchRow]]) -> str:
    """Every section as a Markdown table, after the machine and the versions it was measured with."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"* {name}: {value}" for name, value in describe(device).items()]
    for title, rows in sections.items():
        lines += ["", f"### {title}", "", "| what | ours | peer | ratio | our peak memory | peer is |"]
        lines += ["|---|---:|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def table(title: str, rows: Sequence[BenchRow]) -> Table:
    """``rows`` for the terminal; a ratio above 1 says that ours is better."""
    shown = Table("what", "ours", "peer", "ratio", "our peak", "peer is", title=title, title_justify="left")
    for column in shown.columns[1:5]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: BenchRow) -> list[str]:
    peak = "" if row.peak_mb is None else f"{row.peak_mb:,.0f} MB"
    rates = quantity(row.ours, row.unit), quantity(row.peer, row.unit)
    return [row.name, *rates, f"{row.ratio:.2f}", peak, row.peer_name]


def quantity(value: float, unit: str) -> str:
    """A number of sensible length with its unit; short times in milliseconds."""
    if unit == "s" and value < 1:
        return f"{value * 1e3:.1f} ms"
    return f"{value:,.4g} {unit}" if value < 1e4 else f"{value:,.0f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
