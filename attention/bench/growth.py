"""How a mixer's time grows with the tokens, so that the claimed complexity is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import attention
from attention.bench.cases import build, refusal
from kernels.measure import Machine, median_seconds

GROWTH_SIDES = (16, 32, 64, 128)
GROWTH_DIM = 64


@dataclass
class Growth:
    """How a mixer's forward pass grows with the tokens N.

    Attributes:
        claimed: what the module says of itself.
        seconds: by the side of a square map.
    """

    mixer: str
    claimed: str
    seconds: dict[int, float]

    @property
    def slope(self) -> float | None:
        """Of log time over log N between the two largest maps; None where there are not two."""
        if len(self.seconds) < 2:
            return None
        small, large = sorted(self.seconds)[-2:]
        return math.log(self.seconds[large] / self.seconds[small]) / (2 * math.log(large / small))


def growth(name: str, machine: Machine, device: torch.device) -> Growth:
    """Time the mixer's forward pass on growing square maps."""
    seconds: dict[int, float] = {}
    for side in GROWTH_SIDES:
        cls = attention.class_of(name, "mixer")
        grid = (side, side) if 2 in cls.grids else (side * side,)  # type: ignore[attr-defined]
        module = build(name, GROWTH_DIM, grid).to(device)
        if refusal(module, (1, *grid), machine):
            break
        x = torch.randn(1, *grid, GROWTH_DIM, device=device)
        with torch.no_grad():
            seconds[side] = median_seconds(lambda module=module, x=x: module(x), device, 0.3)  # type: ignore[misc]
    return Growth(name, attention.class_of(name, "mixer").about.complexity, seconds)  # type: ignore[attr-defined]


def growth_table(rows: Sequence[Growth]) -> Table:
    """Milliseconds by the side of the map and the slope, for the terminal."""
    shown = Table(title=f"growth, {GROWTH_DIM} channels, forward, ms", title_justify="left", show_edge=False)
    shown.add_column("mixer")
    for side in GROWTH_SIDES:
        shown.add_column(f"{side}x{side}", justify="right")
    shown.add_column("N^", justify="right")
    shown.add_column("claimed")
    for row in rows:
        shown.add_row(row.mixer, *cells(row), row.claimed)
    return shown


def cells(row: Growth) -> list[str]:
    times = [f"{row.seconds[side] * 1e3:.2f}" if side in row.seconds else "" for side in GROWTH_SIDES]
    return [*times, "" if row.slope is None else f"{row.slope:.2f}"]


def plot(rows: Sequence[Growth], path: Path) -> None:
    """Draw time over tokens, one panel per mixer with softmax attention in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if len(row.seconds) > 1]
    plain = next((row for row in drawn if row.mixer == "softmax"), None)
    columns = min(6, max(1, len(drawn)))
    lines = math.ceil(len(drawn) / columns) or 1
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.1 * columns, 1.8 * lines), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, drawn, strict=False):
        if plain is not None:
            _line(axis, plain, color="0.75")
        _line(axis, row, color="#0072b2", marker=".")
        axis.set_title(f"{row.mixer}  N^{row.slope:.2f}" if row.slope is not None else row.mixer, fontsize=7)
        axis.set(xscale="log", yscale="log")
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.3)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("forward, ms (grey: softmax attention)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, row: Growth, **style: Any) -> None:
    axis.plot([side**2 for side in row.seconds], [1e3 * seconds for seconds in row.seconds.values()], **style)
