"""Fields of cell nuclei: fluorescence on black or haematoxylin and eosin, crowded, uneven and partly out of focus."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.qtseg.demo.noise import Field, Picture, coordinates, finished, smooth_noise, smoothstep

# Optical density per unit of stain for red, green, blue; after Ruifrok and Johnston, 2001, rounded.
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
_EOSIN = np.array([0.10, 0.92, 0.30], np.float32)


def paint_nuclei(rng: Generator, side: int, subject: Generator) -> Picture:
    """One field; ``subject`` draws how the specimen was stained."""
    stained, strength = subject.random() < 0.5, subject.uniform(0.75, 1.3)
    shapes, inside = _nuclei(rng, side)
    image = _bright_field(rng, side, shapes, strength) if stained else _fluorescence(rng, side, shapes, strength)
    pixels = finished(image, rng, rng.uniform(0.4, 1.1) * side / 128, rng.uniform(2, 6))
    return Picture(pixels, inside.astype(np.uint8) * 255)


def _nuclei(rng: Generator, side: int) -> tuple[Field, NDArray[np.bool_]]:
    """How much of each pixel's light comes through nuclei (side, side), and where nuclei are.

    Ellipses with wavy outlines; clusters put some of them edge to edge.
    """
    scale = side / 128
    yy, xx = coordinates(side)
    count, size = int(rng.integers(9, 38)), rng.uniform(4.5, 9.5) * scale
    centres = rng.uniform(0, side, (count, 2))
    joined = rng.random(count) < rng.uniform(0.15, 0.6)
    joined[0] = False
    partner = (rng.random(count) * np.arange(count)).astype(int)
    angle = rng.uniform(0, 2 * np.pi, count)
    beside = centres[partner] + 1.75 * size * np.stack([np.cos(angle), np.sin(angle)], 1)
    centres = np.where(joined[:, None], beside, centres)
    radius = size * rng.lognormal(0, 0.2, count)
    stretch, turn = np.sqrt(rng.uniform(1.0, 1.9, count)), rng.uniform(0, np.pi, count)
    amount = rng.uniform(0.35, 1.0, count)
    warp_x, warp_y = (0.08 * size * smooth_noise(rng, side, 6 * scale) for _ in range(2))
    dx = (xx + warp_x)[None] - centres[:, 0, None, None].astype(np.float32)
    dy = (yy + warp_y)[None] - centres[:, 1, None, None].astype(np.float32)
    cos, sin = (f(turn)[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
    along, across = (radius * stretch)[:, None, None], (radius / stretch)[:, None, None]
    depth = 1 - np.hypot((dx * cos + dy * sin) / along, (dy * cos - dx * sin) / across)  # (count, side, side)
    edge = smoothstep(depth.astype(np.float32), -0.06, 0.14)
    inside = np.asarray((depth > 0).any(0))
    texture = 1 + 0.16 * smooth_noise(rng, side, 2.6 * scale)
    light = (edge * amount[:, None, None]).max(0) * texture
    return np.asarray(light, np.float32), inside


def _fluorescence(rng: Generator, side: int, shapes: Field, strength: float) -> Field:
    """Bright nuclei on a dark, hazy ground; debris that is no nucleus; light that falls off."""
    scale = side / 128
    haze = np.clip(10 + 9 * smooth_noise(rng, side, 50 * scale), 0, None)
    halo = cv2.GaussianBlur(shapes, (0, 0), 7 * scale)
    light = haze + 26 * halo + shapes * rng.uniform(60, 190) * strength
    light += _dots(rng, side, 0.6, 1.5) * rng.uniform(60, 180)
    yy, xx = coordinates(side)
    centre = rng.uniform(0.2, 0.8, 2) * side
    fall = np.hypot(xx - centre[0], yy - centre[1]) / side
    light = light * (1.15 - rng.uniform(0.2, 0.75) * fall)
    tint = np.array([1, 1, 1] if rng.random() < 0.6 else [0.25, 0.45, 1.0], np.float32)
    return np.asarray(light[..., None] * tint, np.float32)


def _bright_field(rng: Generator, side: int, shapes: Field, strength: float) -> Field:
    """Violet nuclei in pink tissue with fibres, gaps and folds."""
    scale = side / 128
    ground = 0.42 + 0.13 * smooth_noise(rng, side, 22 * scale, 3)
    fibres = np.abs(smooth_noise(rng, side, 12 * scale))
    ground = ground + 0.18 * (1 - smoothstep(fibres, 0.0, 0.35))
    gaps = smoothstep(smooth_noise(rng, side, 26 * scale), 1.0, 1.5)
    ground = ground * (1 - 0.85 * gaps) * strength
    blue = shapes * rng.uniform(0.75, 1.15) * strength + 0.10 + 0.06 * smooth_noise(rng, side, 30 * scale)
    blue = blue + 0.5 * _dots(rng, side, 0.6, 1.4)
    density = np.clip(blue, 0, None)[..., None] * _HAEMATOXYLIN + np.clip(ground, 0, None)[..., None] * _EOSIN
    return np.asarray(244 * np.power(10.0, -0.75 * density), np.float32)


def _dots(rng: Generator, side: int, least: float, most: float) -> Field:
    """Debris: specks too small for nuclei."""
    layer = np.zeros((side, side), np.float32)
    for x, y in rng.uniform(0, side, (int(rng.integers(0, 14)), 2)):
        radius = max(1, round(float(rng.uniform(least, most) * side / 128)))
        cv2.circle(layer, (round(float(x)), round(float(y))), radius, float(rng.uniform(0.3, 1)), -1, cv2.LINE_AA)
    return np.asarray(layer)
