"""A cohort of synthetic slides on disk: pyramidal TIFF files, their labels, and masks of what was planted in them."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.errors import InputError
from tasks.common.files import atomic_path, cache_folder, explain_os_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

# Part of the folder's name; raised whenever the same parameters would give other pixels.
_VERSION = 1
_COMPLETE = "cohort.json"
_TILE = 256
_LEVELS = 4
NORMAL, TUMOUR = "normal", "tumour"


@dataclass(frozen=True)
class DemoCohort:
    """Where a cohort lies.

    Attributes:
        slides: folder of ``<slide_id>.tif``, 0.5 micrometres per pixel at level 0.
        labels: CSV with columns ``slide_id, patient, label``; labels are ``normal`` and ``tumour``.
        masks: folder of ``<slide_id>.png``, 255 in the planted regions, 16 times smaller than the slide.
    """

    slides: Path
    labels: Path
    masks: Path


@dataclass(frozen=True)
class _Parameters:
    num_slides: int
    seed: int
    width: int
    height: int
    version: int = _VERSION


@dataclass(frozen=True)
class _PlannedSlide:
    index: int
    slide_id: str
    patient: str
    label: str
    pen: bool


def make_cohort(
    directory: str | Path | None = None,
    num_slides: int = 24,
    seed: int = 7,
    *,
    width: int = 3072,
    height: int = 2304,
    workers: int | None = None,
    progress: bool | None = None,
) -> DemoCohort:
    """Make the demo cohort, or what is missing of it, and say where it lies.

    The pixels follow from the parameters alone. Each slide is written under a temporary name and renamed, so a run that
    was killed is continued; a finished cohort is found again at once.

    Args:
        directory: where to put it; by default a folder of its own under :func:`cache_folder`.
        num_slides: half of them, to one, are tumour slides; three quarters as many patients, some with two slides.
        width, height: of level 0 in pixels, multiples of 16.
        workers: threads; by default as many as cores, at most four.
        progress: show a progress bar; by default when standard error is a terminal.

    Raises:
        InputError: a parameter is out of range, the folder holds another cohort, or it cannot be written.
    """
    parameters = _Parameters(num_slides, seed, width, height)
    _check(parameters)
    folder = Path(directory) if directory is not None else cache_folder() / f"demo_slides_{_digest(parameters)}"
    cohort = DemoCohort(folder / "slides", folder / "labels.csv", folder / "masks")
    plan = _plan(parameters)
    done = _read_marker(folder, parameters)
    todo = [p for p in plan if not _paths(cohort, p.slide_id)[0].is_file()]
    todo += [p for p in plan if p not in todo and not _paths(cohort, p.slide_id)[1].is_file()]
    if done and not todo and cohort.labels.is_file():
        return cohort
    with explain_os_errors(folder):
        cohort.slides.mkdir(parents=True, exist_ok=True)
        cohort.masks.mkdir(parents=True, exist_ok=True)
    _write_json(folder / _COMPLETE, {**asdict(parameters), "complete": False})
    _write_labels(cohort.labels, plan)
    _paint_all(cohort, todo, parameters, workers, progress)
    _write_json(folder / _COMPLETE, {**asdict(parameters), "complete": True})
    log.info("made %d demo slides in %s", len(todo), folder)
    return cohort


def _check(parameters: _Parameters) -> None:
    if parameters.num_slides < 2:
        raise InputError(
            f"the demo needs at least two slides, one of each label; {parameters.num_slides} were asked for."
        )
    for side, name in ((parameters.width, "width"), (parameters.height, "height")):
        if side % 16 or side < 1024:
            raise InputError(f"{name}={side} of the demo slides must be a multiple of 16 of at least 1024 pixels.")


def _plan(parameters: _Parameters) -> list[_PlannedSlide]:
    """Patients in turn are normal and tumour; the first third of them, in pairs of both, have a second slide."""
    n = parameters.num_slides
    patients = n - n // 8 * 2
    slides = [(patient, 1) for patient in range(patients)] + [(patient, 2) for patient in range(n - patients)]
    return [
        _PlannedSlide(
            index=index,
            slide_id=f"P{patient + 1:02d}-{number}",
            patient=f"P{patient + 1:02d}",
            label=(NORMAL, TUMOUR)[patient % 2],
            pen=index % 5 in (2, 3),  # on slides of both labels alike
        )
        for index, (patient, number) in enumerate(sorted(slides))
    ]


def _paint_all(
    cohort: DemoCohort, todo: list[_PlannedSlide], parameters: _Parameters, workers: int | None, progress: bool | None
) -> None:
    import cv2

    workers = workers or min(4, os.cpu_count() or 1)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the slides are spread over threads instead
    try:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(_paint_one, cohort, slide, parameters) for slide in todo]
            try:
                for future in _bar(futures, progress):
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
    finally:
        cv2.setNumThreads(threads)


def _bar(futures: list, progress: bool | None) -> Iterator:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from futures
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(futures, "making demo slides", console=Console(stderr=True), transient=True)


def _paint_one(cohort: DemoCohort, slide: _PlannedSlide, parameters: _Parameters) -> None:
    import cv2
    import numpy as np

    from tasks.wsi_mil.demo.paint import paint_slide

    rgb, mask = paint_slide(
        np.random.default_rng([parameters.seed, slide.index]),
        parameters.width,
        parameters.height,
        with_tumour=slide.label == TUMOUR,
        pen=slide.pen,
    )
    slide_path, mask_path = _paths(cohort, slide.slide_id)
    with atomic_path(mask_path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", mask)[1].tobytes())
    with atomic_path(slide_path) as temporary:
        _write_pyramid(temporary, rgb)


def _write_pyramid(path: Path, rgb: NDArray[np.uint8]) -> None:
    """A tiled, JPEG-compressed TIFF whose levels are each half the one before; OpenSlide opens it as a generic TIFF."""
    import cv2
    import numpy as np
    import tifffile

    from tasks.wsi_mil.demo.paint import MPP

    with tifffile.TiffWriter(path) as tiff:
        for level in range(_LEVELS):
            pixels_per_cm = 10_000 / (MPP * 2**level)
            tiff.write(
                rgb,
                photometric="rgb",  # given as RGB; stored as YCbCr, as JPEG does
                tile=(_TILE, _TILE),
                compression="jpeg",
                compressionargs={"level": 88},
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,  # 1: a reduced image of another page
                software=False,
                metadata=None,
            )
            half = (rgb.shape[1] // 2, rgb.shape[0] // 2)
            rgb = cv2.resize(rgb, half, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _write_labels(path: Path, plan: list[_PlannedSlide]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("slide_id", "patient", "label"))
        writer.writerows((slide.slide_id, slide.patient, slide.label) for slide in plan)


def _write_json(path: Path, content: dict[str, object]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_marker(folder: Path, parameters: _Parameters) -> bool:
    """Whether the folder holds this cohort complete; a folder of other slides is refused."""
    marker = folder / _COMPLETE
    if not marker.is_file():
        if (folder / "slides").is_dir() and any((folder / "slides").iterdir()):
            raise InputError(
                f"{folder} holds slides that are not the demo's; choose an empty folder for the demo cohort."
            )
        return False
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or {k: content.get(k) for k in asdict(parameters)} != asdict(parameters):
        raise InputError(f"{folder} holds a demo cohort of other parameters; remove it or choose another folder.")
    return bool(content.get("complete"))


def _paths(cohort: DemoCohort, slide_id: str) -> tuple[Path, Path]:
    return cohort.slides / f"{slide_id}.tif", cohort.masks / f"{slide_id}.png"


def _digest(parameters: _Parameters) -> str:
    return hashlib.sha256(json.dumps(asdict(parameters), sort_keys=True).encode()).hexdigest()[:10]
