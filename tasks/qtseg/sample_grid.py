"""A picture of what the network will be shown: prepared images, augmented, with the outlines of their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from tasks.common.plots import class_colour, save_png
from tasks.qtseg.loading import SegmentationDataset

_MISSING = "#8a8a8a"


def sample_grid(
    dataset: SegmentationDataset, classes: Sequence[str], rows: int = 4, views: int = 4, seed: int = 0
) -> Figure:
    """``rows`` images, evenly spread over the data set, each ``views`` times as training will see it.

    The outline of each class has the colour it has everywhere; what does not count is shaded.

    Args:
        dataset: with or without augmentation.
        classes: (K,) names, the background first.
    """
    chosen = np.unique(np.linspace(0, len(dataset) - 1, max(1, min(rows, len(dataset)))).round().astype(int))
    figure = Figure(figsize=(2.4 * views, 2.5 * len(chosen) + 0.4), layout="constrained")
    grid = figure.subplots(len(chosen), views, squeeze=False)
    for row, index in enumerate(chosen.tolist()):
        for view in range(views):
            image, label, valid, _ = dataset[(index, seed * 1_000_003 + index * views + view)]
            axes = grid[row][view]
            draw_sample(axes, image, label.numpy(), valid.numpy())
            if view == 0:
                axes.set_title(_short(dataset.samples[index].case_id), fontsize=8, loc="left")
    handles = [
        figure.axes[0].plot([], [], color=class_colour(k - 1), label=name)[0] for k, name in enumerate(classes) if k
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    return figure


def draw_sample(axes: Axes, image: Tensor, label: NDArray[np.int64], valid: NDArray[np.bool_]) -> None:
    """One prepared image (C, h, w) with the outlines of its classes (h, w)."""
    pixels = image.permute(1, 2, 0).numpy()
    low, high = float(pixels.min()), float(pixels.max())
    pixels = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    axes.imshow(np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels, interpolation="nearest")
    for k in np.unique(label[label > 0]).tolist():
        for line in outlines(label == k):
            axes.plot(line[:, 0], line[:, 1], color=class_colour(k - 1), linewidth=1.2)
    if not valid.all():
        shade = np.zeros((*valid.shape, 4), np.float32)
        shade[~valid] = (0.54, 0.54, 0.54, 0.45)
        axes.imshow(shade, interpolation="nearest")
    axes.set_xlim(-0.5, label.shape[1] - 0.5)
    axes.set_ylim(label.shape[0] - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_MISSING)


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.int32]]:
    """Closed outlines (n, 2), x then y, of a mask, holes included; a single pixel is a point drawn as a short line."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([line[:, 0], line[:1, 0]]) for line in found]


def write_sample_grid(dataset: SegmentationDataset, classes: Sequence[str], path: Path, seed: int = 0) -> Path:
    """:func:`sample_grid` as PNG."""
    return save_png(sample_grid(dataset, classes, seed=seed), path, dpi=110)


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
