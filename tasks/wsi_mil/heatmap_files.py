"""Attention in files other programs open: PNG, pyramidal TIFF, GeoJSON for QuPath, HDF5 and CSV. All are atomic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pandas as pd
import tifffile
from matplotlib.figure import Figure

from tasks.common.files import atomic_path
from tasks.wsi_mil.heatmap import DEFAULT_COLORMAP, Array, map_shape, overlay

_TILE = 256  # pixels per edge of a TIFF tile
_GEOJSON_CHUNK = 4096  # features formatted at once


def write_figure(path: Path, figure: Figure) -> None:
    """Save a matplotlib figure; the suffix says the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def write_image(path: Path, image: Array) -> None:
    """Save ``image (height, width, 3)`` uint8 RGB as PNG.

    PNG rather than JPEG: a map's flat tiles and sharp edges would be smeared.
    """
    encoded, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise ValueError(f"a picture of shape {image.shape} cannot be encoded as PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


def write_geojson(
    path: Path, xy: Array, tile_size: int, measurements: Mapping[str, Array], colours: Array | None = None
) -> None:
    """Tiles as a GeoJSON FeatureCollection of QuPath tile objects (detections), for QuPath 0.4 and later.

    Args:
        xy: (N, 2) top-left corners, level-0 pixels.
        tile_size: edge of a tile, level-0 pixels.
        measurements: name to (N,) finite values, which QuPath lists and can colour by (Measure > Show measurement
            maps).
        colours: (N, 3) uint8 RGB that QuPath draws the tiles in at first; its own default when None.
    """
    columns = [np.asarray(values, dtype=np.float64) for values in measurements.values()]
    for name, values in zip(measurements, columns, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"measurement {name!r} holds a value that is not finite, which JSON cannot carry")
    corners = np.asarray(xy, dtype=np.int64)
    (x0, y0), (x1, y1) = corners.T, (corners + tile_size).T
    rows = np.column_stack([x0, y0, x1, y0, x1, y1, x0, y1, x0, y0])
    blocks: list[Array] = [rows]
    pieces = [
        '{"type":"Feature","geometry":{"type":"Polygon","coordinates":',
        "[[[%d,%d],[%d,%d],[%d,%d],[%d,%d],[%d,%d]]]}",
    ]
    pieces.append(',"properties":{"objectType":"tile"')
    if colours is not None:
        blocks.append(np.asarray(colours, dtype=np.int64))
        pieces.append(',"color":[%d,%d,%d]')
    # Percent signs in a name would be read as format codes.
    names = ",".join(json.dumps(name).replace("%", "%%") + ":%.6g" for name in measurements)
    pieces.append(',"measurements":{' + names + "}}}")
    template = "".join(pieces)
    blocks.extend(values[:, None] for values in columns)
    table = np.hstack(blocks)  # float64 holds every pixel position exactly
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[\n')
        for start in range(0, len(table), _GEOJSON_CHUNK):
            chunk = table[start : start + _GEOJSON_CHUNK]
            # One formatting call per chunk: as fast as Python writes text.
            text = ",\n".join([template] * len(chunk)) % tuple(chunk.ravel().tolist())
            file.write((",\n" if start else "") + text)
        file.write("\n]}\n")


def write_scores(path: Path, xy: Array, tile_size: int, scores: Mapping[str, Array], about: Mapping[str, Any]) -> None:
    """Scores and coordinates as HDF5: ``coords (N, 2)`` int64 level-0 pixels, one float32 dataset per score.

    ``about`` becomes attributes of the file; what is not a number or a string is written as JSON.
    """
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        coords = file.create_dataset("coords", data=np.asarray(xy, dtype=np.int64))
        coords.attrs["patch_size_level0"] = int(tile_size)
        for name, values in scores.items():
            file.create_dataset(name, data=np.asarray(values, dtype=np.float32))
        for key, value in about.items():
            file.attrs[key] = value if isinstance(value, int | float | str) else json.dumps(value, default=str)


def write_scores_csv(path: Path, xy: Array | None, tile_size: int | None, scores: Mapping[str, Array]) -> None:
    """One row per tile in the order of the features: ``x, y, size`` in level-0 pixels where known, then the scores."""
    columns: dict[str, Any] = {}
    if xy is not None:
        columns = {"x": np.asarray(xy)[:, 0], "y": np.asarray(xy)[:, 1], "size": tile_size}
    with atomic_path(path) as temporary:
        pd.DataFrame({**columns, **scores}).to_csv(temporary, index_label="tile", float_format="%.6g")


def write_pyramid(
    path: Path,
    read: Callable[[int, int, int, int, float], Array],
    slide_size: tuple[int, int],
    heat: Callable[[int, int], Array],
    downsample: float,
    mpp: float | None,
    *,
    colormap: str = DEFAULT_COLORMAP,
    alpha: float = 0.4,
    limits: tuple[float, float] = (0.0, 1.0),
    compression: str = "jpeg",
    description: str = "",
) -> None:
    """The overlay as a pyramidal tiled TIFF, which OpenSlide, QuPath and tifffile open at the right scale.

    The slide is read, coloured and written in strips; only the levels from the second on are held in memory.

    Args:
        read: ``Slide.read_region``: ``(x, y, width, height, downsample)`` in level-0 pixels to (h, w, 3) uint8 RGB.
        slide_size: (width, height) of level 0.
        heat: ``(first row, end row)`` to that strip of the map at ``downsample``, NaN where no tile lies.
        downsample: level-0 pixels per pixel of the first level of the file.
        mpp: micrometres per level-0 pixel; no resolution is written when None.
        compression: ``"jpeg"`` (small) or ``"deflate"`` (exact).
        description: text of the image description tag.
    """
    height, width = map_shape(slide_size, downsample)
    coarser = [np.empty((max(1, height // 2), max(1, width // 2), 3), dtype=np.uint8)]

    def base_tiles() -> Iterator[Array]:
        for top in range(0, height, _TILE):
            rows = min(_TILE, height - top)
            strip = read(0, round(top * downsample), round(width * downsample), round(rows * downsample), downsample)
            if strip.shape[:2] != (rows, width):
                strip = cv2.resize(strip, (width, rows), interpolation=cv2.INTER_AREA)
            strip = overlay(strip, heat(top, top + rows), colormap, alpha, limits)
            _halve_into(coarser[0], strip, top // 2)
            yield from _tiles(strip)

    def options(level: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tile": (_TILE, _TILE),
            "compression": compression,
            "photometric": "rgb",
            "metadata": None,
        }
        if compression == "jpeg":
            found["compressionargs"] = {"level": 90}
        if mpp:
            per_cm = 1e4 / (mpp * downsample * 2**level)
            found |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
        return found

    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as writer:
        shape = (height, width, 3)
        # As bytes: slide and class names need not be ASCII, which tifffile asks of text.
        about = description.encode() or None
        writer.write(base_tiles(), shape=shape, dtype=np.uint8, description=about, **options(0))
        level = 1
        # Reduced images follow as pages of their own, which is where OpenSlide looks for levels of a plain TIFF.
        while max(coarser[-1].shape[:2]) >= _TILE:
            writer.write(coarser[-1], subfiletype=1, **options(level))
            coarser.append(_halve(coarser[-1]))
            level += 1


def _tiles(strip: Array) -> Iterator[Array]:
    for left in range(0, strip.shape[1], _TILE):
        tile = strip[:, left : left + _TILE]
        missing = (_TILE - tile.shape[0], _TILE - tile.shape[1])
        if any(missing):
            # Repeating the edge instead of black keeps JPEG from ringing into the picture.
            tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        yield np.ascontiguousarray(tile)


def _halve(image: Array) -> Array:
    height, width = max(1, image.shape[0] // 2), max(1, image.shape[1] // 2)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _halve_into(target: Array, strip: Array, top: int) -> None:
    rows = min(max(1, strip.shape[0] // 2), len(target) - top)
    if rows > 0:
        target[top : top + rows] = cv2.resize(strip, (target.shape[1], rows), interpolation=cv2.INTER_AREA)
