"""A volume: voxels, where they lie, and what a result file needs to look like its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tasks.common.volumes.geometry import Affine, Grid, as_shape

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES


@dataclass(frozen=True, eq=False)
class Volume:
    """One three-dimensional image in its file's own voxel order.

    Attributes:
        data: (X, Y, Z); float32 real intensities (slope and intercept applied), or whole numbers of a label map.
        affine: (4, 4) float64, voxel indices to RAS+ mm.
        path: the file, or the folder of a DICOM series.
        nifti: the fields of a NIfTI header that say where the voxels lie, as they were read; None for other formats.
        files: slices of a DICOM series in the order of the last axis.
    """

    data: NDArray[Any]
    affine: Affine
    path: Path
    nifti: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = ()

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""
        return Grid(as_shape(self.data.shape), self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis, mm."""
        return self.grid.spacing


def suffix_of(path: Path) -> str | None:
    """The known suffix of a file's name in lower case, such as ``.nii.gz``; None for any other file."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), None)


def stem_of(path: Path) -> str:
    """The name of a file without its known suffix.

    >>> stem_of(Path("a/case.1.nii.gz"))
    'case.1'
    """
    return path.name[: -len(suffix_of(path) or path.suffix) or None]
