"""A data set of made heads on disk, an nnU-Net folder with patients and dates beside it."""

from __future__ import annotations

import csv
import datetime
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.made_sets import made_once
from tasks.meningioma.demo.anatomy import Anatomy
from tasks.meningioma.demo.grids import Grid
from tasks.meningioma.demo.render import draw_head, scan
from tasks.meningioma.demo.tumours import LARGEST_ML, LOOKS, SITES, SMALLEST_ML, Tumour

log = logging.getLogger(__name__)

SMALLEST_SIDE = 48
_VERSION = 2  # raised whenever the same seed would give other voxels
_FEWEST = 6
_PEAK = {"int16": 1400.0, "uint8": 230.0, "float32": 0.8, "int16 with slope": 3200.0}  # of the scalp's fat
_SLOPE = 0.25
# Children of the data set's seed, so that one part can change without the others.
_PLAN, _PATIENT, _SCAN = range(3)


@dataclass(frozen=True)
class PlannedTumour:
    """Where a tumour will grow, how it looks and how large it is at the first scan."""

    site: str
    look: str
    volume_ml: float


@dataclass(frozen=True)
class PlannedScan:
    """One case: which patient, when, and how much larger the tumours are than at the patient's first scan."""

    case_id: str
    patient: int
    date: datetime.date
    growth: float
    tumours: tuple[PlannedTumour, ...]


@dataclass(frozen=True)
class MadeHead:
    """A case as it is written.

    Attributes:
        image: (X, Y, Z) float32, in the units of the file.
        tumours: (X, Y, Z) uint8, i + 1 in tumour i.
        dura: (X, Y, Z) float32, distance to the nearest dura, millimetres.
        grid: voxels to millimetres, and how they are stored.
    """

    image: NDArray[np.float32]
    tumours: NDArray[np.uint8]
    dura: NDArray[np.float32]
    grid: Grid


def make_heads(folder: Path | None = None, cases: int = 24, seed: int = 7, side: int = 64) -> Path:
    """Make the heads unless they are there, and give the CSV (case_id, image, label, patient, date) that lists them.

    The folder is nnU-Net's (``imagesTr``, ``labelsTr``, ``dataset.json``), with ``cases.csv`` beside and the truth of
    what was drawn in ``tumours.csv``. It appears whole or not at all. One case in six is the second scan of a patient
    whose tumours have grown; one patient in five has no tumour.

    Args:
        folder: where to put it; by default a folder of its own under ``cache_folder()``.
        cases: number of scans.
        side: voxels along the longest axis of a scan.

    Raises:
        InputError: too few cases or voxels, the folder holds something else, or it cannot be written.
    """
    if cases < _FEWEST:
        raise InputError(f"data.heads.cases={cases}: {_FEWEST} cases are needed at least.")
    if side < SMALLEST_SIDE:
        raise InputError(
            f"data.heads.side={side}: a head needs {SMALLEST_SIDE} voxels along its longest axis at least."
        )
    wanted = {"cases": cases, "seed": seed, "side": side, "version": _VERSION}
    place = made_once("heads", wanted, lambda empty: _write(empty, cases, seed, side), folder, f"{cases} heads")
    return place / "cases.csv"


def plan(cases: int, seed: int) -> list[PlannedScan]:
    """Who is scanned when, and with which tumours; sites, looks and sizes are spread evenly over the patients."""
    rng = np.random.default_rng([seed, _PLAN])
    followed = cases // 6
    patients = cases - followed
    healthy, double = patients // 5, patients // 6
    counts = np.ones(patients, int)
    counts[followed : followed + healthy] = 0  # those who are followed have one
    counts[followed + healthy : followed + healthy + double] = 2
    tumours = list(_spread(rng, int(counts.sum())))
    scans: list[tuple[int, datetime.date, float, tuple[PlannedTumour, ...]]] = []
    for patient, count in enumerate(counts):
        own, tumours = tuple(tumours[:count]), tumours[count:]
        first = datetime.date(2018, 1, 1) + datetime.timedelta(days=int(rng.integers(0, 1200)))
        growth = float(rng.uniform(1.3, 2.4))
        if patient < followed:  # leave room to grow
            own = tuple(PlannedTumour(t.site, t.look, min(t.volume_ml, LARGEST_ML / 2.5)) for t in own)
        scans.append((patient, first, 1.0, own))
        if patient < followed:
            later = first + datetime.timedelta(days=int(rng.integers(200, 800)))
            scans.append((patient, later, growth, own))
    order = np.argsort(rng.random(patients))  # patients in a random order, their scans one after the other
    scans.sort(key=lambda scan: (int(order[scan[0]]), scan[1]))
    return [
        PlannedScan(f"head_{i + 1:03d}", int(order[patient]) + 1, date, growth, own)
        for i, (patient, date, growth, own) in enumerate(scans)
    ]


def _spread(rng: Generator, count: int) -> Iterator[PlannedTumour]:
    shares = (rng.permutation(count) + rng.random(count)) / max(count, 1)
    sites = [SITES[i % len(SITES)] for i in rng.permutation(count)]
    looks = [LOOKS[i % len(LOOKS)] for i in rng.permutation(count)]
    for share, site, look in zip(shares, sites, looks, strict=True):
        yield PlannedTumour(site, look, float(SMALLEST_ML * (LARGEST_ML / SMALLEST_ML) ** share**0.6))


def make_head(scan_plan: PlannedScan, number: int, seed: int, side: int) -> MadeHead:
    """Draw one case: the anatomy follows from the patient, the grid and the noise from the ``number`` of the scan."""
    rng = np.random.default_rng([seed, _PATIENT, scan_plan.patient])
    patient = Anatomy.draw(rng)
    tumours: tuple[Tumour, ...] = ()
    for planned in scan_plan.tumours:
        volume = planned.volume_ml * scan_plan.growth
        tumours = (*tumours, Tumour.draw(rng, planned.site, planned.look, volume, tumours))
    rng = np.random.default_rng([seed, _SCAN, number])
    grid = Grid.draw(rng, number, side)
    head = draw_head(grid.points(), grid.shape, grid.spacing, patient, tumours)
    image = scan(
        head.image, rng, noise=rng.uniform(0.012, 0.035), bias=rng.uniform(0.04, 0.16), blur=rng.uniform(0.2, 0.5)
    )
    image = image * np.float32(_PEAK[grid.stored] * rng.uniform(0.7, 1.1))
    return MadeHead(image, head.tumours, head.dura, grid)


def _write(folder: Path, cases: int, seed: int, side: int) -> None:
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    rows, truth = [], []
    for number, case in enumerate(plan(cases, seed)):
        head = make_head(case, number, seed, side)
        image, label = f"imagesTr/{case.case_id}_0000.nii.gz", f"labelsTr/{case.case_id}.nii.gz"
        nibabel.save(_nifti(head.image, head.grid, head.grid.stored), folder / image)
        nibabel.save(_nifti((head.tumours > 0).astype(np.uint8), head.grid, "label"), folder / label)
        rows.append((case.case_id, image, label, f"patient_{case.patient:02d}", case.date.isoformat()))
        voxel_ml = float(np.prod(head.grid.spacing)) / 1000
        counts = np.bincount(head.tumours.ravel(), minlength=len(case.tumours) + 1)[1:]
        for tumour, count in zip(case.tumours, counts, strict=True):
            truth.append((case.case_id, tumour.site, tumour.look, f"{count * voxel_ml:.3f}"))
    _write_csv(folder / "cases.csv", ("case_id", "image", "label", "patient", "date"), rows)
    _write_csv(folder / "tumours.csv", ("case_id", "site", "look", "volume_ml"), truth)
    description = {
        "name": "Made heads with meningiomas",
        "channel_names": {"0": "T1c"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def _nifti(voxels: NDArray, grid: Grid, stored: str) -> nibabel.Nifti1Image:
    """The volume with the grid's codes, in the stored type."""
    if stored in ("int16", "uint8"):
        voxels = np.clip(np.rint(voxels), 0, np.iinfo(stored).max).astype(stored)
    image = nibabel.Nifti1Image(voxels, grid.affine)
    if stored == "int16 with slope":
        image.set_data_dtype(np.int16)
        image.header.set_slope_inter(_SLOPE, 0)
    image.header.set_xyzt_units("mm")
    qform, sform = grid.codes
    image.set_qform(grid.affine, qform)
    image.set_sform(grid.affine, sform)
    return image


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
