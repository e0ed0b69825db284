"""``action=prepare``: slides to tissue, tiles and features, one file per slide, resumable.

``out`` holds ``features/ID.h5``, ``thumbnails/ID.jpg``, ``contours/ID.jpg`` (outlines drawn),
``contours_geojson/ID.geojson`` and ``slides.csv``.

A slide whose feature file is complete, undamaged and made with the present settings is skipped;
one that was cut off goes on at the batch where it was; a slide that fails leaves the others alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kernels.errors import InputError
from tasks.common.files import explain_os_errors
from tasks.wsi_mil import features as bags
from tasks.wsi_mil.cohort import SlideFile, SlideReport, SlidesTable, find_slides
from tasks.wsi_mil.contours import draw_contours, write_geojson, write_jpeg
from tasks.wsi_mil.extract import (
    ReadTask,
    TileBatch,
    TileBatches,
    choose_device,
    choose_workers,
    encode,
    weights_fingerprint,
)
from tasks.wsi_mil.locks import FileLock
from tasks.wsi_mil.partial import REJECTED, WHITE, PartialFeatures, digest
from tasks.wsi_mil.progress import CohortProgress
from tasks.wsi_mil.resolution import checked_mpp, read_mpp_table
from tasks.wsi_mil.slides import Slide, open_slide
from tasks.wsi_mil.tiling import TilePlan, plan_tiles, reading_order, tissue_tiles
from tasks.wsi_mil.tissue import Tissue, TissueOptions, find_tissue

log = logging.getLogger(__name__)

DEFAULT_MPP = 0.5  # where neither the user nor the encoder says
_THUMBNAIL_SIDE = 1024


@dataclass(frozen=True)
class PrepareOptions:
    """How slides become features.

    Attributes:
        mpp, tile: micrometres per pixel and side of the tiles; None takes what the encoder was trained on.
        overlap: of neighbouring tiles, pixels of the tile.
        min_tissue: smallest share of a tile that must be tissue.
        mpp_tolerance: relative difference within which a level of the slide is used as it is.
        mpp_override: resolution of every slide, in place of its header's.
        mpp_overrides: CSV of resolutions per slide.
        tissue: how tissue is found.
        float16: store features in half the bytes.
        on_bad_tile: ``error`` fails the slide, ``white`` puts a white tile in the place of an unreadable one.
        workers: reading processes, or ``auto``.
        batch_size: tiles per batch, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        amp: compute in half precision on a GPU.
    """

    mpp: float | None = None
    tile: int | None = None
    overlap: int = 0
    min_tissue: float = 0.25
    mpp_tolerance: float = 0.05
    mpp_override: float | None = None
    mpp_overrides: Path | None = None
    tissue: TissueOptions = field(default_factory=TissueOptions)
    float16: bool = False
    on_bad_tile: str = "error"
    workers: int | str = "auto"
    batch_size: int | str = "auto"
    device: str = "auto"
    amp: bool = True

    def __post_init__(self) -> None:
        if self.on_bad_tile not in ("error", "white"):
            raise InputError(f"data.on_bad_tile={self.on_bad_tile} is not known; use error or white.")
        if self.batch_size != "auto" and not (str(self.batch_size).isdigit() and int(self.batch_size) > 0):
            raise InputError(f"data.batch_size={self.batch_size} is no number of tiles; use auto or a positive number.")
        if not 0 <= self.min_tissue <= 1:
            raise InputError(
                f"data.min_tissue={self.min_tissue} is a share of a tile's area; give a number from 0 to 1."
            )
        if self.mpp is not None:
            checked_mpp(self.mpp, "data.mpp")
        if self.mpp_override is not None:
            checked_mpp(self.mpp_override, "data.mpp_override")
        # Any slide would do: what does not depend on the slide is wrong now, not after the first one is read.
        tile = self.tile if self.tile is not None else 224
        plan_tiles(
            "", (1, 1), 1.0, [1.0], requested_mpp=1.0, tile=tile, overlap=self.overlap, tolerance=self.mpp_tolerance
        )

    @classmethod
    def from_config(cls, data: DictConfig) -> PrepareOptions:
        """From the ``data`` group of a run's configuration; keys that are not of this class are left to others."""
        given: dict[str, Any] = OmegaConf.to_container(data, resolve=True)  # type: ignore[assignment]
        options = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        tissue = dict(options.pop("tissue", None) or {})
        if tissue.get("annotations"):
            tissue["annotations"] = Path(tissue["annotations"])
            if not tissue["annotations"].is_dir():
                raise InputError(
                    f"data.tissue.annotations={tissue['annotations']} is no folder; give the one with "
                    "SLIDE_ID.geojson files."
                )
        if options.get("mpp_overrides"):
            options["mpp_overrides"] = Path(options["mpp_overrides"])
        return cls(**options, tissue=TissueOptions(**tissue))


def run(cfg: DictConfig) -> list[SlideReport]:
    """``action=prepare`` of a composed configuration (``data``, ``backbone``, ``out``, ``seed``, ``dry_run``).

    Raises:
        InputError: something given is wrong, or some slides failed (after all were tried).
    """
    if not cfg.data.get("slides"):
        raise InputError("data.slides is not set; give a folder of slides, a slide, or a CSV that lists them.")
    options = PrepareOptions.from_config(cfg.data)
    slides = find_slides(cfg.data.slides)
    from backbones import create_encoder

    backbone = cfg.backbone
    params: Any = OmegaConf.to_container(backbone.params, resolve=True) if backbone.get("params") else None
    encoder = create_encoder(
        backbone.name,
        pretrained=bool(backbone.get("pretrained", False)),
        checkpoint=backbone.get("checkpoint"),
        seed=cfg.get("seed", 1),
        params=params,
    )
    out = Path(cfg.out)
    if cfg.get("dry_run"):
        from tasks.wsi_mil.progress import show_plan

        reports = plan_cohort(slides, out, encoder, options)
        show_plan(reports, out)
        return reports
    reports = prepare_cohort(slides, out, encoder, options)
    raise_if_failed(reports, out)
    return reports


def raise_if_failed(reports: Sequence[SlideReport], out: Path) -> None:
    """One sentence when slides failed.

    Raises:
        InputError: some did.
    """
    failed = [r for r in reports if r.status == "failed"]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(reports)} slides failed, first '{failed[0].slide_id}': "
            f"{failed[0].reason.rstrip('.')}; "
            f"all reasons are in {out / 'slides.csv'}, the other slides are done."
        )


def prepare_slide(
    path: str | Path,
    out: str | Path,
    encoder: nn.Module,
    options: PrepareOptions | None = None,
    *,
    slide_id: str | None = None,
) -> bags.BagInfo:
    """Prepare one slide into ``out`` (skipped when it is complete there) and return its bag.

    Raises:
        InputError: the slide cannot be prepared.
    """
    path = Path(path)
    slide = SlideFile(slide_id or path.stem, path)
    (report,) = prepare_cohort([slide], out, encoder, options, progress=False)
    if report.status == "failed":
        raise InputError(report.reason)
    if report.status == "skipped" and report.tiles is None:
        raise InputError(f"slide '{slide.slide_id}': {report.reason}; wait for it, or use another folder with out=DIR.")
    return bags.find_bags(feature_path(Path(out), slide.slide_id))[slide.slide_id]


def prepare_cohort(
    slides: Sequence[SlideFile],
    out: str | Path,
    encoder: nn.Module,
    options: PrepareOptions | None = None,
    *,
    progress: bool = True,
) -> list[SlideReport]:
    """Prepare slides into ``out``; one report each, in the given order. See the module for what is written.

    Args:
        encoder: takes uint8 RGB tiles (B, 3, H, W), returns (B, dim); has ``name``, ``dim`` and ``weights``.
        progress: show bars on a terminal.

    Raises:
        InputError: nothing can be written to ``out`` (a slide that fails is reported, not raised).
    """
    work = _Cohort(slides, Path(out), encoder, options or PrepareOptions())
    _make_folder(work.out)
    work.skip_complete()
    if work.todo:
        work.extract(progress)
    return [work.reports[slide.slide_id] for slide in slides]


def plan_cohort(
    slides: Sequence[SlideFile], out: str | Path, encoder: nn.Module, options: PrepareOptions | None = None
) -> list[SlideReport]:
    """What ``prepare_cohort`` would do, with the number of tiles of each slide; nothing is written."""
    work = _Cohort(slides, Path(out), encoder, options or PrepareOptions())
    reports = []
    for slide in slides:
        done, why = work.completed(slide)
        reports.append(done or work.estimate(slide, why))
    return reports


def feature_path(out: Path, slide_id: str) -> Path:
    """Where the features of a slide are."""
    return out / "features" / f"{slide_id}.h5"


@dataclass
class _Job:
    """A slide that is being worked on."""

    number: int
    slide: SlideFile
    settings: dict[str, Any]
    plan: TilePlan
    dimensions: tuple[int, int]
    mpp_source: str
    corners: np.ndarray  # (N, 2), row by row
    order: np.ndarray  # (N,), reading order
    min_tissue: float
    remarks: list[str]
    partial: PartialFeatures
    planning_seconds: float
    started: float | None = None
    failed: bool = False


class _Cohort:
    """One run over a cohort: plans slides ahead in a thread, hands tiles to workers, writes what comes back."""

    def __init__(self, slides: Sequence[SlideFile], out: Path, encoder: nn.Module, options: PrepareOptions) -> None:
        self.slides, self.out, self.encoder, self.options = slides, out, encoder, options
        self.device = choose_device(options.device)
        self.workers = choose_workers(options.workers, self.device)
        default = 256 if self.device.type == "cuda" else 32
        self.batch = default if options.batch_size == "auto" else int(options.batch_size)
        own_mpp, own_size = getattr(encoder, "mpp", None), getattr(encoder, "input_size", 224)
        self.mpp = float(options.mpp or own_mpp or DEFAULT_MPP)
        self.tile = int(options.tile or (own_size if isinstance(own_size, int) else own_size[-1]))
        self.table = SlidesTable(out / "slides.csv")
        self.mpp_table = read_mpp_table(options.mpp_overrides) if options.mpp_overrides else {}
        self.fingerprint = weights_fingerprint(encoder)
        self.reports: dict[str, SlideReport] = {}
        self.todo: list[SlideFile] = []
        self.why: dict[str, str] = {}
        self.jobs: dict[int, _Job] = {}
        self.locks: dict[str, FileLock] = {}

    # What is there already -------------------------------------------------------------------------------------------

    def skip_complete(self) -> None:
        """Sort the slides into complete and to do."""
        complete = []
        for slide in self.slides:
            report, why = self.completed(slide)
            if report is None:
                self.todo.append(slide)
                self.why[slide.slide_id] = why
                if why:
                    log.info("slide '%s' is prepared again: %s", slide.slide_id, why)
            else:
                self.reports[slide.slide_id] = report
                complete.append(report)
        if complete:
            self.table.update(complete)
            log.info("%d of %d slides are complete and skipped", len(complete), len(self.slides))

    def completed(self, slide: SlideFile) -> tuple[SlideReport | None, str]:
        """A report when the slide's features are complete, undamaged and of the present settings, else why not."""
        path = feature_path(self.out, slide.slide_id)
        if not path.exists():
            return None, ""
        try:
            info = bags.find_bags(path)[slide.slide_id]
            about = bags.read_attributes(info)
            coords = bags.read_coords(info)
            if info.num_tiles:
                bags.last_part(info)
        except (InputError, KeyError) as error:
            return None, f"its file is damaged ({error})"
        crc = zlib.crc32(coords.xy.tobytes()) if coords is not None else None
        if (
            coords is None
            or not about.get("complete")
            or not info.num_tiles == len(coords.xy) == about.get("num_tiles")
        ):
            return None, "its file is incomplete"
        if crc != about.get("coords_crc32"):
            return None, "its file is damaged (tile positions do not match their checksum)"
        settings: dict[str, Any] = {}  # stays empty when the slide has gone: its features are here and whole
        with contextlib.suppress(InputError):
            settings = self.settings(slide)
        before = json.loads(about.get("settings", "{}"))
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            return None, "; ".join(f"{k} was {before.get(k)!r}, is {settings[k]!r}" for k in changed[:3])
        report = SlideReport(slide.slide_id, str(slide.path), "skipped", "complete", info.num_tiles)
        report.mpp, report.requested_mpp, report.achieved_mpp = (
            about.get(k) for k in ("level0_mpp", "requested_mpp", "achieved_mpp")
        )
        return report, ""

    def settings(self, slide: SlideFile) -> dict[str, Any]:
        """Everything the features of a slide depend on, as JSON values.

        Raises:
            InputError: the slide is missing.
        """
        try:
            stat = slide.path.stat()
        except OSError as error:
            raise InputError(
                f"slide '{slide.path}' does not exist or cannot be reached ({error.strerror}); check data.slides."
            ) from error
        o = self.options
        tissue = {k: v for k, v in asdict(o.tissue).items() if v is not None and k != "annotations"}
        drawn = o.tissue.annotations / f"{slide.slide_id}.geojson" if o.tissue.annotations else None
        return {
            "mpp": self.mpp,
            "tile": self.tile,
            "overlap": o.overlap,
            "min_tissue": o.min_tissue,
            "mpp_tolerance": o.mpp_tolerance,
            "slide_mpp": self.given_mpp(slide),
            "tissue": tissue,
            "annotation": zlib.crc32(drawn.read_bytes()) if drawn and drawn.is_file() else None,
            "float16": o.float16,
            "half_precision": o.amp and self.device.type == "cuda",
            "on_bad_tile": o.on_bad_tile,
            "encoder": self.encoder.name,
            "encoder_weights": self.fingerprint,
            "slide_bytes": stat.st_size,
            "slide_time": stat.st_mtime_ns,
        }

    def given_mpp(self, slide: SlideFile) -> float | None:
        """The resolution the user gave for a slide; the table goes before the general value."""
        names = (slide.slide_id, slide.path.name, slide.path.stem)
        return next((self.mpp_table[n] for n in names if n in self.mpp_table), self.options.mpp_override)

    # One slide's plan ------------------------------------------------------------------------------------------------

    def estimate(self, slide: SlideFile, why: str) -> SlideReport:
        """Dry run of one slide."""
        report = SlideReport(slide.slide_id, str(slide.path), "would do", why, requested_mpp=self.mpp)
        try:
            self.settings(slide)
            with open_slide(slide.path, self.given_mpp(slide)) as opened:
                tissue, plan, corners, _ = self.look(slide, opened)
        except InputError as error:
            report.status, report.reason = "would fail", str(error)
            return report
        report.tiles, report.mpp, report.achieved_mpp = len(corners), plan.level0_mpp, plan.achieved_mpp
        report.reason = "; ".join([*filter(None, [why]), *tissue.remarks])
        return report

    def look(self, slide: SlideFile, opened: Slide) -> tuple[Tissue, TilePlan, np.ndarray, float]:
        """Tissue and tiles of an open slide."""
        plan = plan_tiles(
            slide.slide_id,
            opened.dimensions,
            opened.mpp,
            opened.level_downsamples,
            requested_mpp=self.mpp,
            tile=self.tile,
            overlap=self.options.overlap,
            tolerance=self.options.mpp_tolerance,
        )
        opened.slide_id = slide.slide_id
        tissue = find_tissue(opened, self.options.tissue, self.options.on_bad_tile)
        corners, enough = tissue_tiles(plan, tissue, self.options.min_tissue)
        if enough != self.options.min_tissue:
            remark = f"no tile is {self.options.min_tissue:.0%} tissue; {enough:.1%} was enough here"
            tissue.remarks.append(remark)
        return tissue, plan, corners, enough

    def start(self, slide: SlideFile) -> _Job | None:
        """Lock, plan and draw one slide, in the planning thread; None when it is not to be worked on (reported)."""
        begin = time.perf_counter()
        lock = FileLock(self.out / ".locks" / f"{slide.slide_id}.lock")
        if not lock.acquire():
            self.report(SlideReport(slide.slide_id, str(slide.path), "skipped", f"{lock.holder()} is working on it"))
            return None
        self.locks[slide.slide_id] = lock
        done, _ = self.completed(slide)  # by another process, since this run began
        if done is not None:
            self.report(done)
            return None
        for folder in ("features", "thumbnails", "contours", "contours_geojson"):
            for left in (self.out / folder).glob(f".{_escaped(slide.slide_id)}.*.partial*"):
                left.unlink(missing_ok=True)
        try:
            settings = self.settings(slide)
            with open_slide(slide.path, self.given_mpp(slide)) as opened:
                tissue, plan, corners, enough = self.look(slide, opened)
                thumbnail = opened.thumbnail(_THUMBNAIL_SIDE, self.options.on_bad_tile)
                dimensions, source = opened.dimensions, opened.mpp_source
        except InputError as error:
            self.report(SlideReport(slide.slide_id, str(slide.path), "failed", str(error), requested_mpp=self.mpp))
            return None
        self.draw(slide, thumbnail, tissue, dimensions, plan.level0_mpp)
        order = reading_order(corners, plan.step)
        partial = PartialFeatures(
            self.out / ".partial" / f"{slide.slide_id}.bin",
            {**settings, "tiles": digest(corners), "device": self.device.type},
            len(corners),
            int(self.encoder.dim),  # type: ignore[arg-type]
            self.batch,
        )
        if partial.done:
            log.info("slide '%s' goes on at tile %d of %d", slide.slide_id, partial.done, len(corners))
        seconds = time.perf_counter() - begin
        number = len(self.jobs)
        about = (settings, plan, dimensions, source, corners, order, enough, tissue.remarks, partial, seconds)
        job = _Job(number, slide, *about)
        self.jobs[number] = job
        return job

    def draw(
        self, slide: SlideFile, thumbnail: np.ndarray, tissue: Tissue, dimensions: tuple[int, int], mpp: float
    ) -> None:
        """Thumbnail, outlines on it, and outlines as GeoJSON."""
        write_jpeg(self.out / "thumbnails" / f"{slide.slide_id}.jpg", thumbnail)
        downsample = dimensions[0] / thumbnail.shape[1]
        drawn = draw_contours(thumbnail, tissue.contours, downsample, mpp)
        write_jpeg(self.out / "contours" / f"{slide.slide_id}.jpg", drawn)
        target = self.out / "contours_geojson" / f"{slide.slide_id}.geojson"
        given = self.options.tissue.annotations
        if given is None or not (given / target.name).is_file() or (given / target.name).resolve() != target.resolve():
            write_geojson(target, tissue.contours)

    # All slides' tiles -----------------------------------------------------------------------------------------------

    def extract(self, progress: bool) -> None:
        """Work on all slides that are to do.

        Raises:
            InputError: the output cannot be written, or memory does not suffice.
        """
        tasks = self.tasks()
        try:
            # Workers start here, before any thread of ours or of the display does: a fork copies locks as they are.
            batches = TileBatches(tasks, self.workers, self.batch, self.tile)
            with CohortProgress(len(self.todo), enabled=progress) as display:
                for batch, values in encode(batches, self.encoder, self.device, self.options.amp):
                    self.take(batch, values, display)
                    display.slides_done(len(self.reports) - len(self.slides) + len(self.todo))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU has too little memory for {self.batch} tiles at once; lower data.batch_size."
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that reads tiles was killed, mostly for lack of memory ({_one_line(error)}); lower "
                "data.batch_size or data.workers (0 reads in the main process)."
            ) from error
        finally:
            tasks.close()  # waits for the planning thread, which may just be taking a lock
            for job in self.jobs.values():
                job.partial.close()
            for lock in self.locks.values():
                lock.release()

    def tasks(self) -> Generator[ReadTask, None, None]:
        """Batches of tile positions of all slides, one slide after the other; the next slide is planned meanwhile."""
        with contextlib.closing(_ahead(self.start, self.todo)) as jobs:
            for job in jobs:
                if job is None:
                    continue
                for first in range(job.partial.done, len(job.order), self.batch):
                    if job.failed:
                        break
                    corners = job.corners[job.order[first : first + self.batch]]
                    blur, bad = self.options.tissue.reject_blur, self.options.on_bad_tile
                    yield ReadTask(job.number, job.slide.path, job.plan, corners, bad, blur)
                if job.partial.done == len(job.order) and job.slide.slide_id not in self.reports:
                    self.finish(job)  # a killed run had computed everything

    def take(self, batch: TileBatch, values: np.ndarray, display: CohortProgress) -> None:
        """Store the features of a batch, and write the slide's file when they were the last."""
        job = self.jobs[batch.job]
        if job.failed:
            return
        job.started = job.started or time.perf_counter()
        if batch.error is not None:
            self.fail(job, batch.error)
        elif not np.isfinite(values).all():
            name = self.encoder.name
            self.fail(job, f"encoder '{name}' gave NaN or infinite features; check its weights, or set data.amp=false")
        else:
            job.partial.append(values, batch.state.numpy())
            display.advance(job.slide.slide_id, len(values), job.partial.done, len(job.corners))
            if job.partial.done == len(job.corners):
                self.finish(job)

    def finish(self, job: _Job) -> None:
        """Write the feature file of a slide whose tiles are all computed."""
        slide, plan = job.slide, job.plan
        place = np.empty_like(job.order)
        place[job.order] = np.arange(len(job.order))
        states = job.partial.states()[place]
        kept = states != REJECTED
        blurred, white = int((~kept).sum()), int((states == WHITE).sum())
        if blurred:
            job.remarks.append(f"{blurred} of {len(kept)} tiles out of focus and left out")
        if white:
            job.remarks.append(f"{white} unreadable tiles taken as white")
        if not kept.any():
            self.fail(job, f"all {len(kept)} tiles are out of focus; lower data.tissue.reject_blur")
            return
        bags.write_bag(
            feature_path(self.out, slide.slide_id),
            job.partial.parts(place[kept]),
            job.corners[kept],
            dim=job.partial.dim,
            float16=self.options.float16,
            attributes=self.attributes(job, blurred, white),
        )
        job.partial.close(remove=True)
        now = time.perf_counter()
        self.report(
            SlideReport(
                slide.slide_id,
                str(slide.path),
                "done",
                "; ".join([*filter(None, [self.why.get(slide.slide_id)]), *job.remarks]),
                int(kept.sum()),
                plan.level0_mpp,
                plan.requested_mpp,
                plan.achieved_mpp,
                job.planning_seconds + now - (job.started or now),
            )
        )

    def attributes(self, job: _Job, blurred: int, white: int) -> dict[str, Any]:
        """Attributes of a feature file: ours, TRIDENT's and CLAM's names side by side."""
        plan, (width, height) = job.plan, job.dimensions
        return {
            "slide_id": job.slide.slide_id,
            "slide_path": str(job.slide.path.absolute()),
            "name": job.slide.slide_id,
            "patch_size": plan.tile,
            "patch_size_level0": plan.size,
            "overlap": plan.overlap,
            "step_level0": plan.step,
            "patch_level": plan.level,
            "level0_width": width,
            "level0_height": height,
            "level0_magnification": 10 / plan.level0_mpp,
            "target_magnification": 10 / plan.achieved_mpp,
            "level0_mpp": plan.level0_mpp,
            "mpp_source": job.mpp_source,
            "requested_mpp": plan.requested_mpp,
            "achieved_mpp": plan.achieved_mpp,
            "downsample": plan.downsample,
            "min_tissue": job.min_tissue,
            "tiles_out_of_focus": blurred,
            "tiles_white": white,
            "encoder": self.encoder.name,
            "encoder_spec": getattr(self.encoder, "spec", None) or None,
            "weights": self.encoder.weights,
            "weights_fingerprint": self.fingerprint,
            "fovea_version": _version(),
            "settings": job.settings,
        }

    def fail(self, job: _Job, reason: str) -> None:
        """Give up on a slide; the others go on."""
        job.failed = True
        job.partial.close(remove=True)
        self.report(
            SlideReport(
                job.slide.slide_id,
                str(job.slide.path),
                "failed",
                reason,
                mpp=job.plan.level0_mpp,
                requested_mpp=self.mpp,
            )
        )

    def report(self, report: SlideReport) -> None:
        """Note what became of a slide, and give its lock back."""
        self.reports[report.slide_id] = report
        self.table.update([report])
        if lock := self.locks.pop(report.slide_id, None):
            lock.release()
        level = logging.WARNING if report.status == "failed" else logging.INFO
        count = f", {report.tiles} tiles" if report.tiles is not None else ""
        took = f" in {report.seconds:.1f} s" if report.seconds is not None else ""
        log.log(
            level,
            "slide '%s': %s%s%s%s",
            report.slide_id,
            report.status,
            count,
            took,
            f" ({report.reason})" if report.reason else "",
        )


def _ahead(
    function: Callable[[SlideFile], _Job | None], items: Iterable[SlideFile], depth: int = 2
) -> Generator[_Job | None, None, None]:
    """``function`` of each item in order, computed in a thread up to ``depth`` items ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
        pending: deque[Future[_Job | None]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _make_folder(folder: Path) -> None:
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"cannot write {folder}: a file is in the way; choose another folder with out=DIR.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


def _escaped(text: str) -> str:
    """``text`` with the signs of a file pattern taken literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fovea-toolkit")
    except PackageNotFoundError:
        return "0+checkout"
