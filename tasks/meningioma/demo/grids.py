"""Voxel grids as scanners give them: every orientation, uneven spacing, tilted slices."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.meningioma.demo.fields import Floats

# The field of view that holds a head, millimetres to the right, anterior and superior, and where its middle lies.
_VIEW = np.array([176.0, 218.0, 196.0])
_MIDDLE = np.array([0.0, 4.0, -8.0])
# Axial, coronal and sagittal series with the axis codes of common scanners and converters; both handednesses.
_AXES = ("LPS", "RAS", "LAS", "LIP", "PIR", "RPI", "ASR", "LSA")
# qform and sform codes; with 0 a reader must use the other.
_CODES = ((1, 1), (1, 1), (0, 1), (1, 0))
STORED = ("int16", "int16", "uint8", "float32", "int16 with slope")


@dataclass(frozen=True)
class Grid:
    """A voxel grid in a scanner, and where the head lies in it.

    Attributes:
        shape: (3,) voxels.
        affine: (4, 4) voxel index to RAS+ millimetres of the scanner.
        pose: (4, 4) RAS+ millimetres of the scanner to those of the head.
        codes: qform and sform code of the file.
        stored: one of ``STORED``.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    pose: NDArray[np.float64]
    codes: tuple[int, int]
    stored: str

    @classmethod
    def draw(cls, rng: Generator, number: int, side: int) -> Grid:
        """Grid ``number`` of a data set: orientation, codes and storage take turns, the rest is at random.

        Args:
            side: voxels along the longest axis; the others have three quarters of it or more.
        """
        axes = _AXES[number % len(_AXES)]
        orientation = nibabel.orientations.axcodes2ornt(tuple(axes))
        of_world = orientation[:, 0].astype(int)  # voxel axis -> world axis
        view = _VIEW[of_world]
        least = -(-3 * side // 4)
        shape = np.array([side, int(rng.integers(least + 2, side + 1)), int(rng.integers(least, least + 3))])
        if view[1] > view[0]:  # the finest axis is the longest
            shape[[0, 1]] = shape[[1, 0]]
        spacing = np.round(view / shape * rng.uniform(0.97, 1.03), 3)
        turn = _rotation(rng.uniform(-12, 12, 3) if number % 3 == 2 else np.zeros(3))
        columns = turn @ (np.eye(3)[:, of_world] * orientation[:, 1])
        affine = np.eye(4)
        affine[:3, :3] = columns * spacing
        centre = rng.uniform(-25, 25, 3)
        affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
        return cls(
            shape=(int(shape[0]), int(shape[1]), int(shape[2])),
            affine=affine,
            pose=_pose(rng, centre),
            codes=_CODES[number % len(_CODES)],
            stored=STORED[number % len(STORED)],
        )

    @property
    def spacing(self) -> NDArray[np.float64]:
        """(3,) millimetres."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    def points(self) -> Floats:
        """(3, X * Y * Z) the voxels' centres in millimetres of the head."""
        to_head = (self.pose @ self.affine).astype(np.float32)
        index = np.indices(self.shape, np.float32).reshape(3, -1)
        return np.asarray(to_head[:3, :3] @ index + to_head[:3, 3:])


def _pose(rng: Generator, centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """A nodding, tilted, turned head a little off the middle of the field of view."""
    pose = np.eye(4)
    pose[:3, :3] = _rotation(rng.normal(0, (4, 3, 4)))
    pose[:3, 3] = _MIDDLE - pose[:3, :3] @ (centre + rng.uniform(-3, 3, 3))
    return pose


def _rotation(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turns about the right, anterior and superior axis, one after the other."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[[i, j], [i, j]] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn
