"""Pictures of results as files: outlines on the image, and the worst images with what is right and wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.common.files import atomic_path
from tasks.common.segmentation.overlays import outline_overlay

_LONGEST = 4096  # pixels of an overlay


def write_outlines(path: Path, image: NDArray[Any], mask: NDArray[np.uint8]) -> None:
    """The image with the outline of every class, as PNG."""
    step = -(-max(mask.shape) // _LONGEST)
    picture = Image.fromarray(outline_overlay(image[::step, ::step], mask[::step, ::step]))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
