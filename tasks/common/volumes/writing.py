"""Results as files that lie exactly on their input: same shape, affine, header codes; never over or beside it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.files import atomic_path
from tasks.common.volumes.geometry import as_shape
from tasks.common.volumes.nifti import place_header
from tasks.common.volumes.volume import Volume, suffix_of

_WRITTEN = (".nii.gz", ".nii", ".nrrd", ".mha")


def write_mask(path: str | Path, mask: NDArray[Any], like: Volume) -> Path:
    """Write a label map (X, Y, Z) on the grid of ``like`` as uint8 (uint16 above 255), slope 1.

    The suffix of ``path`` says the format: .nii, .nii.gz, .nrrd or .mha. A NIfTI file made from a NIfTI file has its
    qform and sform with their codes and its units; from any other format, both codes are 1 and the unit is mm.

    Raises:
        InputError: ``path`` lies in the folder of the input, or has another suffix, or cannot be written.
    """
    if mask.dtype.kind not in "biu":
        raise ValueError(f"a mask has whole numbers, not {mask.dtype}")
    kind = np.uint16 if mask.dtype.itemsize > 1 and mask.max(initial=0) > 255 else np.uint8
    return _write(Path(path), mask.astype(kind, copy=False), like)


def write_probabilities(path: str | Path, probabilities: NDArray[np.float32], like: Volume) -> Path:
    """Write probabilities (X, Y, Z), or of all classes (K, X, Y, Z), on the grid of ``like`` as float32.

    Several classes become the fourth axis of a NIfTI file.

    Raises:
        InputError: as :func:`write_mask`; or several classes for another format than NIfTI.
    """
    values = probabilities.astype(np.float32, copy=False)
    if values.ndim == 4:
        values = np.moveaxis(values, 0, -1)
    return _write(Path(path), values, like)


def _write(path: Path, values: NDArray[Any], like: Volume) -> Path:
    suffix = suffix_of(path)
    if suffix not in _WRITTEN:
        raise InputError(f"{path}: results are written as {', '.join(_WRITTEN)}; give one of these suffixes.")
    if values.shape[:3] != like.grid.shape:
        raise ValueError(f"values of shape {values.shape} for a volume of {like.grid.shape}")
    refuse_beside(path, like.path)
    if suffix in (".nii.gz", ".nii"):
        image = _nifti(values, like)
        with atomic_path(path) as temporary, temporary.open("wb") as plain:
            if suffix == ".nii":
                image.to_stream(plain)
            else:  # neither name nor time in the archive: the same mask gives the same bytes
                with gzip.GzipFile("", "wb", 6, plain, mtime=0) as packed:
                    image.to_stream(packed)
        return path
    if values.ndim == 4:
        raise InputError(f"{path}: several classes in one file are written as NIfTI only; choose .nii.gz.")
    import SimpleITK as sitk

    from tasks.common.volumes.itk import as_itk

    with atomic_path(path) as temporary:
        sitk.WriteImage(as_itk(values, like.grid), str(temporary), useCompression=True)
    return path


def refuse_beside(path: Path, source: Path) -> None:
    """Refuse to write into the folder an input came from.

    Raises:
        InputError: ``path`` lies there.
    """
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    if path.resolve().parent == folder or path.resolve() == source.resolve():
        raise InputError(f"{path} lies beside the input {source}; choose another folder for results.")


def _nifti(values: NDArray[Any], like: Volume) -> nibabel.Nifti1Image:
    if like.nifti is not None:
        header = place_header(dict(like.nifti))
    else:
        header = nibabel.Nifti1Header()
        header.set_xyzt_units("mm")
    header.set_data_dtype(values.dtype)
    image = nibabel.Nifti1Image(values, like.affine, header)
    if like.nifti is None:
        image.set_sform(like.affine, 1)
        image.set_qform(like.affine, 1)  # the nearest rotation where the axes are sheared
    assert as_shape(image.shape[:3]) == like.grid.shape
    image.header.set_slope_inter(1, 0)
    return image
