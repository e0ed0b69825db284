"""Outlines of tissue: as GeoJSON that QuPath opens, and drawn on a thumbnail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from tasks.common import contours as outlines
from tasks.common.contours import Contour
from tasks.common.files import atomic_path, explain_os_errors

_TISSUE = "Tissue"
_OUTLINE = (0, 158, 115)  # colour-blind-safe green and orange (Okabe and Ito)
_HOLE = (230, 159, 0)


def write_geojson(path: Path, contours: Sequence[Contour]) -> None:
    """Outlines as QuPath annotations of the class Tissue, level-0 pixels; one feature per piece, with its holes."""
    outlines.write_geojson(path, {_TISSUE: contours}, {_TISSUE: _OUTLINE})


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
