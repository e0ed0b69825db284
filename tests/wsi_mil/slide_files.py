"""Slides and an encoder small enough to make in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
import torch
from torch import Tensor, nn


def tissue_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """White glass with one pink, grainy ellipse in the middle, RGB uint8."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 243, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 2, height // 2), (width // 4, height // 3), 0, 0, 360, 1, -1)
    grain = rng.normal(0, 25, (height, width, 1))
    image[mask == 1] = np.clip(np.array([190, 110, 170]) + grain, 0, 255).astype(np.uint8)[mask == 1]
    return image


def write_pyramid(path: Path, image: np.ndarray, mpp: float | None = 0.5, levels: int = 2, step: int = 2) -> Path:
    """A tiled pyramidal TIFF as scanners' converters write it; lossless, so that pixels can be compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            about: dict[str, Any] = {"resolution": (1, 1), "resolutionunit": "NONE"}
            if mpp is not None:
                per_cm = 1e4 / (mpp * step**level)
                about = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            kind = 1 if level else 0
            tiff.write(image, tile=(64, 64), photometric="rgb", compression="deflate", subfiletype=kind, **about)
            size = (max(1, image.shape[1] // step), max(1, image.shape[0] // step))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return path


class SmallEncoder(nn.Module):
    """A fixed random convolution; fulfils the contract of ``backbones.create_encoder``."""

    def __init__(self, dim: int = 12, seed: int = 0, mpp: float | None = None, input_size: int = 64) -> None:
        super().__init__()
        self.name, self.dim, self.weights = "small", dim, f"random, seed {seed}"
        self.mpp, self.input_size = mpp, input_size
        self.layer = nn.Conv2d(3, dim, 8, stride=8)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.layer.weight, std=0.05, generator=generator)
        nn.init.zeros_(self.layer.bias)

    def forward(self, tiles: Tensor) -> Tensor:
        assert tiles.dtype == torch.uint8
        return self.layer(tiles.float() / 255).mean((2, 3))
