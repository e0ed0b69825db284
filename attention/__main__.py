"""What the registry holds: ``python -m attention`` and ``python -m attention show NAME``."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from typing import get_args

from rich.console import Console
from rich.table import Table
from torch import nn

import attention
from attention.registry import Kind
from kernels.backend import choose
from kernels.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the return value is the exit code."""
    parser = argparse.ArgumentParser(prog="python -m attention", description="Attention modules by name.")
    parser.add_argument("--kind", choices=get_args(Kind), help="of this kind alone")
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show", help="parameters, operations and bytes of one module")
    show.add_argument("name", help="as in the table, or package.module:Class")
    show.add_argument("--kind", choices=get_args(Kind), help="for a name that exists as several kinds")
    show.add_argument("--dim", type=int, default=96, help="channels (default: 96)")
    show.add_argument("--heads", type=int, default=3, help="heads (default: 3)")
    show.add_argument("--size", default=None, help="grid, as 56x56, 1000 or 32x32x32; queries x tokens for cross")
    show.add_argument("--batch", type=int, default=1, help="items (default: 1)")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if chosen.command == "show":
            _show(chosen, console)
        else:
            console.print(registry_table(chosen.kind))
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    return 0


def registry_table(kind: Kind | None = None) -> Table:
    """Every registered module, of one kind when given."""
    shown = Table(title="attention modules", title_justify="left", show_edge=False)
    for column in ("name", "kind", "paper", "time", "sizes", "axes", "computed here by", "licence of released code"):
        shown.add_column(column, no_wrap=column in ("name", "kind"))
    for each in get_args(Kind) if kind is None else (kind,):
        for name in attention.available(kind=each):
            cls = attention.class_of(name, each)
            about = cls.about  # type: ignore[attr-defined]
            tables = "input_size" in attention.parameters_of(name, each)
            shown.add_row(
                name,
                each,
                about.paper,
                about.complexity,
                "any; tables are resized" if tables else "any",
                axes_of(cls),
                computed_by(about.operator),
                about.licence,
            )
    return shown


def axes_of(cls: type[nn.Module]) -> str:
    """``2-D, 3-D`` and the like; sets of tokens for kinds that know no grid."""
    grids = getattr(cls, "grids", None)
    return "tokens" if grids is None else ", ".join(f"{axes}-D" for axes in grids)


def computed_by(operator: str) -> str:
    """The operator and the backend it takes on this machine."""
    import torch

    if operator in ("", "sdpa"):
        return "PyTorch" if not operator else "PyTorch's fused attention"
    sample = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu")
    return f"{operator}: {choose(operator, 'auto', (sample,)).backend}"


def _show(chosen: argparse.Namespace, console: Console) -> None:
    name, kind = chosen.name, chosen.kind or attention.kinds_of(chosen.name)[0]
    cls = attention.class_of(name, kind)
    params = {"dim": chosen.dim, "num_heads": chosen.heads, "num_classes": 2}
    accepted = attention.parameters_of(name, kind)
    module = attention.create(name, kind=kind, **{key: value for key, value in params.items() if key in accepted})
    console.print(f"[bold]{name}[/bold] ({kind})", highlight=False)
    console.print(inspect.getdoc(cls) or "", markup=False, highlight=False)
    console.print()
    console.print(_parameter_table(module))
    shape = (chosen.batch, *_grid(chosen.size, name, kind, getattr(module, "grids", (2,))))
    try:
        parts = module.cost(shape) if hasattr(module, "cost") else None  # type: ignore[operator]
    except NotImplementedError:
        parts = None
    if parts is None:  # a class of the user's own may do without
        console.print("\nIt has no method cost(shape), from which operations and bytes would follow.")
        return
    costs = Table(title=f"\ncost at {' x '.join(map(str, shape))}, float32", title_justify="left", show_edge=False)
    for column in ("step", "GFLOP", "MB at least", "FLOP per byte"):
        costs.add_column(column, justify="left" if column == "step" else "right")
    for part in parts:
        costs.add_row(part.name, *_numbers(part.flops, part.elements * 4))
    total = [sum(part.flops for part in parts), sum(part.elements for part in parts) * 4]
    costs.add_row("total", *_numbers(*total), style="bold")
    console.print(costs)


def _parameter_table(module: nn.Module) -> Table:
    shown = Table(title="parameters", title_justify="left", show_edge=False)
    for column in ("name", "shape", "number"):
        shown.add_column(column, justify="right" if column == "number" else "left")
    for name, parameter in module.named_parameters():
        shown.add_row(name, " x ".join(map(str, parameter.shape)) or "1", f"{parameter.numel():,}")
    shown.add_row("total", "", f"{sum(p.numel() for p in module.parameters()):,}", style="bold")
    return shown


def _numbers(flops: float, size: float) -> tuple[str, str, str]:
    return f"{flops / 1e9:.4g}", f"{size / 1e6:.4g}", f"{flops / max(size, 1):.3g}"


def _grid(text: str | None, name: str, kind: Kind, axes_taken: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes behind the batch: a grid, queries and tokens, or instances."""
    grids = {"cross": (2,), "pooling": (1,)}.get(kind, axes_taken)
    axes = 2 if 2 in grids else grids[0]
    if text is None:
        return {1: (1000,), 2: (16, 1024) if kind == "cross" else (56, 56), 3: (16, 16, 16)}[axes]
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in grids or min(sizes, default=0) < 1:
        forms = " or ".join({1: "1000", 2: "56x56", 3: "16x16x16"}[n] for n in grids)
        raise InputError(f"--size {text}: attention '{name}' takes sizes such as {forms}.")
    return sizes


if __name__ == "__main__":
    raise SystemExit(main())
