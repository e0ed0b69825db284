"""``action=predict``: new scans to masks and probabilities in their own space, volumes in ml, and a report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from kernels.errors import InputError
from tasks.common import plots
from tasks.common.devices import device_for
from tasks.common.files import atomic_path
from tasks.common.report import Report
from tasks.common.runs import Run, open_run
from tasks.common.segmentation.checkpoint import Segmenter, inference_of
from tasks.common.segmentation.inference import Inference
from tasks.common.segmentation.new_cases import segment_each
from tasks.common.segmentation.objectwise import match_objects
from tasks.common.segmentation.overlap import voxel_volume_ml
from tasks.common.segmentation.pictures import volume_figure
from tasks.common.volumes.dicom_seg import write_dicom_seg
from tasks.common.volumes.volume import Volume
from tasks.common.volumes.writing import write_mask, write_probabilities
from tasks.meningioma.cases import Case
from tasks.meningioma.model import load
from tasks.meningioma.outcomes import growth_table
from tasks.meningioma.predict_inputs import find_scans, fingerprint_of
from tasks.meningioma.preparation import Preparation
from tasks.meningioma.segment import Cut, mask_of, probabilities_of

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> pd.DataFrame | None:
    """Segment every scan of ``input``; one that cannot be read is reported and the others go on.

    Each scan's folder in ``out`` has ``mask.nii.gz``, ``probabilities.nii.gz``, ``slices.png`` and, for a DICOM series
    where the extra ``dicom`` is installed, ``mask.dcm``. A run that was stopped goes on with the scans that are left.

    Raises:
        InputError: no or a wrong checkpoint or input; or, when all is written, that some scans could not be segmented.
    """
    segmenter = load(cfg)
    channels = int(segmenter.description.network["in_channels"])
    scans = find_scans(cfg.input, channels)
    how = inference_of(segmenter, cfg.inference)
    cut = Cut.of(cfg.inference, segmenter.cutoff)
    device = device_for(cfg.inference.device)
    if cfg.dry_run:
        log.info("would segment %d scans with %d networks", len(scans), len(segmenter.models))
        return None
    with open_run(cfg, out, inputs=[fingerprint_of(scans)]) as current:
        table, failures = _segment_all(segmenter.to(device), scans, how, cut, current)
        _report(segmenter, scans, table, failures, cfg, current.folder)
        if not failures:
            current.finish()
        if len(table):
            _print(table, segmenter)
        log.info("report: %s", current.folder / "report.html")
    if failures:
        raise InputError(f"{len(failures)} of {len(scans)} scans could not be segmented: {' '.join(failures[:5])}")
    return table


def _segment_all(
    segmenter: Segmenter, scans: Sequence[Case], how: Inference, cut: Cut, current: Run
) -> tuple[pd.DataFrame, list[str]]:
    preparation = Preparation.from_dict(segmenter.description.preparation)

    def segment(number: int, folder: Path) -> dict[str, Any]:
        return _segment(segmenter, scans[number], preparation, how, cut, folder)

    table, failures = segment_each([scan.case_id for scan in scans], current.folder, segment, "scans")
    with atomic_path(current.folder / "volumes.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table, failures


def _segment(
    segmenter: Segmenter, scan: Case, preparation: Preparation, how: Inference, cut: Cut, folder: Path
) -> dict[str, Any]:
    """Segment one scan, write its files, and say what was found."""
    volumes = scan.read_images()
    first = volumes[0]
    prepared = preparation.prepare(volumes)
    for note in prepared.notes:
        log.warning("%s: %s", first.path, note)
    probabilities = probabilities_of(segmenter, prepared, how)
    mask = mask_of(prepared, probabilities, first.affine, cut)
    write_mask(folder / "mask.nii.gz", mask, first)
    write_probabilities(folder / "probabilities.nii.gz", _structures(prepared.restore(probabilities)), first)
    if first.files:
        _write_dicom(folder / "mask.dcm", mask, first, segmenter.description.classes[1:])
    drawn = volume_figure(first.data, first.affine, prediction=mask, title=scan.case_id)
    plots.save_png(drawn, folder / "slices.png")
    voxel_ml = voxel_volume_ml(first.affine)
    sizes = match_objects(mask > 0, mask > 0, min_voxels=1).predicted_sizes * voxel_ml
    classes = segmenter.description.classes[1:]
    counts = np.bincount(mask.ravel(), minlength=len(classes) + 1)
    return {
        "scan": scan.case_id,
        "path": str(first.path),
        **{f"{name}_ml": float(counts[k] * voxel_ml) for k, name in enumerate(classes, start=1)},
        "components": len(sizes),
        "largest_ml": float(sizes.max(initial=0.0)),
        "cutoff": cut.cutoff,
        "networks": len(segmenter.models),
        "notes": "; ".join(prepared.notes),
    }


def _structures(probabilities: np.ndarray) -> np.ndarray:
    """All classes but the background: (X, Y, Z) where there is one of them."""
    return probabilities[1] if len(probabilities) == 2 else probabilities[1:]


def _write_dicom(path: Path, mask: np.ndarray, like: Volume, labels: Sequence[str]) -> None:
    try:
        write_dicom_seg(path, mask, like, labels)
    except InputError as error:  # the mask is there as NIfTI in any case
        log.warning("%s", error)


def _report(
    segmenter: Segmenter, scans: Sequence[Case], table: pd.DataFrame, failures: list[str], cfg: DictConfig, folder: Path
) -> None:
    description = segmenter.description
    report = Report(f"Segmentation with {description.title}", f"{len(table)} scans; checkpoint {cfg.checkpoint}")
    report.add_notes(failures)
    report.add_text(
        "For research use; not a medical device. Volumes are those of the voxels in the mask, so that what the network "
        "misses or adds is not in any interval here; the run that trained it says how large such errors are."
    )
    report.add_heading("Volumes")
    if len(table):
        report.add_table(table.drop(columns=["path", "networks"]))
        masks = {name: folder / name / "mask.nii.gz" for name in table["scan"]}
        grown = growth_table(scans, masks, float(cfg.evaluation.level), int(cfg.seed))
        if len(grown):
            with atomic_path(folder / "growth.csv") as temporary:
                grown.to_csv(temporary, index=False)
            report.add_heading("Growth")
            report.add_table(grown.round(2), "Intervals hold what the voxels' size and place alone do.")
        report.add_heading("Slices")
        report.add_gallery([(folder / name / "slices.png", name) for name in table["scan"]])
    report.write(folder / "report.html")


def _print(table: pd.DataFrame, segmenter: Segmenter) -> None:
    classes = segmenter.description.classes[1:]
    shown = Table(title=f"{len(table)} scans, {segmenter.description.title}", title_justify="left")
    for column in ("scan", *(f"{name} (ml)" for name in classes), "components"):
        shown.add_column(column, justify="left" if column == "scan" else "right")
    for row in table.head(20).to_dict("records"):
        shown.add_row(row["scan"], *(f"{row[f'{name}_ml']:.2f}" for name in classes), str(row["components"]))
    if len(table) > 20:
        shown.add_row(f"... and {len(table) - 20} more")
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
