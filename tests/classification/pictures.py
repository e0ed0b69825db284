"""Small labelled images for tests: stripes one way or the other, in colours that tell nothing."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("across", "down", "plain")


def stripes(kind: str, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """One picture (side, side, 3) uint8."""
    colour = rng.uniform(80, 170, 3)
    axis = np.arange(side) + rng.uniform(0, 8)
    wave = 50 * np.sin(axis * 2 * np.pi / rng.uniform(5, 8))
    height = {"across": wave[:, None], "down": wave[None], "plain": np.zeros((1, 1))}[kind]
    noise = rng.normal(0, 12, (side, side, 1))
    return np.clip(colour + height[..., None] + noise, 0, 255).astype(np.uint8)


def write_set(folder: Path, count: int = 48, classes: int = 2, seed: int = 0, patients: bool = True) -> Path:
    """``<class>/NNN.png`` and ``images.csv`` (path, label, patient); two images in a row are one patient's."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        kind = CLASSES[(i // 2) % classes]
        path = folder / kind / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stripes(kind, rng)).save(path)
        rows.append([path.relative_to(folder).as_posix(), kind, *([f"p{i // 2}"] if patients else [])])
    table = folder / "images.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", *(["patient"] if patients else [])])
        writer.writerows(rows)
    return table
