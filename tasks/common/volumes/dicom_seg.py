"""DICOM-SEG: a mask as a segmentation object that a PACS shows over the series it was made from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.files import atomic_path
from tasks.common.volumes.volume import Volume
from tasks.common.volumes.writing import refuse_beside

# SNOMED CT codes of what is segmented: name -> (code value, meaning). Category: morphologically abnormal structure.
FINDINGS = {"neoplasm": ("108369006", "Neoplasm"), "lesion": ("52988006", "Lesion"), "edema": ("79654002", "Edema")}
_CATEGORY = ("49755003", "Morphologically Altered Structure")


def write_dicom_seg(
    path: str | Path,
    mask: NDArray[Any],
    like: Volume,
    labels: Sequence[str] = ("tumour",),
    findings: Sequence[str] | str = "neoplasm",
    algorithm: str = "fovea",
    version: str = "1",
) -> Path:
    """Write a mask (X, Y, Z) of the DICOM series that ``like`` was read from as a binary segmentation.

    Args:
        mask: 0 is background, k is ``labels[k - 1]``.
        like: what :func:`tasks.common.volumes.reading.read_volume` gave for the series' folder.
        labels: a name for each class.
        findings: what the classes are, of :data:`FINDINGS`; one for all, or one each.
        algorithm, version: who made the segmentation.

    Raises:
        InputError: the packages of the extra ``dicom`` are missing; ``like`` was not read from DICOM; ``path`` lies in
            the folder of the series or does not end in .dcm.
    """
    path = Path(path)
    if not like.files:
        raise InputError(f"{like.path} is no DICOM series; a DICOM-SEG can only be written for one.")
    if path.suffix.lower() != ".dcm":
        raise InputError(f"{path}: a DICOM-SEG is written with the suffix .dcm.")
    if mask.shape != like.grid.shape or mask.dtype.kind not in "biu" or mask.max(initial=0) > len(labels):
        raise ValueError(f"mask {mask.shape} {mask.dtype} for {like.grid.shape} and {len(labels)} labels")
    refuse_beside(path, like.path)
    try:
        import highdicom
        import pydicom
        from highdicom.sr import CodedConcept
    except ImportError as error:
        raise InputError(
            f"writing DICOM-SEG needs the package {error.name}; install it with: pip install 'fovea-toolkit[dicom]'."
        ) from None
    names = [findings] * len(labels) if isinstance(findings, str) else list(findings)
    who = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, version=version, family=CodedConcept("123109", "DCM", "Artificial Intelligence")
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=CodedConcept(_CATEGORY[0], "SCT", _CATEGORY[1]),
            segmented_property_type=CodedConcept(FINDINGS[name][0], "SCT", FINDINGS[name][1]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=who,
        )
        for number, (label, name) in enumerate(zip(labels, names, strict=True), start=1)
    ]
    frames = np.ascontiguousarray(mask.transpose(2, 1, 0)).astype(np.uint8)  # slices, rows, columns
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in like.files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values the scanner wrote that are not as the standard has them
        result = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=int(getattr(sources[0], "SeriesNumber", 0) or 0) + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="Fovea",
            manufacturer_model_name=algorithm,
            software_versions=version,
            device_serial_number="0",
            series_description=f"Segmentation: {', '.join(labels)}"[:64],
            omit_empty_frames=bool(mask.any()),
        )
        with atomic_path(path) as temporary:
            result.save_as(temporary)
    return path
