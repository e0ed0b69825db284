"""Masks and probabilities as PNG files that any viewer shows and that can be read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from tasks.common.files import atomic_path
from tasks.common.plots import class_colour


def write_mask(path: Path, mask: NDArray[np.uint8], classes: Sequence[str]) -> None:
    """Classes (H, W) as PNG: black and white for one structure, else indices with a palette of the classes' colours."""
    if len(classes) == 2:
        picture = Image.fromarray((mask > 0).astype(np.uint8) * 255)
    else:
        picture = Image.fromarray(mask)
        picture.putpalette([part for colour in ((0, 0, 0), *colours_of(classes).values()) for part in colour])
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", optimize=False)


def read_mask_of(path: Path) -> NDArray[np.uint8]:
    """Classes (H, W) of a file of :func:`write_mask`."""
    with Image.open(path) as picture:
        array = np.asarray(picture, np.uint8)
        return array if picture.mode == "P" else (array > 0).astype(np.uint8)


def write_probability(path: Path, probability: NDArray[np.floating]) -> None:
    """Probabilities (H, W) as 16-bit PNG: 0 is 0, 65535 is 1."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.rint(np.clip(probability, 0, 1) * 65535).astype(np.uint16)).save(temporary, format="PNG")


def colours_of(classes: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Name of each class but the background -> red, green, blue, as in every picture."""
    found = {}
    for k, name in enumerate(classes[1:]):
        red, green, blue = (round(255 * part) for part in to_rgb(class_colour(k)))
        found[name] = (red, green, blue)
    return found
