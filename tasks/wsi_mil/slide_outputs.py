"""Everything written about one predicted slide: its maps, its tiles, its scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels.errors import InputError
from tasks.wsi_mil.checkpoint import SlideClassifier, SlidePrediction
from tasks.wsi_mil.features import TileCoords
from tasks.wsi_mil.heatmap import (
    Array,
    Mode,
    check_colormap,
    check_mode,
    colour_limits,
    colourise,
    map_shape,
    normalise,
    overlay,
    rasterise,
)
from tasks.wsi_mil.heatmap_figure import (
    branch_figure,
    heatmap_figure,
    read_top_tiles,
    top_tiles,
    top_tiles_figure,
)
from tasks.wsi_mil.heatmap_files import (
    write_figure,
    write_geojson,
    write_image,
    write_pyramid,
    write_scores,
    write_scores_csv,
)
from tasks.wsi_mil.slides import Slide

log = logging.getLogger(__name__)

THUMBNAIL_SIDE = 1024
_OVERLAY_SIDE = 4096
_PYRAMID_SIDE = 16384


@dataclass(frozen=True)
class MapSettings:
    """The section ``predict`` of the configuration, checked; see ``conf/predict/default.yaml``."""

    mode: Mode
    colormap: str
    alpha: float
    branches: bool
    downsample: float | None  # None: automatic
    pyramid: float | None  # None: automatic, 0: none
    geojson: bool
    top_k: int
    keep_features: bool

    @classmethod
    def from_config(cls, predict: Any) -> MapSettings:
        """Raises InputError for a value that makes no sense, before any slide is touched."""
        if not 0 <= predict.alpha <= 1:
            raise InputError(f"predict.alpha={predict.alpha} must lie between 0 (slide only) and 1 (colours only).")
        if not isinstance(predict.top_k, int) or predict.top_k < 0:
            raise InputError(f"predict.top_k={predict.top_k} must be a number of tiles, 0 for none.")
        return cls(
            mode=check_mode(str(predict.mode)),
            colormap=check_colormap(str(predict.colormap)),
            alpha=float(predict.alpha),
            branches=bool(predict.branches),
            downsample=_downsample(predict.downsample, "predict.downsample"),
            pyramid=0.0 if predict.pyramid in (None, False) else _downsample(predict.pyramid, "predict.pyramid"),
            geojson=bool(predict.geojson),
            top_k=int(predict.top_k),
            keep_features=bool(predict.keep_features),
        )


def _downsample(value: Any, option: str) -> float | None:
    if value in ("auto", True):
        return None
    if not isinstance(value, int | float) or not (math.isfinite(value) and value >= 1):
        raise InputError(f"{option}={value} must be auto or at least 1, level-0 pixels per pixel of the picture.")
    return float(value)


def automatic_downsample(slide_size: tuple[int, int], longest: int) -> float:
    """The smallest power of two that brings the longer side to at most ``longest`` pixels."""
    return float(2 ** max(0, math.ceil(math.log2(max(slide_size) / longest))))


def attention_rows(classifier: SlideClassifier, prediction: SlidePrediction) -> dict[str, Array]:
    """Name to weights (N,): one row per branch, or per class for models with an attention row per class.

    Empty for a single row, and for the branches of several models: branch 1 of one is not branch 1 of another, so their
    mean shows nothing.
    """
    rows = prediction.attention.numpy()
    per_class = classifier.models[0].pooler.attention_rows == "class"
    if len(rows) == 1 or (not per_class and len(classifier.models) > 1):
        return {}
    named = per_class and len(rows) == len(classifier.classes)
    names = classifier.classes if named else [f"branch {i + 1}" for i in range(len(rows))]
    return dict(zip(names, rows, strict=True))


def write_outputs(
    folder: Path,
    title: str,
    classifier: SlideClassifier,
    prediction: SlidePrediction,
    coords: TileCoords | None,
    slide: Slide | None,
    settings: MapSettings,
    about: Mapping[str, Any],
) -> list[str]:
    """Write what can be written about one slide and return the names of the files.

    Scores are always written; GeoJSON needs coordinates; maps and top tiles need the slide as well.

    Args:
        title: stands above the pictures.
        about: facts kept with the scores.
    """
    mean = prediction.mean_attention.numpy()
    branches = attention_rows(classifier, prediction)
    scores = {"attention": mean, f"attention_{settings.mode}": normalise(mean, settings.mode)}
    scores |= {f"attention_{name.replace(' ', '_')}": weights for name, weights in branches.items()}
    xy, size = (coords.xy, coords.size) if coords is not None else (None, None)
    write_scores_csv(folder / "scores.csv", xy, size, scores)
    written = ["scores.csv"]
    if coords is None:
        return written
    write_scores(folder / "scores.h5", coords.xy, coords.size, scores, about)
    written.append("scores.h5")
    if settings.geojson:
        _write_tiles(folder / "tiles.geojson", coords, mean, branches, classifier, prediction, settings)
        written.append("tiles.geojson")
    if slide is not None:
        written += _write_maps(folder, title, mean, branches if settings.branches else {}, coords, slide, settings)
    return written


def _write_tiles(
    path: Path,
    coords: TileCoords,
    mean: Array,
    branches: Mapping[str, Array],
    classifier: SlideClassifier,
    prediction: SlidePrediction,
    settings: MapSettings,
) -> None:
    shown = normalise(mean, settings.mode)
    measurements = {"Attention": mean, "Attention rank": normalise(mean, "rank")}
    measurements["Attention / uniform"] = normalise(mean, "nscaled")
    measurements |= {f"Attention: {name}": weights for name, weights in branches.items()}
    for name, probability in zip(classifier.classes, prediction.probabilities.tolist(), strict=True):
        measurements[f"Slide probability: {name}"] = np.full(len(mean), probability)
    colours = colourise(shown, colour_limits(shown, settings.mode), settings.colormap)
    write_geojson(path, coords.xy, coords.size, measurements, colours)


def _write_maps(
    folder: Path,
    title: str,
    mean: Array,
    branches: Mapping[str, Array],
    coords: TileCoords,
    slide: Slide,
    settings: MapSettings,
) -> list[str]:
    shown = normalise(mean, settings.mode)
    limits = colour_limits(shown, settings.mode)
    style: dict[str, Any] = {"colormap": settings.colormap, "alpha": settings.alpha, "limits": limits}
    mpp = known_mpp(slide)

    def heat(values: Array, downsample: float, rows: tuple[int, int] | None = None) -> Array:
        return rasterise(values, coords.xy, coords.size, slide.dimensions, downsample, rows=rows)

    thumbnail = slide.thumbnail(THUMBNAIL_SIDE)
    reduction = slide.dimensions[0] / thumbnail.shape[1]
    labels: dict[str, Any] = {"mode": settings.mode, "mpp": mpp and mpp * reduction, "title": title}
    figure = heatmap_figure(thumbnail, heat(shown, reduction), **labels, **style)
    write_figure(folder / "heatmap.png", figure)
    written = ["heatmap.png"]
    if branches:
        values = normalise(np.stack(list(branches.values())), settings.mode)
        maps = {name: heat(row, reduction) for name, row in zip(branches, values, strict=True)}
        common = style | {"limits": colour_limits(values, settings.mode)}
        write_figure(folder / "branches.png", branch_figure(thumbnail, maps, **labels, **common))
        written.append("branches.png")
    if settings.top_k:
        tiles = read_top_tiles(slide, coords.xy, coords.size, mean, settings.top_k)
        write_figure(folder / "top_tiles.png", top_tiles_figure(tiles, _captions(mean, coords, len(tiles)), title))
        written.append("top_tiles.png")

    downsample = settings.downsample or automatic_downsample(slide.dimensions, _OVERLAY_SIDE)
    height, width = map_shape(slide.dimensions, downsample)
    background = slide.read_region(0, 0, *slide.dimensions, downsample)
    assert background.shape[:2] == (height, width)
    write_image(folder / "overlay.png", overlay(background, heat(shown, downsample), **style))
    written.append("overlay.png")
    if settings.pyramid != 0:
        downsample = settings.pyramid or automatic_downsample(slide.dimensions, _PYRAMID_SIDE)
        write_pyramid(
            folder / "overlay.tiff",
            slide.read_region,
            slide.dimensions,
            lambda top, bottom: heat(shown, downsample, (top, bottom)),
            downsample,
            mpp,
            description=title,
            **style,
        )
        written.append("overlay.tiff")
    return written


def known_mpp(slide: Slide) -> float | None:
    """Micrometres per level-0 pixel, or None when the slide does not say: maps then have no scale bar."""
    try:
        return slide.mpp
    except InputError:
        return None


def _captions(mean: Array, coords: TileCoords, count: int) -> list[str]:
    relative = normalise(mean, "nscaled")
    return [
        f"{place}. {relative[i]:.3g} × uniform\nx {coords.xy[i, 0]}, y {coords.xy[i, 1]}"
        for place, i in enumerate(top_tiles(mean, count), start=1)
    ]
