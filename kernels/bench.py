"""Every operator beside its peers in one run.

    python -m kernels.bench [OPERATOR ...] [--device cpu|cuda] [--json FILE] [--markdown FILE] [--static]

An operator's cases are in ``kernels.<operator>.bench`` with ``cases(device) -> Iterator[Case]``. ``--static`` prints
what each Triton kernel compiles to instead; it needs no GPU.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kernels.errors import InputError, unknown_name
from kernels.threads import spin_briefly

if TYPE_CHECKING:
    import torch

    from kernels.measure import Machine, Result
    from kernels.static import Compiled


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the return value is the exit code."""
    spin_briefly()
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description="Time the operators beside their peers."
    )
    parser.add_argument("operator", nargs="*", help="which operators (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write tables to FILE, as in RESULTS.md")
    parser.add_argument("--static", action="store_true", help="compile every Triton kernel and print its resources")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180, soft_wrap=False)
    try:
        _check(chosen.operator)
        return _static(chosen, console) if chosen.static else _measure(chosen, console)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        kept = [str(path) for path in (chosen.json, chosen.markdown) if path is not None and path.exists()]
        where = f"; what is finished is in {' and '.join(kept)}" if kept else ""
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"stopped{where}.", markup=False)
        return 130


def _check(operators: Sequence[str]) -> None:
    from kernels.backend import OPERATORS

    for name in operators:
        if name not in OPERATORS:
            raise unknown_name("operator", name, OPERATORS)


# ------------------------------------------------------------------------------------------------------------- timings


def _measure(chosen: argparse.Namespace, console: Console) -> int:
    import torch

    from kernels.measure import measure_machine, run_case

    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that PyTorch can use here; take --device cpu.")
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    everything: list[Result] = []
    check_places(chosen.json, chosen.markdown)
    machine = measure_machine(device, [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else []))
    about = describe(device, machine)
    console.print("\n".join(f"{name}: {value}" for name, value in about.items()), markup=False)
    for package in bench_packages(chosen.operator):
        for case in importlib.import_module(f"{package}.bench").cases(device):
            results = run_case(case, machine, device)
            console.print(table(case.name, results))
            everything += results
            _save(chosen, about, everything)
    _save(chosen, about, everything)
    for path in filter(None, (chosen.json, chosen.markdown)):
        console.print(f"results are in {path}", markup=False)
    return 0


def _save(chosen: argparse.Namespace, about: Mapping[str, str], results: Sequence[Result]) -> None:
    """What is measured so far: a run of many minutes may be stopped."""
    if chosen.json is not None:
        write_json(chosen.json, {"machine": about, "results": [asdict(result) for result in results]})
    if chosen.markdown is not None:
        write(chosen.markdown, markdown(about, results))


def bench_packages(operators: Sequence[str]) -> list[str]:
    """The packages of these operators (default: all)."""
    from kernels.backend import OPERATORS

    modules = dict.fromkeys(OPERATORS[name].partition(":")[0] for name in operators or OPERATORS)
    return [module for module in modules if importlib.util.find_spec(f"{module}.bench")]


def describe(device: torch.device, machine: Machine | None = None) -> dict[str, str]:
    """The machine, its limits where they were measured, and the versions, for the head of a table."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    about = {
        "device": name,
        "versions": f"torch {torch.__version__}, triton {triton_version}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }
    if machine is not None:
        rates = ", ".join(
            f"{str(d).removeprefix('torch.')} {rate / 1e12:.3g} TFLOP/s" for d, rate in machine.matmul.items()
        )
        about["measured limits"] = f"copy {machine.copy / 1e9:.3g} GB/s, matrix product {rates}"
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(title: str, results: Sequence[Result]) -> Table:
    """One case for the terminal; a ratio above 1 is faster than the baseline."""
    shown = Table(title=f"{title} (1.00 = {results[0].baseline})", title_justify="left", show_edge=False)
    for column in (
        "implementation",
        "forward",
        "ratio",
        "forward+backward",
        "ratio",
        "GB/s",
        "GFLOP/s",
        "of roofline",
        "peak",
        "",
    ):
        shown.add_column(column, justify="left" if column in ("implementation", "") else "right", no_wrap=column != "")
    for r in results:
        shown.add_row(
            r.contestant,
            _seconds(r.forward),
            _number(r.forward_ratio),
            _seconds(r.both),
            _number(r.both_ratio),
            "" if r.bytes_per_second is None else f"{r.bytes_per_second / 1e9:.1f}",
            "" if r.flops_per_second is None else f"{r.flops_per_second / 1e9:.0f}",
            "" if r.roofline is None else f"{r.roofline:.0%}",
            "" if r.memory is None else f"{r.memory / 1e6:.0f} MB",
            r.note and f"absent: {r.note}",
        )
    return shown


def markdown(about: Mapping[str, str], results: Sequence[Result]) -> str:
    """The results as Markdown, one table for each case."""
    lines = [f"* {name}: {value}" for name, value in about.items()]
    for case in dict.fromkeys(result.case for result in results):
        rows = [result for result in results if result.case == case]
        lines += ["", f"### {case}", "", f"Ratios against {rows[0].baseline}; above 1 is faster.", ""]
        lines += ["| implementation | forward | ratio | forward+backward | ratio | of roofline | peak memory |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for r in rows:
            cells = [_seconds(r.forward), _number(r.forward_ratio), _seconds(r.both), _number(r.both_ratio)]
            cells += ["" if r.roofline is None else f"{r.roofline:.0%}"]
            cells += ["" if r.memory is None else f"{r.memory / 1e6:.0f} MB"]
            name = f"{r.contestant} (absent: {r.note})" if r.note else r.contestant
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.3f} ms" if value < 1 else f"{value:.2f} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# ------------------------------------------------------------------------------------------------------ compile reports


def _static(chosen: argparse.Namespace, console: Console) -> int:
    from kernels.static import compile_all

    rows = list(_with_count(compile_all(chosen.operator), console))
    console.print(static_table(rows))
    if chosen.json is not None:
        write_json(chosen.json, [asdict(row) for row in rows])
    broken = [row for row in rows if row.problem]
    for row in broken:
        where = f"{row.operator} {row.kernel} ({row.case}; {row.config}; sm_{row.capability})"
        console.print(f"{where}: {row.problem}", markup=False, highlight=False)
    return 1 if broken else 0


def _with_count(rows: Iterator[Compiled], console: Console) -> Iterator[Compiled]:
    with console.status("compiling") as status:
        for number, row in enumerate(rows, 1):
            status.update(f"compiling: {number} done, {row.operator} {row.kernel}")
            yield row


def static_table(rows: Sequence[Compiled]) -> Table:
    """What each kernel compiled to."""
    shown = Table(title="compiled without a GPU", title_justify="left", show_edge=False)
    for column in (
        "operator",
        "kernel",
        "case",
        "configuration",
        "sm",
        "registers",
        "spills",
        "shared",
        "tensor cores",
    ):
        shown.add_column(column, justify="right" if column in ("registers", "spills", "shared") else "left")
    for r in sorted(rows, key=lambda r: (r.operator, r.kernel, r.case, r.config, r.capability)):
        numbers = (str(r.registers), str(r.spills), f"{r.shared:,}") if r.registers else ("", "", "")
        shown.add_row(r.operator, r.kernel, r.case, r.config, str(r.capability), *numbers, r.tensor_cores)
    return shown


def check_places(*paths: Path | None) -> None:
    """Know before anything is measured where results cannot be written; what an earlier run wrote there stays.

    Raises:
        InputError: a file cannot be written.
    """
    for path in paths:
        if path is not None and not path.is_file():
            write(path, "")
            path.unlink()


def write_json(path: Path, content: object) -> None:
    """Write ``content``, complete or not at all."""
    write(path, json.dumps(content, indent=1))


def write(path: Path, text: str) -> None:
    """Write ``text``, complete or not at all."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another file.") from error


if __name__ == "__main__":
    sys.exit(main())
