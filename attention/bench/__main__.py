"""Every mixer beside plain softmax attention and beside its paper's released formulation, in one run.

    python -m attention.bench [MIXER ...] [--device cpu|cuda] [--size 56x56x96 ...] [--json FILE] [--markdown FILE]
                              [--plot FILE]

Then how each one's time grows with the tokens. The released formulations are part of the repository's tests; where
those are not, as in an installed package, mixers are compared with softmax attention alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import attention
from kernels.errors import InputError, unknown_name
from kernels.threads import spin_briefly

if TYPE_CHECKING:
    from attention.bench.growth import Growth
    from kernels.measure import Result

SIZES = ((56, 56, 96), (14, 14, 384), (128, 128, 64), (64, 64, 64, 32))
"""Grids and, last, channels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the return value is the exit code."""
    spin_briefly()
    parser = argparse.ArgumentParser(prog="python -m attention.bench", description="Time the mixers.")
    parser.add_argument("mixer", nargs="*", help="which mixers (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.add_argument("--size", nargs="+", help="grids and channels, as 56x56x96 (default: the table's four)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing per contestant (default: 0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write tables to FILE, as in RESULTS.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw how time grows with the tokens")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        return _measure(chosen, console)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; what was finished is in the files that were asked for.", markup=False)
        return 130


def _measure(chosen: argparse.Namespace, console: Console) -> int:
    import torch

    from attention.bench.cases import case_of, results_of
    from attention.bench.growth import growth, growth_table, plot
    from kernels.bench import check_places, describe, table
    from kernels.measure import measure_machine

    known = attention.available(kind="mixer")
    for name in chosen.mixer:
        if name not in known:
            raise unknown_name("mixer", name, known)
    sizes = [_size(text) for text in chosen.size] if chosen.size else list(SIZES)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that PyTorch can use here; take --device cpu.")
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results: list[Result] = []
    grown: list[Growth] = []
    check_places(chosen.json, chosen.markdown, chosen.plot)
    machine = measure_machine(device, [torch.float32])
    about = describe(device, machine)
    console.print("\n".join(f"{name}: {value}" for name, value in about.items()), markup=False)
    names = chosen.mixer or [name for name in known if name != "softmax"]
    for size in sizes:
        for name in names:
            case = case_of(name, size, machine, device)
            if case is None:
                continue
            rows = results_of(case, machine, device, chosen.seconds)
            console.print(table(case.name, rows))
            results += rows
            _save(chosen, about, results, grown)
    for name in chosen.mixer or known:
        grown.append(growth(name, machine, device))
        _save(chosen, about, results, grown)
    console.print(growth_table(grown))
    if chosen.plot is not None:
        plot(grown, chosen.plot)
    for path in filter(None, (chosen.json, chosen.markdown, chosen.plot)):
        console.print(f"results are in {path}", markup=False)
    return 0


def _save(chosen: argparse.Namespace, about: dict[str, str], results: Sequence[Result], rows: Sequence[Growth]) -> None:
    """What is measured so far: a run of many minutes may be stopped."""
    from attention.bench.tables import markdown
    from kernels.bench import write, write_json

    if chosen.json is not None:
        grown = [asdict(row) | {"slope": row.slope} for row in rows]
        content = {"machine": about, "results": [asdict(r) for r in results], "growth": grown}
        write_json(chosen.json, content)
    if chosen.markdown is not None:
        write(chosen.markdown, markdown(about, results, rows))


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        size = ()
    if not 2 <= len(size) <= 4 or min(size) < 1:
        raise InputError(f"--size {text}: give a grid of one to three axes and the channels, as 56x56x96.")
    return size


if __name__ == "__main__":
    raise SystemExit(main())
