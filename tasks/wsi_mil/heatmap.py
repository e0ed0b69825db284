"""From one score per tile to a map over the slide: normalise the scores, draw the tiles, colour them, measure them.

Sizes are ``(height, width)`` for arrays and ``(width, height)`` for slides, as OpenSlide gives them; points are
``(x, y)``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import cv2
import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from kernels.errors import InputError, unknown_name

Mode = Literal["raw", "rank", "minmax", "nscaled"]
Array = npt.NDArray[Any]

MODE_LABELS: dict[Mode, str] = {
    "raw": "attention weight",
    "rank": "attention rank (1 = highest tile of the slide)",
    "minmax": "attention, 0 = lowest tile, 1 = highest",
    "nscaled": "attention relative to uniform (1 = every tile alike)",
}
# Perceptually even, the same to colour-blind readers, and unlike haematoxylin and eosin at its bright end.
DEFAULT_COLORMAP = "viridis"


def check_mode(mode: str) -> Mode:
    """``mode`` if it is one of raw, rank, minmax and nscaled.

    Raises:
        InputError: it is not.
    """
    if mode not in get_args(Mode):
        raise unknown_name("predict.mode", mode, get_args(Mode))
    return cast(Mode, mode)


def normalise(scores: Array, mode: Mode) -> Array:
    """Scores (..., N) made comparable between slides, float64 of the same shape; each row by itself.

    * ``raw``: as they are. Weights of a slide with many tiles are all tiny, so raw maps look empty.
    * ``rank``: average rank / N in (0, 1]; ties share their mean rank. CLAM's percentiles / 100.
    * ``minmax``: (s - min) / (max - min); 0.5 everywhere when all scores are equal.
    * ``nscaled``: N times the weight, for scores that sum to one: 1 is what uniform attention would give. ACMIL's maps.
    """
    scores = np.asarray(scores, dtype=np.float64)
    count = scores.shape[-1]
    if mode == "rank":
        return cast(Array, rankdata(scores, axis=-1) / count) if scores.size else scores
    if mode == "minmax":
        low, high = scores.min(-1, keepdims=True), scores.max(-1, keepdims=True)
        span = high - low
        return np.where(span > 0, (scores - low) / np.where(span > 0, span, 1), 0.5)
    return scores * count if mode == "nscaled" else scores.copy()


def colour_limits(values: Array, mode: Mode) -> tuple[float, float]:
    """The values that get the first and the last colour.

    Raw and N-scaled maps end at their 99th percentile, so that one extreme tile does not leave all others dark;
    N-scaled maps never end below 2, so that nearly uniform attention looks nearly uniform.
    """
    if mode in ("rank", "minmax"):
        return 0.0, 1.0
    high = float(np.nanpercentile(values, 99))
    if mode == "nscaled":
        return 0.0, max(2.0, high)
    low = min(0.0, float(np.nanmin(values)))
    return low, high if high > low else low + 1.0


def map_shape(slide_size: tuple[int, int], downsample: float) -> tuple[int, int]:
    """Size (height, width) of a picture of a slide of ``slide_size`` (width, height) level-0 pixels, at least 1 x 1."""
    return max(1, round(slide_size[1] / downsample)), max(1, round(slide_size[0] / downsample))


def rasterise(
    values: Array,
    xy: Array,
    tile_size: float,
    slide_size: tuple[int, int],
    downsample: float,
    edges: Literal["centre", "ceil"] = "centre",
    rows: tuple[int, int] | None = None,
) -> Array:
    """Draw one value per tile into a map; where tiles overlap, a pixel holds their mean.

    The work is four additions per tile and two cumulative sums over the map, whatever the size of the tiles.

    Args:
        values: (N,) finite.
        xy: (N, 2) top-left corners, level-0 pixels.
        tile_size: edge of a tile, level-0 pixels.
        slide_size: (width, height) of level 0.
        downsample: level-0 pixels per pixel of the map.
        edges: ``"centre"`` gives a pixel to the tiles that hold its centre, so that tiles side by side neither overlap
            nor leave a gap; ``"ceil"`` rounds corner and size up, as CLAM does.
        rows: first row and end of a strip of the map; the whole map when None.

    Returns:
        (height, width) float32, NaN where no tile lies.
    """
    values, xy = np.asarray(values, dtype=np.float64), np.asarray(xy, dtype=np.float64)
    if xy.shape != (len(values), 2):
        raise ValueError(f"{len(values)} values need coordinates ({len(values)}, 2), not {xy.shape}")
    height, width = map_shape(slide_size, downsample)
    top, bottom = rows or (0, height)
    start, stop = _pixel_edges(xy, tile_size, downsample, edges)
    low, high = np.array([0, top]), np.array([width, bottom])
    start, stop = np.clip(start, low, high) - low, np.clip(stop, low, high) - low
    shown = (stop > start).all(1)
    start, stop, values, height = start[shown], stop[shown], values[shown], bottom - top

    def summed(weights: Array) -> Array:
        # +w at two corners and -w at the other two: the double cumulative sum is w inside the tile and 0 outside.
        corners = np.zeros((height + 1) * (width + 1), dtype=weights.dtype)
        for x, y, sign in ((start, start, 1), (stop, stop, 1), (start, stop, -1), (stop, start, -1)):
            np.add.at(corners, y[:, 1] * (width + 1) + x[:, 0], sign * weights)
        grid = corners.reshape(height + 1, width + 1)
        np.cumsum(grid, axis=0, out=grid)
        np.cumsum(grid, axis=1, out=grid)
        return grid[:height, :width]

    count = summed(np.ones(len(values), dtype=np.int32))
    total = summed(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
    if len(values):
        # Cancellation in the sums must not take a value out of the range it came from.
        np.clip(mean, values.min(), values.max(), out=mean)
    return mean.astype(np.float32)


def _pixel_edges(xy: Array, tile_size: float, downsample: float, edges: str) -> tuple[Array, Array]:
    if edges == "ceil":
        start = np.ceil(xy / downsample).astype(np.int64)
        return start, start + math.ceil(tile_size / downsample)
    start = np.ceil(xy / downsample - 0.5).astype(np.int64)
    stop = np.ceil((xy + tile_size) / downsample - 0.5).astype(np.int64)
    # A tile smaller than a pixel still shows: it owns the pixel its centre is in.
    tiny = stop <= start
    if tiny.any():
        pixel = np.floor((xy + tile_size / 2) / downsample).astype(np.int64)
        start, stop = np.where(tiny, pixel, start), np.where(tiny, pixel + 1, stop)
    return start, stop


@lru_cache(maxsize=16)
def _colour_table(colormap: str) -> Array:
    from matplotlib import colormaps

    if colormap not in colormaps:
        names = [name for name in colormaps if not name.endswith("_r")]
        raise unknown_name("predict.colormap", colormap, names, "Add _r to a name to reverse it.")
    return (colormaps[colormap](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


def check_colormap(colormap: str) -> str:
    """``colormap`` if matplotlib knows it.

    Raises:
        InputError: it does not.
    """
    _colour_table(colormap)
    return colormap


def colourise(values: Array, limits: tuple[float, float] = (0.0, 1.0), colormap: str = DEFAULT_COLORMAP) -> Array:
    """RGB colours (..., 3) uint8 of values (...); values beyond the limits get the end colours, NaN the first."""
    low, high = limits
    index = np.nan_to_num((np.asarray(values) - low) * (256 / (high - low)), nan=0.0)
    return _colour_table(colormap)[np.clip(index, 0, 255).astype(np.uint8)]


def overlay(
    background: Array,
    heat: Array,
    colormap: str = DEFAULT_COLORMAP,
    alpha: float = 0.4,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Blend a map over a picture of the slide: ``alpha`` colour + (1 - ``alpha``) slide; untouched where it is NaN.

    Args:
        background: (height, width, 3) uint8 RGB.
        heat: (height, width) values, NaN where no tile lies.
        limits: values that get the first and the last colour.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    if background.shape[:2] != heat.shape:
        raise ValueError(f"background {background.shape[:2]} and map {heat.shape} differ in size")
    if not 0 <= alpha <= 1:
        raise InputError(f"predict.alpha={alpha} must lie between 0 (slide only) and 1 (colours only).")
    background = np.ascontiguousarray(background)
    blended = cv2.addWeighted(colourise(heat, limits, colormap), alpha, background, 1 - alpha, 0)
    return np.where(np.isnan(heat)[..., None], background, blended)


def pixel_auc(values: Array, xy: Array, tile_size: float, mask: Array, mask_downsample: float) -> float:
    """How well the map finds a known region: area under the ROC curve over the pixels covered by tiles.

    Args:
        values: (N,) score per tile.
        xy: (N, 2) top-left corners, level-0 pixels.
        tile_size: edge of a tile, level-0 pixels.
        mask: (height, width), true inside the region.
        mask_downsample: level-0 pixels per mask pixel.

    Returns:
        The chance that a pixel inside scores higher than one outside (ties count half); NaN when the covered pixels are
        all inside or all outside.
    """
    mask = np.asarray(mask, dtype=bool)
    size = (round(mask.shape[1] * mask_downsample), round(mask.shape[0] * mask_downsample))
    heat = rasterise(values, xy, tile_size, size, mask_downsample)
    covered = ~np.isnan(heat)
    inside = mask[covered]
    positives, negatives = int(inside.sum()), int((~inside).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    rank_sum = rankdata(heat[covered])[inside].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))
