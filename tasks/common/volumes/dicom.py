"""A DICOM series as a volume: slices sorted along the normal, equal spacing checked, rescale slope applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from kernels.errors import InputError, unknown_name
from tasks.common.volumes.geometry import LPS_TO_RAS, Affine
from tasks.common.volumes.itk import itk_affine, quiet_itk

_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_DESCRIPTION, _MODALITY = "0008|103e", "0008|0060"
_TOLERANCE = 0.02  # of the distance between slices; scanners round positions to a hundredth of a millimetre or so


@dataclass(frozen=True)
class Series:
    """One series of a folder: its UID, what the scanner called it, and its files."""

    uid: str
    description: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.uid} ({self.description or 'no description'}, {len(self.files)} files)"


def list_series(folder: Path) -> list[Series]:
    """The image series in a folder (not its subfolders), in order of their UIDs."""
    found = []
    with quiet_itk():
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
            try:
                about = _about(files[0])
            except RuntimeError:  # a report, a registration: a series without pixels
                continue
            if _value(about, _MODALITY) not in ("SEG", "RTSTRUCT", "SR", "PR", "KO"):
                found.append(Series(uid, _value(about, _DESCRIPTION), tuple(files)))
    return sorted(found, key=lambda series: series.uid)


def choose_series(folder: Path, series: str | None) -> Series:
    """The only series of a folder, or the one named by its UID or description.

    Raises:
        InputError: there is none, or there are several and ``series`` names none of them alone.
    """
    there = list_series(folder)
    if not there:
        raise InputError(f"{folder} holds no DICOM series; give the folder whose files are the slices of one series.")
    if series is None:
        if len(there) > 1:
            names = "; ".join(map(str, there[:8]))
            raise InputError(f"{folder} holds {len(there)} DICOM series: {names}. Choose one with series=UID.")
        return there[0]
    named = [one for one in there if series in (one.uid, one.description)]
    if len(named) != 1:
        raise unknown_name("series", series, [one.uid for one in there])
    return named[0]


def read_dicom(folder: Path, series: str | None = None) -> tuple[NDArray[np.float32], Affine, tuple[Path, ...]]:
    """Intensities (columns, rows, slices), the affine and the files, in the order of the slices.

    A tilted gantry moves the slices sideways as they go up: the affine is then sheared.

    Raises:
        InputError: slices are missing, doubled, unequally spaced, of different sizes or directions.
    """
    chosen = choose_series(folder, series)
    files, affine = _arranged(chosen, folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.SetOutputPixelType(sitk.sitkFloat32)  # each slice has its own rescale slope
    with quiet_itk():
        image = reader.Execute()
    if affine is None:
        affine = itk_affine(image)
    values = sitk.GetArrayFromImage(image)
    return values.transpose(2, 1, 0), affine, tuple(Path(file) for file in files)


def _arranged(series: Series, folder: Path) -> tuple[list[str], Affine | None]:
    """Files sorted along the normal, and the affine their positions make; None for a file of many frames."""
    abouts = [_about(file) for file in series.files]
    if len(abouts) == 1:
        if len(abouts[0].GetSize()) < 3 or abouts[0].GetSize()[2] < 2:
            raise InputError(f"{folder}: series {series.uid} has a single slice; a volume needs two or more.")
        return list(series.files), None
    where = f"{folder}: series {series.uid}"
    for tag, what in ((_POSITION, "position"), (_ORIENTATION, "orientation")):
        if any(not _value(about, tag) for about in abouts):
            raise InputError(f"{where} has slices without a patient {what}; export it again with geometry.")
    if (
        len({tuple(about.GetSize()[:2]) for about in abouts}) > 1
        or len({about.GetSpacing()[:2] for about in abouts}) > 1
    ):
        raise InputError(f"{where} mixes slices of different sizes or pixel spacings; give each its own folder.")
    positions = np.array([_numbers(about, _POSITION) for about in abouts])
    directions = np.array([_numbers(about, _ORIENTATION) for about in abouts])
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise InputError(f"{where} mixes slices of different orientations (a localiser?); give each its own folder.")
    row, column = directions[0, :3], directions[0, 3:]
    along = positions @ np.cross(row, column)
    order = np.argsort(along, kind="stable")
    _check_steps(along[order], where)
    affine = np.eye(4)
    spacing = abouts[0].GetSpacing()
    affine[:3, 0], affine[:3, 1] = row * spacing[0], column * spacing[1]
    affine[:3, 2] = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
    affine[:3, 3] = positions[order[0]]
    return [series.files[i] for i in order], LPS_TO_RAS @ affine


def _check_steps(along: NDArray[np.float64], where: str) -> None:
    steps = np.diff(along)
    usual = float(np.median(steps))
    if usual < 1e-4 or steps.min() < 1e-4:
        at = along[:-1][steps < 1e-4] if usual > 1e-4 else along[:1]
        raise InputError(
            f"{where} has several slices at {_places(at)} along the normal; it holds more than one volume "
            "(echoes, time points): export them apart."
        )
    odd = np.flatnonzero(np.abs(steps - usual) > max(_TOLERANCE * usual, 0.01))
    if odd.size == 0:
        return
    gaps = [i for i in odd if abs(steps[i] / usual - round(steps[i] / usual)) < 0.1 and round(steps[i] / usual) > 1]
    if len(gaps) == odd.size:
        missing = np.concatenate([along[i] + usual * np.arange(1, round(steps[i] / usual)) for i in gaps])
        raise InputError(f"{where} lacks slices at {_places(missing)} (every {usual:g} mm); copy the series again.")
    raise InputError(
        f"{where} has slices {steps.min():g} to {steps.max():g} mm apart, first unequal at {_places(along[odd])}; "
        "resample it to equal spacing first."
    )


def _places(along: Sequence[float] | NDArray[np.float64]) -> str:
    shown = ", ".join(f"{value:.2f}" for value in along[:5])
    return f"{shown}{', ...' if len(along) > 5 else ''} mm"


def _about(file: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    with quiet_itk():
        reader.ReadImageInformation()
    return reader


def _value(about: sitk.ImageFileReader, tag: str) -> str:
    return about.GetMetaData(tag).strip() if about.HasMetaDataKey(tag) else ""


def _numbers(about: sitk.ImageFileReader, tag: str) -> list[float]:
    return [float(part) for part in _value(about, tag).split("\\")]
