"""What the painters share: smooth noise, coordinates, random curves."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Field = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """One made image.

    Attributes:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, 0 or 255.
        fov: (H, W) uint8, 0 or 255, or None.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    fov: NDArray[np.uint8] | None = None


def smooth_noise(rng: Generator, side: int, grain: float, octaves: int = 1) -> Field:
    """Noise of mean about 0 and deviation about 1, (side, side), with patches of ``grain`` pixels and finer ones."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        cells = int(side / grain * 2**octave) + 3
        coarse = rng.standard_normal((cells, cells), dtype=np.float32)
        total += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return np.asarray(total / max(float(total.std()), 1e-6))


def coordinates(side: int) -> tuple[Field, Field]:
    """Pixel centres (y, x), each (side, side)."""
    yy, xx = np.mgrid[:side, :side].astype(np.float32)
    return yy, xx


def smoothstep(value: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, without a kink between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def finished(image: Field, rng: Generator, blur: float, noise: float) -> NDArray[np.uint8]:
    """Focus and sensor noise, as 8-bit pixels; ``image`` is (H, W, 3) in [0, 255]."""
    soft = cv2.GaussianBlur(image, (0, 0), blur) if blur > 0 else image
    grain = rng.standard_normal(soft.shape, dtype=np.float32) * noise
    return np.clip(soft + grain + 0.5, 0, 255).astype(np.uint8)
