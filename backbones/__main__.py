"""``python -m backbones``: the backbones by name, their sizes, their feature maps, and what attention they take.

``python -m backbones 'metaformer*'`` lists what matches, ``python -m backbones show resnet18`` says more of one.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from kernels.errors import InputError

MEASURED = 60
"""How many networks are built without being asked for more; one takes a tenth of a second or so."""


@dataclass(frozen=True)
class Row:
    """What the table says of a backbone; ``fault`` is why nothing more is known."""

    name: str
    parameters: int = 0
    attention: str = ""
    strides: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    input_size: str = ""
    kind: str = ""
    fault: str = ""


def main(arguments: list[str] | None = None) -> int:
    """The exit code; faults of the user's go to the error stream in one sentence."""
    parser = argparse.ArgumentParser("python -m backbones", description="List backbones, or show one.")
    parser.add_argument("what", nargs="*", help="a wildcard pattern such as 'res*', or: show NAME")
    parser.add_argument("--all", action="store_true", help=f"measure every match, not the first {MEASURED} alone")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if options.what[:1] == ["show"]:
            if len(options.what) != 2:
                raise InputError("show takes the name of one backbone: python -m backbones show resnet18")
            _show(console, options.what[1])
        elif len(options.what) > 1:
            raise InputError(f"one pattern at a time, in quotes: python -m backbones '{options.what[0]}'")
        else:
            _list(console, options.what[0] if options.what else None, options.all)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _list(console: Console, pattern: str | None, everything: bool) -> None:
    import backbones

    names = backbones.available(pattern)
    if not names:
        raise InputError(
            f"no backbone matches '{pattern}'; patterns are like 'res*', and python -m backbones lists ours."
        )
    known = len(names)
    if pattern is None and not everything:
        names = _ours()
    shown = names if everything else names[:MEASURED]
    table = Table(box=None, pad_edge=False)
    for heading, side in (
        ("name", "left"),
        ("parameters", "right"),
        ("attention=", "left"),
        ("strides", "left"),
        ("channels", "left"),
        ("GFLOPs", "right"),
        ("top-1", "right"),
        ("licence of weights", "left"),
    ):
        table.add_column(heading, justify=side, no_wrap=heading == "name")  # type: ignore[arg-type]
    for name in shown:
        row = measure(name)
        if row.fault:
            table.add_row(name, "", "", "", row.fault)
        else:
            cells = [_millions(row.parameters), row.attention, _joined(row.strides), _joined(row.channels)]
            table.add_row(name, *cells, *_figures(name))
    console.print(table)
    if pattern is None and not everything:
        console.print(f"{len(names)} of this project, {known} in all: python -m backbones 'res*' for those that match.")
    elif len(shown) < len(names):
        console.print(f"{len(shown)} of {len(names)} that match; a narrower pattern or --all measures the others.")


def _show(console: Console, name: str) -> None:
    from attention.registry import available as known
    from backbones import registry

    if registry.is_dotted_path(name):
        raise InputError(f"'{name}' is a class of your own; show takes the name of a registered backbone.")
    row = measure(registry.resolve(name, pretrained=False))
    if row.fault:
        raise InputError(f"backbone '{name}' cannot be built: {row.fault}.")
    fitting: list[str] = []
    if "mixers" in row.attention:
        fitting += known("mixer")
    if "gates" in row.attention:
        fitting += known("gate")
    facts = {
        "class": row.kind,
        "parameters": _millions(row.parameters),
        "input": row.input_size,
        "strides": _joined(row.strides),
        "channels": _joined(row.channels),
        "GFLOPs, top-1 (%), licence of weights": " | ".join(cell or "not published" for cell in _figures(name)),
        "attention=": f"{row.attention}: {', '.join(fitting)}" if fitting else row.attention,
        "build": f"backbones.create('{name}'" + (f", attention='{fitting[0]}')" if fitting else ")"),
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in facts.items():
        table.add_row(key, value)
    console.print(f"[bold]{name}[/bold]")
    console.print(table)


def measure(name: str) -> Row:
    """Facts of a network that is built without memory for its weights."""
    import timm
    import torch

    from backbones import registry, swap

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model: Any = timm.create_model(name)
    except Exception as error:
        return Row(name, fault=(str(error).strip() or type(error).__name__).splitlines()[0])
    accepted = registry.parameters_of(name)
    takes = [kind for kind in ("mixer", "gate") if {"mixer": "attention", "gate": "gate"}[kind] in accepted]
    infos = getattr(model, "feature_info", None) or []
    infos = list(infos) if isinstance(infos, list) else infos.get_dicts()
    if len(infos) > 8:  # the blocks of a vision transformer, all of one scale
        infos = infos[-1:]
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", ())
    return Row(
        name,
        sum(parameter.numel() for parameter in model.parameters()),
        " and ".join(f"{kind}s" for kind in takes or swap.takes(model)) or "none",
        tuple(info["reduction"] for info in infos),
        tuple(info["num_chs"] for info in infos),
        " x ".join(map(str, size)),
        type(model).__name__,
    )


def _figures(name: str) -> tuple[str, str, str]:
    """Published cost and accuracy, empty where nothing is published, and the licence of the weights."""
    from backbones.published import published

    found = published(name)
    cost = "" if found.gflops is None else f"{found.gflops:g}"
    return cost, "" if found.top1 is None else f"{found.top1:g}", found.licence


def _ours() -> list[str]:
    """Names that are registered by this package."""
    import timm

    import backbones

    return [name for name in backbones.available() if timm.model_entrypoint(name).__module__.startswith("backbones.")]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _joined(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
