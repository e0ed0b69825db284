"""Pictures of attention for a reader: the map beside the slide, one map per branch, the tiles that counted most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tasks.wsi_mil.heatmap import DEFAULT_COLORMAP, MODE_LABELS, Array, Mode, check_colormap, overlay

if TYPE_CHECKING:
    from tasks.wsi_mil.slides import Slide

_MASK_COLOUR = "#D55E00"  # vermilion of the Okabe-Ito palette, told apart from viridis by all readers


def heatmap_figure(
    thumbnail: Array,
    heat: Array,
    *,
    mode: Mode = "rank",
    limits: tuple[float, float] = (0.0, 1.0),
    mpp: float | None = None,
    colormap: str = DEFAULT_COLORMAP,
    alpha: float = 0.5,
    title: str = "",
    mask: Array | None = None,
) -> Figure:
    """Thumbnail and overlay side by side, with a colour bar and, when ``mpp`` is known, a scale bar.

    The slide is grey under the overlay, so that every colour there is attention and none is stain.

    Args:
        thumbnail: (h, w, 3) uint8 RGB.
        heat: (height, width) normalised values over the same field, NaN where no tile lies; brought to the size of the
            thumbnail when it differs.
        mode: how the values were normalised; labels the colour bar.
        limits: values of the first and the last colour.
        mpp: micrometres per pixel of the thumbnail.
        mask: (any, any) known region over the same field; its outline is drawn on both pictures.
    """
    overlaid = overlay(_grey(thumbnail), _resize(heat, thumbnail), colormap, alpha, limits)
    figure, axes = _grid([thumbnail, overlaid], ["slide", "attention"], columns=2, title=title)
    for ax in axes:
        if mask is not None:
            _outline(ax, _resize(np.asarray(mask, dtype=np.float32), thumbnail))
    if mask is not None:
        axes[0].set_title("slide, known region outlined", fontsize=10)
    if mpp:
        _scale_bar(axes[0], thumbnail.shape[:2], mpp)
    _colour_bar(figure, axes[-1], limits, colormap, mode)
    return figure


def branch_figure(
    thumbnail: Array,
    heats: Mapping[str, Array],
    *,
    mode: Mode = "rank",
    limits: tuple[float, float] = (0.0, 1.0),
    mpp: float | None = None,
    colormap: str = DEFAULT_COLORMAP,
    alpha: float = 0.5,
    title: str = "",
) -> Figure:
    """One overlay per attention branch on a common colour scale; arguments as in :func:`heatmap_figure`."""
    pictures = [overlay(_grey(thumbnail), _resize(heat, thumbnail), colormap, alpha, limits) for heat in heats.values()]
    columns = min(len(pictures), 3)
    figure, axes = _grid(pictures, list(heats), columns=columns, title=title)
    if mpp:
        _scale_bar(axes[0], thumbnail.shape[:2], mpp)
    _colour_bar(figure, axes, limits, colormap, mode)
    return figure


def top_tiles_figure(tiles: Sequence[Array], captions: Sequence[str], title: str = "", columns: int = 5) -> Figure:
    """The given tiles, each (h, w, 3) uint8 RGB, in reading order with a caption under each."""
    columns = max(1, min(columns, len(tiles)))
    rows = max(1, math.ceil(len(tiles) / columns))
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.45), layout="constrained")
    for position, (tile, caption) in enumerate(zip(tiles, captions, strict=True), start=1):
        ax = figure.add_subplot(rows, columns, position)
        ax.imshow(tile)
        ax.set_xlabel(caption, fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def read_top_tiles(
    slide: Slide, xy: Array, tile_size: int, scores: Array, count: int, pixels: int = 224
) -> list[Array]:
    """The ``count`` tiles with the highest scores, read from the slide at about ``pixels`` per edge, highest first."""
    downsample = max(1.0, tile_size / pixels)
    order = top_tiles(scores, count)
    return [slide.read_region(int(x), int(y), tile_size, tile_size, downsample) for x, y in xy[order]]


def top_tiles(scores: Array, count: int) -> Array:
    """Indices of the ``count`` highest of ``scores (N,)``, highest first, the earlier tile first among equals."""
    return np.argsort(-np.asarray(scores), kind="stable")[:count]


def _grid(pictures: Sequence[Array], titles: Sequence[str], columns: int, title: str) -> tuple[Figure, list[Axes]]:
    height, width = pictures[0].shape[:2]
    rows = math.ceil(len(pictures) / columns)
    # Long and thin slides get a legible height without leaving a page of white.
    cell_width = 4.2
    cell_height = float(np.clip(cell_width * height / width, 1.6, 7.0))
    size = (cell_width * columns + 0.9, (cell_height + 0.3) * rows + 0.35)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = []
    for position, (picture, name) in enumerate(zip(pictures, titles, strict=True), start=1):
        ax = figure.add_subplot(rows, columns, position)
        ax.imshow(picture, interpolation="antialiased")
        ax.set_title(name, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_autoscale_on(False)  # outlines and scale bars must not widen the picture
        axes.append(ax)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def _grey(picture: Array) -> Array:
    return cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _resize(heat: Array, picture: Array) -> Array:
    if heat.shape == picture.shape[:2]:
        return heat
    # Nearest, so that NaN stays where it is and no value is made up between tiles.
    return cv2.resize(np.ascontiguousarray(heat), (picture.shape[1], picture.shape[0]), interpolation=cv2.INTER_NEAREST)


def _outline(ax: Axes, mask: Array) -> None:
    if 0 < np.count_nonzero(mask) < mask.size:
        ax.contour(mask, levels=[0.5], colors=[_MASK_COLOUR], linewidths=1.4)


def _colour_bar(
    figure: Figure, axes: Axes | list[Axes], limits: tuple[float, float], colormap: str, mode: Mode
) -> None:
    scale = ScalarMappable(Normalize(*limits), check_colormap(colormap))
    bar = figure.colorbar(scale, ax=axes, shrink=0.85, pad=0.02, aspect=30, fraction=0.06)
    bar.set_label(MODE_LABELS[mode], fontsize=8)
    bar.ax.tick_params(labelsize=8)


def scale_bar_length(width_um: float) -> float:
    """The length in micrometres, 1, 2 or 5 times a power of ten, that is at most a quarter of ``width_um``."""
    limit = width_um / 4
    power = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9))


def _scale_bar(ax: Axes, shape: tuple[int, int], mpp: float) -> None:
    height, width = shape
    length = scale_bar_length(width * mpp)
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    # Below the picture, so that it never hides tissue.
    x, y = 0.0, height * 1.02
    ax.add_patch(Rectangle((x, y), length / mpp, max(height, width) * 0.012, color="black", clip_on=False))
    ax.text(length / mpp + width * 0.015, y, label, fontsize=8, va="top", ha="left", clip_on=False)
