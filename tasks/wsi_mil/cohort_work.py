"""The work of ``action=prepare`` on a cohort: what is done already, one slide's plan, and the stream of all tiles.

Slides are planned ahead in a thread, their tiles read by workers and encoded in batches that cross slides; features
are kept batch by batch, and a slide's file is written when its last tile has come back.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kernels.errors import InputError
from tasks.wsi_mil import features as bags
from tasks.wsi_mil.cohort import SlideFile, SlideReport, SlidesTable
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
from tasks.wsi_mil.prepare_options import PrepareOptions
from tasks.wsi_mil.progress import CohortProgress
from tasks.wsi_mil.resolution import read_mpp_table
from tasks.wsi_mil.slides import Slide, open_slide
from tasks.wsi_mil.tiling import TilePlan, plan_tiles, reading_order, tissue_tiles
from tasks.wsi_mil.tissue import Tissue, find_tissue

log = logging.getLogger(__name__)

DEFAULT_MPP = 0.5  # where neither the user nor the encoder says
_THUMBNAIL_SIDE = 1024


def feature_path(out: Path, slide_id: str) -> Path:
    """Where the features of a slide are."""
    return out / "features" / f"{slide_id}.h5"


@dataclass
class Job:
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


class CohortWork:
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
        self.jobs: dict[int, Job] = {}
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

    def start(self, slide: SlideFile) -> Job | None:
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
        job = Job(number, slide, *about)
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

    def finish(self, job: Job) -> None:
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

    def attributes(self, job: Job, blurred: int, white: int) -> dict[str, Any]:
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

    def fail(self, job: Job, reason: str) -> None:
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
    function: Callable[[SlideFile], Job | None], items: Iterable[SlideFile], depth: int = 2
) -> Generator[Job | None, None, None]:
    """``function`` of each item in order, computed in a thread up to ``depth`` items ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
        pending: deque[Future[Job | None]] = deque()
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
