"""What should not be learnt from: ink of marker pens, and tiles out of focus."""

from __future__ import annotations

import cv2
import numpy as np

# OpenCV's hue (0 to 179), saturation and value, each as lowest and highest. Haematoxylin and eosin lie between hue 130
# and 170, the blue of haematoxylin alone at 100 to 130 but pale; ink is purer than any stain.
_INKS = {
    "green": ((35, 50, 0), (99, 255, 255)),
    "blue": ((100, 120, 0), (126, 255, 255)),
    "red": ((171, 120, 60), (179, 255, 255)),
    "orange": ((0, 120, 60), (6, 255, 255)),
    "black": ((0, 0, 0), (179, 90, 45)),
}


def pen_mask(rgb: np.ndarray, grow: int = 3) -> np.ndarray:
    """Where a slide is marked with a green, blue, red or black pen.

    Args:
        rgb: (h, w, 3) uint8, at a few micrometres per pixel or coarser.
        grow: pixels by which the found ink is enlarged, for its pale rim.

    Returns:
        (h, w) bool. Specks smaller than about 25 pixels are taken for tissue, not ink.
    """
    hsv = cv2.cvtColor(cv2.medianBlur(rgb, 5), cv2.COLOR_RGB2HSV)
    found = [cv2.inRange(hsv, np.array(low), np.array(high)) for low, high in _INKS.values()]
    ink = cv2.morphologyEx(np.bitwise_or.reduce(found), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    if grow:
        ink = cv2.dilate(ink, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * grow + 1, 2 * grow + 1)))
    return ink.astype(bool)


def sharpness(tile: np.ndarray) -> float:
    """Variance of the Laplacian of the grey tile: about 0 for a flat one, tens out of focus, hundreds in focus.

    Args:
        tile: (h, w, 3) uint8.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """
    return float(cv2.Laplacian(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), cv2.CV_16S).var())
