"""Reading one image for a classifier: of any depth and colour that :mod:`tasks.common.images` reads, as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.common import images

SUFFIXES = images.IMAGE_SUFFIXES
Pixels = NDArray[np.uint8]


def read_image(path: Path, window: Sequence[float] | None = None) -> Pixels:
    """The image as RGB (H, W, 3) uint8; grey is repeated, transparency dropped, the camera's orientation applied.

    Args:
        window: the intensities (low, high) of a 16-bit image that become black and white; by default the whole range.

    Raises:
        InputError: the file is missing, empty, damaged, no image of these formats, or of another depth.
    """
    array = images.read_image(path)
    if array.dtype == np.uint16:
        low, high = (0, 65535) if window is None else window
        array = np.clip((array.astype(np.float32) - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
