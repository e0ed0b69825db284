"""The pictures of an evaluation, one function each; every function gives a matplotlib figure of its own.

Figures are made without pyplot: no global state, no display needed. Colours are those of Okabe and Ito ("Color
Universal Design", 2008), told apart with any colour vision; class i has the same colour in every picture.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.bootstrap import Interval, resample_weights
from tasks.common.files import atomic_path
from tasks.common.metrics import METRIC_LABELS, SMALLER_IS_BETTER
from tasks.common.weighted_metrics import (
    CALIBRATION_BINS,
    Floats,
    Ints,
    Kind,
    calibration_bin,
    calibration_pairs,
    check_predictions,
    decide,
    rank_metrics,
)

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
_LINES = ("-", "--", ":", "-.")  # classes beyond the palette differ by line
_GREY = "#8a8a8a"
_GRID = np.linspace(0, 1, 201)
_BAND_SAMPLES = 400


def class_colour(index: int) -> str:
    """The colour of class ``index`` in every picture."""
    return PALETTE[index % len(PALETTE)]


def roc_curves(
    probabilities: NDArray,
    targets: NDArray,
    kind: Kind,
    classes: Sequence[str] | None = None,
    folds: NDArray | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Figure:
    """ROC curves: each fold thin, all predictions together thick with the band of 95 % of bootstrap resamples.

    One curve for class 1 of ``binary``, one per class (against the rest) otherwise.

    Args:
        probabilities: (n, c).
        targets: (n,) class, or (n, c) 0/1 for ``multilabel``.
        classes: (c,) names.
        folds: (n,) fold of each row, or None to leave the folds out.
        groups: (n,) patient of each row, resampled as one.
    """
    figure, axes = _square()
    for curve in _curves(probabilities, targets, kind, classes, folds, groups, seed):
        for scores, positive in curve.of_folds:
            x, y = _roc(scores, positive)
            axes.plot(x, y, color=curve.colour, alpha=0.3, linewidth=0.8)
        low, high = _band(curve, "roc")
        axes.fill_between(_GRID, low, high, color=curve.colour, alpha=0.15, linewidth=0)
        x, y = _roc(curve.scores, curve.positive)
        area = rank_metrics(curve.scores, curve.positive, np.ones((1, len(curve.scores))))[0][0]
        axes.plot(x, y, curve.line, color=curve.colour, linewidth=2, label=f"{curve.name}  AUC {area:.3f}")
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 4)), zorder=0)
    return _finish(figure, axes, "1 − specificity", "Sensitivity", "lower right")


def precision_recall_curves(
    probabilities: NDArray,
    targets: NDArray,
    kind: Kind,
    classes: Sequence[str] | None = None,
    folds: NDArray | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Figure:
    """Precision against recall, drawn as :func:`roc_curves` is; a dashed line marks the share of positives."""
    figure, axes = _square()
    for curve in _curves(probabilities, targets, kind, classes, folds, groups, seed):
        for scores, positive in curve.of_folds:
            axes.step(*_precision_recall(scores, positive), where="pre", color=curve.colour, alpha=0.3, linewidth=0.8)
        low, high = _band(curve, "pr")
        axes.fill_between(_GRID, low, high, color=curve.colour, alpha=0.15, linewidth=0)
        area = rank_metrics(curve.scores, curve.positive, np.ones((1, len(curve.scores))))[1][0]
        x, y = _precision_recall(curve.scores, curve.positive)
        axes.step(x, y, curve.line, where="pre", color=curve.colour, linewidth=2, label=f"{curve.name}  AP {area:.3f}")
        axes.axhline(curve.positive.mean(), color=curve.colour, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    return _finish(figure, axes, "Recall", "Precision", "lower left")


def confusion_matrix(
    probabilities: NDArray, targets: NDArray, kind: Kind, classes: Sequence[str] | None = None
) -> Figure:
    """True class by predicted class: counts, and per cent of the true class, which is also the shade.

    One two-by-two matrix per label for ``multilabel``.
    """
    p, t = check_predictions(probabilities, targets, kind)
    names = _names(classes, p.shape[1])
    predicted = decide(p, kind)
    if kind != "multilabel":
        size = min(12.0, max(3.4, 1.8 + 0.85 * len(names)))
        figure = Figure(figsize=(size, size), layout=_layout())
        _draw_matrix(figure.add_subplot(), _count(t, predicted, len(names)), names)
        return figure
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.0 * rows), layout=_layout())
    for c, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, c + 1)
        _draw_matrix(axes, _count(t[:, c], predicted[:, c], 2), ["no", "yes"])
        axes.set_title(name, fontsize=10)
    return figure


def learning_curves(
    history: pd.DataFrame | str | Path,
    monitor: str = "val_loss",
    best_epochs: Mapping[int, int] | None = None,
    smaller_is_better: bool | None = None,
) -> Figure:
    """Loss and validation metrics against the epoch, a line per fold, the best epoch of each marked.

    Args:
        history: a table, or a CSV such as Lightning writes, with ``epoch``, optionally ``fold``, columns that have
            ``loss`` in the name (drawn together, training dashed) and others that start with ``val``; blanks are
            skipped.
        monitor: the column that chose the epoch.
        best_epochs: epoch kept in each fold; by default the best of ``monitor``.
        smaller_is_better: of ``monitor``; by default true of losses.

    Raises:
        InputError: there is no column ``epoch``, or nothing to draw.
    """
    table = history if isinstance(history, pd.DataFrame) else pd.read_csv(history)
    if "epoch" not in table.columns:
        raise InputError(f"the training history has no column 'epoch'; it has {', '.join(map(str, table.columns))}.")
    if "fold" not in table.columns:
        table = table.assign(fold=0)
    number_columns = [str(c) for c in table.select_dtypes("number").columns if c not in ("epoch", "fold", "step")]
    losses = [c for c in number_columns if "loss" in c]
    metrics = [c for c in number_columns if c.startswith("val") and "loss" not in c]
    panels = ([losses] if losses else []) + [[name] for name in metrics]
    if not panels:
        raise InputError("the training history has neither losses nor validation metrics to draw.")
    by_epoch = table.groupby(["fold", "epoch"])[number_columns].mean()
    if best_epochs is None and monitor in number_columns:
        best_epochs = _best_epochs(
            by_epoch[monitor], "loss" in monitor if smaller_is_better is None else smaller_is_better
        )

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.1 * rows), layout=_layout())
    for number, names in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        _draw_history(axes, by_epoch, names, best_epochs or {})
        axes.set_ylabel("Loss" if names is losses else _metric_label(names[0]))
        if names is losses and len(losses) > 1:
            axes.plot([], [], "--", color=_GREY, label="training")
            axes.plot([], [], "-", color=_GREY, label="validation")
            axes.legend(frameon=False, fontsize=8)
    return figure


def calibration_curve(
    probabilities: NDArray, targets: NDArray, kind: Kind, classes: Sequence[str] | None = None
) -> Figure:
    """Observed share against stated probability in ten bins, with the number of predictions in each bin below.

    Class 1 for ``binary``, the predicted class for ``multiclass`` and ``ordinal``, every label for ``multilabel``. The
    error in the legend is the expected calibration error of the metrics.
    """
    p, t = check_predictions(probabilities, targets, kind)
    stated, outcome = calibration_pairs(p, t, kind)
    names = _names(classes, p.shape[1])
    series = names if kind == "multilabel" else [names[1] if kind == "binary" else "predicted class"]
    figure = Figure(figsize=(4.6, 5.4), layout=_layout())
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 4)), zorder=0)
    width = 1 / CALIBRATION_BINS
    for c, name in enumerate(series):
        bins = calibration_bin(stated[:, c])
        count = np.bincount(bins, minlength=CALIBRATION_BINS)
        used = count > 0
        mean = np.bincount(bins, stated[:, c], CALIBRATION_BINS)[used] / count[used]
        observed = np.bincount(bins, outcome[:, c], CALIBRATION_BINS)[used] / count[used]
        error = float(np.abs(mean - observed) @ count[used] / len(stated))
        colour = class_colour(1 if kind == "binary" else c)
        upper.plot(mean, observed, "o-", color=colour, linewidth=1.6, label=f"{name}  ECE {error:.3f}")
        offset = width * (0.1 + 0.8 * c / len(series))
        lower.bar(
            np.arange(CALIBRATION_BINS) * width + offset, count, width * 0.8 / len(series), align="edge", color=colour
        )
    upper.set(ylabel="Observed share", xlim=(0, 1), ylim=(-0.02, 1.02))
    upper.legend(frameon=False, loc="upper left", fontsize=9)
    lower.set(xlabel="Stated probability", ylabel="Count")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in (upper, lower):
        _tidy(axes)
    return figure


def fold_metrics(
    per_fold: Sequence[Mapping[str, float]],
    pooled: Mapping[str, float] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """A row per metric: a dot per fold, and the pooled value as a diamond on the bar of its interval.

    ``names`` chooses the metrics; by default the shares of :data:`~tasks.common.metrics.METRIC_LABELS`, for which
    larger is better.
    """
    if names is None:
        known = [*(pooled or {}), *(name for fold in per_fold for name in fold)]
        names = [n for n in METRIC_LABELS if n in known and n not in SMALLER_IS_BETTER]
    figure = Figure(figsize=(6.4, 1.1 + 0.42 * len(names)), layout=_layout())
    axes = figure.add_subplot()
    rows = np.arange(len(names))[::-1]
    spread = np.linspace(0.18, -0.18, len(per_fold)) if len(per_fold) > 1 else np.zeros(len(per_fold))
    for row, name in zip(rows, names, strict=True):
        values = np.array([fold.get(name, np.nan) for fold in per_fold])
        axes.plot(values, row + spread, "o", color=PALETTE[5], markersize=5, alpha=0.9)
        if intervals and name in intervals:
            axes.plot([intervals[name].low, intervals[name].high], [row, row], color=PALETTE[0], linewidth=2)
        if pooled and name in pooled:
            axes.plot(pooled[name], row, "D", color=PALETTE[0], markersize=7, markeredgecolor="white")
    axes.plot([], [], "o", color=PALETTE[5], label="fold")
    if pooled:
        label = "all folds together" + (", 95 % interval" if intervals else "")
        axes.plot([], [], "D-", color=PALETTE[0], label=label)
    axes.set_yticks(rows, [METRIC_LABELS.get(n, n) for n in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    _tidy(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    return figure


def save_png(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG; a killed run leaves no half-written file."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return Path(path)


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


class _Curve:
    """Scores of one class against the rest, with what its picture needs."""

    def __init__(self, p: Floats, t: Ints, kind: Kind, c: int, name: str, folds: NDArray | None) -> None:
        self.name, self.colour, self.line = name, class_colour(c), _LINES[c // len(PALETTE) % len(_LINES)]
        self.scores = p[:, c]
        self.positive = (t[:, c] if kind == "multilabel" else t == c).astype(np.float64)
        members = [] if folds is None else [np.asarray(folds) == f for f in np.unique(folds)]
        pairs = [(self.scores[m], self.positive[m]) for m in members]
        self.of_folds = [(s, y) for s, y in pairs if 0 < y.sum() < len(y)] if len(pairs) > 1 else []
        self.weights = np.ones((0, len(p)))


def _curves(
    probabilities: NDArray,
    targets: NDArray,
    kind: Kind,
    classes: Sequence[str] | None,
    folds: NDArray | None,
    groups: Sequence[Hashable] | None,
    seed: int,
) -> list[_Curve]:
    """One for each class that has both positives and negatives."""
    p, t = check_predictions(probabilities, targets, kind)
    names = _names(classes, p.shape[1])
    weights = np.concatenate(list(resample_weights(t, groups, _BAND_SAMPLES, seed)))
    curves = [_Curve(p, t, kind, c, names[c], folds) for c in ([1] if kind == "binary" else range(p.shape[1]))]
    curves = [curve for curve in curves if 0 < curve.positive.sum() < len(p)]
    for curve in curves:
        curve.weights = weights
    return curves


def _cumulative(scores: Floats, positive: Floats, weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Weighted positives and negatives at or above each distinct score, from the highest, both (s, distinct)."""
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    ordered = weights[:, order]
    positives = np.cumsum(ordered * positive[order], axis=1)[:, ends]
    return positives, np.cumsum(ordered, axis=1)[:, ends] - positives


def _roc(scores: Floats, positive: Floats) -> tuple[Floats, Floats]:
    up, out = _cumulative(scores, positive)
    return np.r_[0, out[0] / out[0, -1]], np.r_[0, up[0] / up[0, -1]]


def _precision_recall(scores: Floats, positive: Floats) -> tuple[Floats, Floats]:
    up, out = _cumulative(scores, positive)
    precision = up[0] / (up[0] + out[0])
    stop = int(np.searchsorted(up[0], up[0, -1])) + 1  # lower thresholds only lose precision
    return np.r_[0, up[0, :stop] / up[0, -1]], np.r_[precision[0], precision[:stop]]


def _band(curve: _Curve, which: str) -> tuple[Floats, Floats]:
    """The 2.5th and 97.5th percentile of the resampled curves at each point of the grid."""
    up, out = _cumulative(curve.scores, curve.positive, curve.weights)
    rows = []
    for positives, negatives in zip(up, out, strict=True):
        if not (positives[-1] and negatives[-1]):
            continue
        recall = np.r_[0, positives / positives[-1]]
        if which == "roc":
            rows.append(np.interp(_GRID, np.r_[0, negatives / negatives[-1]], recall))
        else:  # precision at the first threshold that reaches the recall: the steps of the curve
            precision = positives / np.maximum(positives + negatives, 1)
            first = np.minimum(np.searchsorted(recall[1:], np.maximum(_GRID, 1e-12)), len(precision) - 1)
            rows.append(precision[first])
    low, high = np.quantile(np.stack(rows), [0.025, 0.975], axis=0)
    return low, high


def _count(t: Ints, predicted: Ints, num_classes: int) -> Ints:
    return np.bincount(t * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def _draw_matrix(axes: Axes, counts: Ints, names: Sequence[str]) -> None:
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if share[row, column] > 0.55 else "black"
        text = f"{count}\n{share[row, column]:.0%}" if len(names) <= 12 else str(count)
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    ticks = np.arange(len(names))
    long = max(map(len, names)) > 8 and len(names) > 2
    axes.set_xticks(ticks, names, rotation=45 if long else 0, ha="right" if long else "center", fontsize=9)
    axes.set_yticks(ticks, names, fontsize=9)
    axes.set(xlabel="Predicted", ylabel="True")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _best_epochs(values: pd.Series, smaller: bool) -> dict[int, int]:
    """Epoch of the best value of each fold."""
    table = values.dropna().reset_index()
    signed = table[values.name] if smaller else -table[values.name]
    best = table.loc[signed.groupby(table["fold"]).idxmin()]
    return dict(zip(best["fold"].astype(int).tolist(), best["epoch"].astype(int).tolist(), strict=True))


def _draw_history(axes: Axes, by_epoch: pd.DataFrame, names: Sequence[str], best: Mapping[int, int]) -> None:
    for number, fold in enumerate(by_epoch.index.unique("fold").tolist()):
        rows = by_epoch.xs(fold, level="fold")
        for name in names:
            line = rows[name].dropna()
            style = "--" if name.startswith("train") else "-"
            axes.plot(line.index, line.to_numpy(), style, color=class_colour(number), linewidth=1.3, alpha=0.85)
            kept = best.get(fold, -1)
            if style == "-" and kept in line.index:
                axes.plot(kept, line[kept], "o", color=class_colour(number), markersize=6, markeredgecolor="white")
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axes)


def _metric_label(column: str) -> str:
    name = column.removeprefix("val").lstrip("_/")
    return "Validation " + METRIC_LABELS.get(name, name)


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches of white around a picture


def _names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    names = [f"class {i}" for i in range(num_classes)] if classes is None else [str(c) for c in classes]
    return [name if len(name) <= 24 else name[:23] + "…" for name in names]


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 4.6), layout=_layout())
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, x: str, y: str, legend: Literal["lower left", "lower right"]) -> Figure:
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _tidy(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc=legend, fontsize=9)
    else:
        axes.text(0.5, 0.5, "only one class is present", ha="center", va="center", color=_GREY)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
