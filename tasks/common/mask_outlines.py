"""The outlines of a mask along the edges of its pixels, so that the area inside is the mask's to the pixel."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label

from kernels.errors import InputError
from tasks.common.contours import Contour

Points = NDArray[np.int64]


def mask_contours(mask: ArrayLike, scale: tuple[float, float] = (1.0, 1.0), tolerance: float = 0.0) -> list[Contour]:
    """One contour for each piece of a mask, in the order of the pieces' first pixels, holes as inner rings.

    Pixel (row, column) covers x from column to column + 1 and y from row to row + 1, as in QuPath. Pixels that touch at
    a corner only are separate pieces; rings are simple, and touch others at corners at most, so that every polygon is
    valid.

    Args:
        mask: (h, w), region where it is not 0.
        scale: (x, y) pixels of the full image per pixel of the mask.
        tolerance: how far a simplified outline may run from the pixels' edges, in pixels of the mask (Douglas and
            Peucker); 0 keeps it exact.

    Raises:
        InputError: the mask is not two-dimensional.
    """
    inside = np.asarray(mask) != 0
    if inside.ndim != 2:
        raise InputError(f"a mask of shape {inside.shape} has no outline; give one of two axes, (height, width).")
    if not inside.any():
        return []
    pieces, count = label(inside)
    start, end, piece = _edges(inside, pieces)
    following = _link(start, end, piece, pieces)
    rings = _rings(start, following)
    pixel_to_image = np.asarray(scale, float)
    contours: list[Contour | None] = [None] * count
    holes: list[list[NDArray]] = [[] for _ in range(count)]
    for ring in rings:
        points = _corners(start[ring])
        own = piece[ring[0]] - 1
        outer = _signed_area(points) > 0
        finished = _simplify(points, tolerance) * pixel_to_image
        whole = finished.astype(np.int32)
        finished = whole if (whole == finished).all() else finished
        if outer:
            contours[own] = Contour(finished)
        else:
            holes[own].append(finished)
    found = [contour for contour in contours if contour is not None]
    assert len(found) == count, "every piece has an outer ring"
    for contour, inner in zip(found, holes, strict=True):
        contour.holes.extend(inner)
    return found


def class_contours(
    labels: ArrayLike, classes: dict[int, str], scale: tuple[float, float] = (1.0, 1.0), tolerance: float = 0.0
) -> dict[str, list[Contour]]:
    """Name of the class -> its contours, for a label map (h, w); see :func:`mask_contours`."""
    values = np.asarray(labels)
    return {name: mask_contours(values == value, scale, tolerance) for value, name in classes.items()}


def _edges(inside: NDArray[np.bool_], pieces: NDArray) -> tuple[Points, Points, Points]:
    """Start and end (n, 2) as x, y of every pixel edge on the border, the mask on its right hand, and its piece (n,).

    With y down, the right hand of the direction of travel is inside, so that outer rings have a positive area.
    """
    padded = np.pad(inside, 1)
    own = np.pad(pieces, 1)
    parts = []
    # For each side of a pixel: the step to its neighbour; the edge's start and end from the pixel's upper left corner.
    sides = (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    )
    for (down, right), first, last in sides:
        border = padded & ~np.roll(padded, (-down, -right), (0, 1))
        rows, columns = np.nonzero(border)
        corner = np.stack([columns - 1, rows - 1], axis=1)
        parts.append((corner + first, corner + last, own[rows, columns]))
    start, end, piece = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return start, end, piece.astype(np.int64)


def _link(start: Points, end: Points, piece: Points, pieces: NDArray) -> Points:
    """The edge that follows each edge.

    One edge leaves most corners. Two leave where pixels touch at a corner only: pixels of one piece are joined there,
    which parts the holes, and pixels of two pieces are parted.
    """
    width = pieces.shape[1] + 1
    leaving, arriving = start[:, 1] * width + start[:, 0], end[:, 1] * width + end[:, 0]
    order = np.argsort(leaving, kind="stable")
    first = np.searchsorted(leaving[order], arriving, side="left")
    last = np.searchsorted(leaving[order], arriving, side="right") - 1
    following = order[first]
    crossing = first != last
    direction, ahead = end - start, end[order] - start[order]
    one, two = order[first[crossing]], order[last[crossing]]
    turn = direction[crossing]
    right = np.stack([-turn[:, 1], turn[:, 0]], axis=1)  # y is down
    one_turns_right = (ahead[first[crossing]] == right).all(axis=1)
    right_edge, left_edge = np.where(one_turns_right, one, two), np.where(one_turns_right, two, one)
    same_piece = piece[right_edge] == piece[left_edge]
    following[crossing] = np.where(same_piece, left_edge, right_edge)
    return following


def _rings(start: Points, following: Points) -> list[Points]:
    """The edges of each ring in the order they are walked, by doubling the steps of all edges at once."""
    count = len(start)
    smallest, jump = np.arange(count), following
    steps = max(1, int(np.ceil(np.log2(count + 1))))
    for _ in range(steps):  # the smallest edge of its ring names it
        smallest = np.minimum(smallest, smallest[jump])
        jump = jump[jump]
    # How far each edge is from the end of its ring, cut open before the edge that names it.
    is_last = following == smallest
    jump = np.where(is_last, np.arange(count), following)
    distance = np.where(is_last, 0, 1)
    for _ in range(steps):
        distance = distance + distance[jump]
        jump = jump[jump]
    order = np.lexsort((-distance, smallest))
    bounds = np.flatnonzero(np.diff(smallest[order])) + 1
    return np.split(order, bounds)


def _corners(points: Points) -> Points:
    """The points of a ring (n, 2) where it turns."""
    step = np.roll(points, -1, axis=0) - points
    return np.asarray(points[(step != np.roll(step, 1, axis=0)).any(axis=1)])


def _signed_area(points: Points) -> float:
    x, y = points.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _simplify(points: Points, tolerance: float) -> NDArray:
    """Fewer points; a ring that would vanish stays as it is."""
    if tolerance <= 0:
        return points
    fewer = cv2.approxPolyDP(points.astype(np.int32), tolerance, True)[:, 0]
    return np.asarray(fewer if len(fewer) > 2 else points)
