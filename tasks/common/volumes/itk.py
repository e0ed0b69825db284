"""NRRD and MetaImage through SimpleITK, turned from LPS+ and (z, y, x) to RAS+ and (x, y, z)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from tasks.common.volumes.geometry import LPS_TO_RAS, Affine, Grid


def read_itk(path: Path, kind: type[np.floating[Any]]) -> tuple[NDArray[Any], Affine]:
    """Intensities (x, y, z[, channels]) and the affine."""
    with quiet_itk():
        image = sitk.ReadImage(str(path))
    values = sitk.GetArrayViewFromImage(image).astype(kind)
    axes = list(range(image.GetDimension()))[::-1] + list(range(image.GetDimension(), values.ndim))
    return values.transpose(axes), itk_affine(image)


def itk_affine(image: Any) -> Affine:
    """The RAS+ affine of an ITK image (or file reader); of the first three of more axes."""
    n = image.GetDimension()
    direction = np.array(image.GetDirection(), np.float64).reshape(n, n)
    affine = np.eye(4)
    m = min(n, 3)
    affine[:m, :m] = (direction * np.array(image.GetSpacing()))[:m, :m]
    affine[:m, 3] = image.GetOrigin()[:m]
    return LPS_TO_RAS @ affine


def as_itk(values: NDArray[Any], grid: Grid) -> sitk.Image:
    """An ITK image of (X, Y, Z) values."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    affine = LPS_TO_RAS @ grid.affine
    image.SetSpacing(grid.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.array(grid.spacing)).ravel().tolist())
    return image


@contextlib.contextmanager
def quiet_itk() -> Iterator[None]:
    """ITK's warnings, which go past Python to standard error, are left out inside."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
