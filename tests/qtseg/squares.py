"""Small images for whole runs: noisy squares that are textured, not brighter, so that a threshold finds little."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def square(seed: int, size: tuple[int, int] = (40, 52)) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and the mask (H, W), 0 or 255, of the square that is striped in it."""
    rng = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros(size, np.uint8)
    side = int(rng.integers(14, 22))
    top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
    mask[top : top + side, left : left + side] = 255
    stripes = 45 * np.where(np.arange(width) % 4 < 2, 1, -1)[None] * (mask > 0)
    grey = rng.uniform(100, 150) + stripes + rng.normal(0, 12, size)
    return np.clip(grey[..., None] + rng.uniform(-8, 8, 3), 0, 255).astype(np.uint8), mask


def write_set(folder: Path, count: int = 24, empty: int = 0, fov: bool = False) -> Path:
    """``images/``, ``masks/`` and ``images.csv``, maybe ``fov/``; two images in a row are a patient's."""
    rows = []
    for i in range(count):
        image, mask = square(i, (40, 52) if i % 2 else (48, 44))
        if i < empty:
            mask[:] = 0
        name = f"case_{i:02d}.png"
        parts = {"images": image, "masks": mask}
        if fov:
            inside = np.full(mask.shape, 255, np.uint8)
            inside[:, :6] = 0
            parts["fov"] = inside
        for part, array in parts.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / name)
        rows.append(
            [f"images/{name}", f"masks/{name}", f"p{i // 2}", Path(name).stem, *([f"fov/{name}"] if fov else [])]
        )
    table = folder / "images.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "patient", "id", *(["fov"] if fov else [])])
        writer.writerows(rows)
    return table


def read_picture(path: str | Path) -> np.ndarray:
    """The samples of a picture file."""
    with Image.open(path) as picture:
        return np.asarray(picture)
