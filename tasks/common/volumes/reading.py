"""``read_volume`` and ``read_label``: one file or DICOM folder of any format, checked, in one form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.volumes.geometry import Affine
from tasks.common.volumes.volume import ITK_SUFFIXES, SUFFIXES, Volume, suffix_of


def read_volume(path: str | Path, channel: int | None = None, series: str | None = None) -> Volume:
    """The image in ``path`` with real intensities, float32.

    Args:
        path: .nii, .nii.gz, .hdr/.img, .nrrd, .nhdr, .mha, .mhd, or a folder that holds a DICOM series.
        channel: which volume of a file with a fourth axis longer than 1.
        series: UID or description, where a DICOM folder holds several.

    Raises:
        InputError: the file is missing, damaged, of another kind or dimension, holds NaN, infinite or only equal
            voxels, or its geometry cannot be used.
    """
    volume = _read(Path(path), channel, series, np.float32)
    low, high = float(volume.data.min()), float(volume.data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(volume.data.size - np.count_nonzero(np.isfinite(volume.data)))
        raise InputError(f"{path} holds {bad} NaN or infinite voxels; replace them (by 0 outside the body) first.")
    if low == high:
        what = "only zeros" if low == 0 else f"the same value {low:g} everywhere"
        raise InputError(f"{path} holds {what}; export the volume again.")
    return volume


def read_label(path: str | Path, channel: int | None = None) -> Volume:
    """The label map in ``path`` as whole numbers in the smallest type that holds them.

    Raises:
        InputError: as :func:`read_volume`, but equal voxels are allowed; or a value is not whole or below zero.
    """
    volume = _read(Path(path), channel, None, np.float64 if _is_wide(Path(path)) else np.float32)
    values = volume.data
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path} holds NaN or infinite voxels; a label map has whole numbers only.")
    if low < 0:
        raise InputError(f"{path} holds the negative label {low:g}; labels are 0 (background) and above.")
    kind = np.uint8 if high < 256 else np.uint16 if high < 65536 else np.int32
    # A slope may leave a hair's breadth; what is further off is a probability or an image.
    whole = (values + np.float32(0.5)).astype(kind)
    off = np.abs(values - whole)
    if off.max() > 1e-3:
        raise InputError(
            f"{path} holds {float(values.flat[int(off.argmax())]):g}, which is not a whole number; give a label map, "
            "not an image or probabilities."
        )
    return Volume(whole, volume.affine, volume.path, volume.nifti)


def _read(path: Path, channel: int | None, series: str | None, kind: type[np.floating[Any]]) -> Volume:
    if not path.exists():
        raise InputError(f"{path} does not exist; correct the path or take it off the list.")
    fields: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()
    try:
        if path.is_dir():
            from tasks.common.volumes.dicom import read_dicom

            values, affine, files = read_dicom(path, series)
        elif suffix_of(path) is None:
            known = f"known: {', '.join(SUFFIXES)}, and folders with a DICOM series"
            raise InputError(f"{path} is not in a volume format that can be read; {known}.")
        elif path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); copy it again or remove it.")
        elif suffix_of(path) in ITK_SUFFIXES:
            from tasks.common.volumes.itk import read_itk

            values, affine = read_itk(path, kind)
        else:
            from tasks.common.volumes.nifti import read_nifti

            values, affine, fields = read_nifti(path, kind)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # every decoder has its own exceptions for a damaged file
        raise InputError(
            f"{path} cannot be read as a volume ({_reason(error)}); copy it again or remove it."
        ) from error
    values = _three_axes(values, channel, path)
    _check_affine(affine, path)
    return Volume(values, affine, path, fields, files)


def _three_axes(values: NDArray[Any], channel: int | None, path: Path) -> NDArray[Any]:
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 5 and values.shape[3] == 1:  # NIfTI keeps vectors on the fifth axis
        values = values[:, :, :, 0]
    if values.ndim == 4:
        count = values.shape[3]
        if channel is None:
            raise InputError(
                f"{path} has {values.ndim} axes {values.shape}: the last one has {count} volumes (time points or "
                f"channels); choose one with channel=0 to {count - 1}."
            )
        if not 0 <= channel < count:
            raise InputError(f"{path}: channel={channel}, but there are {count} volumes, 0 to {count - 1}.")
        values = np.array(values[..., channel], order="F")  # a copy, so that the others are given up
    if values.ndim != 3 or min(values.shape) < 2:
        shape = " x ".join(map(str, values.shape))
        raise InputError(f"{path} has the shape {shape}, but a volume has three axes of two voxels or more.")
    return values


def _check_affine(affine: Affine, path: Path) -> None:
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine holds values that are not finite; correct the header.")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths <= 0).any():
        raise InputError(f"{path}: the voxel spacing {lengths.tolist()} mm must be positive; correct the header.")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        raise InputError(f"{path}: the affine is singular (two axes run the same way); correct the header's sform.")


def _is_wide(path: Path) -> bool:
    """Whether float32 may not tell the labels of a file apart: above 24 bits."""
    if path.is_dir() or suffix_of(path) in (None, *ITK_SUFFIXES):
        return False
    import nibabel

    try:
        stored = nibabel.load(path).get_data_dtype()  # type: ignore[attr-defined]
    except Exception:  # said by the reading that follows
        return False
    return bool(stored.itemsize > 2)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rpartition("ERROR: ")[2].rstrip(".?")[:200]  # ITK tells where in its source it was first
