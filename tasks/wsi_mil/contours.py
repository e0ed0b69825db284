"""Outlines of tissue: as GeoJSON that QuPath opens and writes, as masks, and drawn on a thumbnail."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kernels.errors import InputError
from tasks.common.files import atomic_path, explain_os_errors

_TISSUE_CLASS = {"name": "Tissue", "color": [0, 158, 115]}
_OUTLINE = (0, 158, 115)  # colour-blind-safe green and orange (Okabe and Ito)
_HOLE = (230, 159, 0)
_IGNORED = {"ignore*", "ignore", "exclude", "artefact", "artifact"}
_SUB_PIXEL_BITS = 4


@dataclass
class Contour:
    """One piece of tissue.

    Attributes:
        outline: (n, 2) x, y in level-0 pixels.
        holes: the same, one per hole.
    """

    outline: np.ndarray
    holes: list[np.ndarray] = field(default_factory=list)

    @property
    def area(self) -> float:
        """Net area, square level-0 pixels."""
        return _area(self.outline) - sum(_area(hole) for hole in self.holes)


def _area(ring: np.ndarray) -> float:
    return float(cv2.contourArea(ring.astype(np.float32)))


def rasterise(contours: Iterable[Contour], shape: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """Mask (h, w) bool of the outlines less their holes; ``scale`` is (x, y) level-0 pixels per mask pixel."""
    mask = np.zeros(shape, np.uint8)
    for contour in contours:
        piece = np.zeros(shape, np.uint8) if contour.holes else mask
        cv2.fillPoly(piece, [_on_mask(contour.outline, scale)], 1, shift=_SUB_PIXEL_BITS)
        for hole in contour.holes:
            cv2.fillPoly(piece, [_on_mask(hole, scale)], 0, shift=_SUB_PIXEL_BITS)
        mask |= piece
    return mask.astype(bool)


def _on_mask(ring: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    return np.round(ring / np.asarray(scale) * (1 << _SUB_PIXEL_BITS)).astype(np.int32)


def write_geojson(path: Path, contours: Sequence[Contour]) -> None:
    """Outlines as QuPath annotations of the class Tissue, level-0 pixels; one feature per piece, with its holes."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in (c.outline, *c.holes)]},
            "properties": {"objectType": "annotation", "classification": _TISSUE_CLASS},
        }
        for c in contours
    ]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _closed(ring: np.ndarray) -> list[list[float]]:
    points: list[list[float]] = ring.tolist()
    return [*points, points[0]]


def read_geojson(path: Path) -> tuple[list[Contour], list[Contour]]:
    """Outlines of a GeoJSON file of QuPath or of ours: (tissue, to be left out).

    Polygons and multi-polygons count, whatever their class; those of the class ``Ignore*`` (or Exclude, Artefact) are
    cut out. Points and lines are passed over.

    Raises:
        InputError: the file is no GeoJSON or has no polygon.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as GeoJSON ({error}); export it from QuPath again.") from error
    kept: list[Contour] = []
    excluded: list[Contour] = []
    try:
        for feature in _features(content):
            wanted = excluded if _class_name(feature).lower() in _IGNORED else kept
            wanted.extend(_polygons(feature.get("geometry") or {}))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not the GeoJSON of polygons QuPath writes ({error}); export it again.") from error
    if not kept:
        raise InputError(f"{path} has no polygon; outline the tissue in QuPath and export it as GeoJSON.")
    return kept, excluded


def _features(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, list):
        for item in content:
            yield from _features(item)
    elif content.get("type") == "FeatureCollection":
        yield from content["features"]
    elif content.get("type") == "Feature":
        yield content
    else:
        yield {"geometry": content}


def _class_name(feature: dict[str, Any]) -> str:
    classification = (feature.get("properties") or {}).get("classification") or {}
    return str(classification.get("name", "")) if isinstance(classification, dict) else str(classification)


def _polygons(geometry: dict[str, Any]) -> Iterator[Contour]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)
    if kind not in ("Polygon", "MultiPolygon"):
        return
    for rings in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
        outline, *holes = [_open_ring(ring) for ring in rings]
        yield Contour(outline, holes)


def _open_ring(ring: list[list[float]]) -> np.ndarray:
    points = np.asarray([point[:2] for point in ring], np.float64)
    if len(points) < 3 or not np.isfinite(points).all():
        raise ValueError("a ring has fewer than three points or a point that is no number")
    if (points[0] == points[-1]).all():
        points = points[:-1]
    whole = points.astype(np.int32)
    return whole if (whole == points).all() else points


def draw_contours(
    thumbnail: np.ndarray, contours: Sequence[Contour], downsample: float, mpp: float | None
) -> np.ndarray:
    """A copy of the thumbnail with outlines green, holes orange, and a scale bar.

    Args:
        thumbnail: (h, w, 3) RGB uint8.
        downsample: level-0 pixels per thumbnail pixel.
        mpp: micrometres per level-0 pixel; None draws no scale bar.
    """
    canvas = thumbnail.copy()
    width = max(1, round(max(canvas.shape[:2]) / 400))
    for colour, rings in ((_HOLE, [h for c in contours for h in c.holes]), (_OUTLINE, [c.outline for c in contours])):
        points = [np.round(ring / downsample * 16).astype(np.int32) for ring in rings]
        cv2.polylines(canvas, points, True, colour, width, cv2.LINE_AA, shift=4)
    if mpp is not None:
        _draw_scale_bar(canvas, downsample * mpp)
    return canvas


def _draw_scale_bar(canvas: np.ndarray, um_per_pixel: float) -> None:
    """A black bar on white of a round length, a quarter of the width or less."""
    height, width = canvas.shape[:2]
    longest = width / 4 * um_per_pixel
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(f * power for f in (1, 2, 5) if f * power <= longest)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    pixels, size = round(length / um_per_pixel), max(height, width) / 1500
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    pad = max(2, text_height // 2)
    box_width, box_height = max(pixels, text_width) + 2 * pad, text_height + 4 * pad
    if box_width > width or box_height > height:
        return
    left, top = width - box_width, height - box_height
    canvas[top:, left:] = 255
    cv2.putText(
        canvas, text, (left + pad, top + pad + text_height), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA
    )
    canvas[height - pad - max(2, pad // 2) : height - pad, left + pad : left + pad + pixels] = 0


def write_jpeg(path: Path, image: np.ndarray, quality: int = 85) -> None:
    """RGB uint8 as JPEG; whole or not at all."""
    good, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert good, "OpenCV cannot encode JPEG"
    with atomic_path(path) as temporary, explain_os_errors(path):
        temporary.write_bytes(encoded.tobytes())
