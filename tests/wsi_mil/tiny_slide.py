"""A small pyramidal TIFF with pink tissue and a dark, nucleus-rich region, for tests that need a real file."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile


def tissue_picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """RGB (height, width, 3): white glass, one pink oval of tissue, and crowded dark nuclei in its left half."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 245, np.uint8)
    tissue = np.zeros((height, width), np.uint8)
    cv2.ellipse(tissue, (width // 2, height // 2), (int(width * 0.4), int(height * 0.38)), 0, 0, 360, 1, -1)
    texture = rng.normal(0, 8, (height, width, 1))
    picture[tissue > 0] = np.clip(np.array([225, 150, 190]) + texture, 0, 255).astype(np.uint8)[tissue > 0]
    for _ in range(width * height // 400):
        x, y = rng.uniform(0.12, 0.5) * width, rng.uniform(0.15, 0.85) * height
        if tissue[int(y), int(x)]:
            cv2.circle(picture, (int(x), int(y)), int(rng.integers(3, 6)), (85, 45, 130), -1)
    return picture


def write_slide(path: Path, width: int = 1500, height: int = 1100, mpp: float | None = 0.5, seed: int = 0) -> Path:
    """Write the picture as a tiled pyramid of three levels; no resolution is stated when ``mpp`` is None."""
    level = tissue_picture(width, height, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for number in range(3):
            options: dict = {"subfiletype": 1 if number else 0}
            if mpp:
                per_cm = 1e4 / (mpp * 2**number)
                options |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            writer.write(level, tile=(256, 256), photometric="rgb", compression="deflate", metadata=None, **options)
            level = cv2.resize(level, (level.shape[1] // 2, level.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return path
