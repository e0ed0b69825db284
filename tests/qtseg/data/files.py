"""Small image sets for tests."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from tasks.qtseg.data import ImageSet2D, load_images

DEFAULTS = {
    "preset": "folders",
    "path": None,
    "labels": None,
    "threshold": None,
    "mask_suffix": None,
    "patient_pattern": None,
    "polyps": "one",
}


def settings(path: Path | None = None, **options: Any) -> DictConfig:
    """The part of ``data`` that says where the images are."""
    return OmegaConf.create({**DEFAULTS, "path": None if path is None else str(path), **options})


def load(path: Path | None, **options: Any) -> ImageSet2D:
    """:func:`load_images` of a folder or CSV."""
    return load_images(settings(path, **options))


def blob(seed: int, size: tuple[int, int] = (20, 28)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (H, W, 3) and the mask (H, W), 0 or 255, of the rectangle that is brighter in it."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
    mask[top : top + size[0] // 2, left : left + size[1] // 2] = 255
    image = rng.integers(0, 120, (*size, 3)) + mask[..., None] * 0.5
    return image.astype(np.uint8), mask


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    """Write a picture, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_pairs(root: Path, names: list[str], images: str = "images", masks: str = "masks", ending: str = "") -> None:
    """``images/NAME.png`` and ``masks/NAME<ending>.png`` for each name."""
    for seed, name in enumerate(names):
        image, mask = blob(seed)
        save(root / images / f"{name}.png", image)
        save(root / masks / f"{name}{ending}.png", mask)
