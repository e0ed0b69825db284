"""Published accuracy over measured speed, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FormatStrFormatter
from matplotlib.transforms import Bbox

from backbones.published import published
from tasks.common.bench import BenchRow

SHOWN = "224 px, batch 8, inference"
DOT = 6  # half the side of what a point covers, in pixels of the canvas
_Point = tuple[float, float, bool]


def plot(measured: Sequence[BenchRow], path: Path) -> None:
    """Draw published top-1 accuracy over the measured rate of inference, for the largest batch at 224 pixels."""
    points = _points(measured)
    figure = Figure(figsize=(8, 5.5))
    axis = figure.subplots()
    for rate, top1, is_ours in points.values():
        axis.plot(rate, top1, "o", color=_colour(is_ours))
    axis.set(xscale="log", xlabel=f"images per second, {SHOWN}", ylabel="published top-1, %")
    if points:
        rates = [rate for rate, _, _ in points.values()]
        axis.set_xlim(min(rates) / 1.15, max(rates) * 1.8)  # names stand on the right
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    _write_names(axis, FigureCanvasAgg(figure), points)
    figure.savefig(path, dpi=130, format="png")


def _points(measured: Sequence[BenchRow]) -> dict[str, _Point]:
    """Rate, top-1 and whether it is ours, by the model's name."""
    points: dict[str, _Point] = {}
    for row in measured:
        if SHOWN not in row.name:
            continue
        for name, rate, is_ours in ((row.name.split()[0], row.ours, True), (row.peer_name.split()[0], row.peer, False)):
            top1 = published(name).top1
            if top1 is not None:
                points[name] = (rate, top1, is_ours)
    return points


def _write_names(axis: Axes, canvas: FigureCanvasAgg, points: Mapping[str, _Point]) -> None:
    """Write the names beside their points, pushed down where they would lie on a point or on one another."""
    centres = axis.transData.transform([(rate, top1) for rate, top1, _ in points.values()])
    taken = [Bbox.from_bounds(x - DOT, y - DOT, 2 * DOT, 2 * DOT) for x, y in centres]
    for name, (rate, top1, is_ours) in sorted(points.items(), key=lambda item: -item[1][1]):
        text = axis.annotate(
            name,
            (rate, top1),
            textcoords="offset points",
            xytext=(9, 0),
            fontsize=7,
            color=_colour(is_ours),
            va="center",
            arrowprops={"arrowstyle": "-", "color": _colour(is_ours), "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
        )
        while any(_box(text, canvas).overlaps(other) for other in taken):
            text.set_position((9, text.get_position()[1] - 3))
        taken.append(_box(text, canvas))


def _box(text: Annotation, canvas: FigureCanvasAgg) -> Bbox:
    """Of the words alone, without the line to the point."""
    text.update_positions(canvas.get_renderer())
    return Text.get_window_extent(text, canvas.get_renderer())


def _colour(is_ours: bool) -> str:
    return "#0072b2" if is_ours else "0.5"
