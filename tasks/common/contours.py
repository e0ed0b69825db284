"""Outlines of regions of an image: from masks, as masks, and as GeoJSON that QuPath opens and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kernels.errors import InputError
from tasks.common.files import atomic_path

_IGNORED = {"ignore*", "ignore", "exclude", "artefact", "artifact"}
_SUB_PIXEL_BITS = 4


@dataclass
class Contour:
    """One piece of a region, such as tissue.

    Attributes:
        outline: (n, 2) x, y in pixels of the full image; of a slide, level 0.
        holes: the same, one per hole.
    """

    outline: np.ndarray
    holes: list[np.ndarray] = field(default_factory=list)

    @property
    def area(self) -> float:
        """Net area, square pixels of the full image."""
        return _area(self.outline) - sum(_area(hole) for hole in self.holes)


def _area(ring: np.ndarray) -> float:
    return float(cv2.contourArea(ring.astype(np.float32)))


def rasterise(contours: Iterable[Contour], shape: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """Mask (h, w) bool of the outlines less their holes; ``scale`` is (x, y) pixels of the image per mask pixel."""
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


def write_geojson(
    path: Path, contours: Mapping[str, Sequence[Contour]], colours: Mapping[str, tuple[int, int, int]] | None = None
) -> None:
    """Outlines as QuPath annotations; one feature per piece, with its holes as inner rings.

    Args:
        contours: name of the class -> its pieces.
        colours: name of the class -> red, green, blue from 0 to 255; QuPath's own colour where it is not given.
    """
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in (c.outline, *c.holes)]},
            "properties": {"objectType": "annotation", "classification": _classification(name, colours)},
        }
        for name, pieces in contours.items()
        for c in pieces
    ]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _classification(name: str, colours: Mapping[str, tuple[int, int, int]] | None) -> dict[str, Any]:
    colour = (colours or {}).get(name)
    return {"name": name} if colour is None else {"name": name, "color": list(colour)}


def _closed(ring: np.ndarray) -> list[list[float]]:
    points: list[list[float]] = ring.tolist()
    return [*points, points[0]]


def read_geojson(path: Path) -> tuple[list[Contour], list[Contour]]:
    """Outlines of a GeoJSON file of QuPath or of ours: (wanted, to be left out).

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
        raise InputError(f"{path} has no polygon; draw an outline in QuPath and export it as GeoJSON.")
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
