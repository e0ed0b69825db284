"""NIfTI (and Analyze) through nibabel: real intensities in float32, and the header fields a result file repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.volumes.geometry import Affine

PLACE_FIELDS = (
    *("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)
"""Of the header: spacing, both affines with their codes, and units."""


def read_nifti(path: Path, kind: type[np.floating[Any]]) -> tuple[NDArray[Any], Affine, dict[str, Any] | None]:
    """Real intensities of any number of axes, the affine (the sform's, else the qform's, else the spacing's) and
    :data:`PLACE_FIELDS`.

    Args:
        kind: type of the result; the intensities are never held in a wider one.
    """
    image: Any = nibabel.load(path)
    stored = image.get_data_dtype()
    if stored.kind not in "iuf":
        what = "colour" if stored.names else "complex" if stored.kind == "c" else str(stored)
        raise InputError(f"{path} holds {what} voxels; give one real number per voxel, a file per channel.")
    _check_spacing(image, path)
    proxy = image.dataobj
    raw = np.asanyarray(proxy.get_unscaled())
    values = raw.astype(kind)
    slope, inter = float(proxy.slope), float(proxy.inter)
    if slope != 1:
        values *= kind(slope)
    if inter != 0:
        values += kind(inter)
    header = image.header
    fields = None
    if isinstance(header, nibabel.Nifti1Header):
        unit = header.get_xyzt_units()[0]
        if unit in ("meter", "micron"):
            raise InputError(f"{path} states its lengths in {unit}; convert its header to mm.")
        fields = {name: np.asarray(header[name]).tolist() for name in PLACE_FIELDS}
    return values, np.asarray(image.affine, np.float64), fields


def place_header(fields: dict[str, Any]) -> nibabel.Nifti1Header:
    """A header with :data:`PLACE_FIELDS` and defaults for the rest."""
    header = nibabel.Nifti1Header()
    for name in PLACE_FIELDS:
        header[name] = fields[name]
    header["pixdim"][4:] = 1  # of axes the result has not
    return header


def _check_spacing(image: Any, path: Path) -> None:
    """nibabel repairs a spacing of zero or less without a word; it is read here as it is in the file."""
    holder = image.file_map.get("header", image.file_map["image"])
    with nibabel.openers.ImageOpener(holder.filename) as file:
        stored = type(image.header).from_fileobj(file, check=False)
    spacing = np.asarray(stored["pixdim"][1:4], np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(
            f"{path}: the voxel spacing {spacing.tolist()} mm must be positive; correct its header (pixdim)."
        )
