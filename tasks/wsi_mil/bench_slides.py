"""How fast tiles are read and turned into features, beside bare OpenSlide and beside the encoder alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import tifffile
import torch

from tasks.common.bench import BenchRow, peak_memory_mb
from tasks.wsi_mil.cohort import SlideFile
from tasks.wsi_mil.extract import ReadTask, TileBatches, available_cores
from tasks.wsi_mil.prepare import prepare_cohort
from tasks.wsi_mil.prepare_options import PrepareOptions
from tasks.wsi_mil.slides import open_slide
from tasks.wsi_mil.tiling import plan_tiles, reading_order
from tasks.wsi_mil.tissue import TissueOptions

_SIDE, _TILE, _MPP, _BATCH, _REPEATS = 4000, 224, 0.5, 32, 3


def rows(encoder_name: str = "resnet18") -> Iterator[BenchRow]:
    """Rates in tiles per second, larger is better; ours and the peer take turns on the same slide."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.tif"
        write_slide(path, _SIDE)
        yield from _reading(path)
        yield _features(path, Path(folder), encoder_name)


def write_slide(path: Path, side: int) -> None:
    """A pyramidal JPEG-tiled TIFF of ``side`` pixels at 0.5 µm that compresses like stained tissue."""
    rng = np.random.default_rng(0)
    image = np.full((side, side, 3), (226, 160, 200), np.int16)
    for blur, strength in ((64, 60), (8, 40), (2, 25)):
        small = rng.normal(0, strength, (side // blur + 1, side // blur + 1, 3)).astype(np.float32)
        image += cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    common: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            per_cm = 1e4 / (_MPP * 2**level)
            tiff.write(
                pixels,
                subfiletype=1 if level else 0,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                **common,
            )
            half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
            pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA).astype(np.uint8)


def _reading(path: Path) -> Iterator[BenchRow]:
    with open_slide(path) as slide:
        plan = plan_tiles("bench", slide.dimensions, slide.mpp, slide.level_downsamples, requested_mpp=_MPP, tile=_TILE)
    corners = plan.grid()
    order = reading_order(corners, plan.step)
    tasks = [ReadTask(0, path, plan, corners[order[i : i + _BATCH]]) for i in range(0, len(order), _BATCH)]
    cores = available_cores()

    def ours(workers: int) -> float:
        batches = iter(TileBatches(_Repeated(tasks), workers, _BATCH, _TILE))
        next(batches)  # workers have started
        start, count = time.perf_counter(), 0
        for batch in batches:
            assert batch.error is None
            count += len(batch.tiles)
        return count / (time.perf_counter() - start)

    context = get_context("fork")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        list(pool.map(_bare_openslide, [path] * cores, np.array_split(corners[:64], cores)))  # processes have started

        def bare(processes: int) -> float:
            start = time.perf_counter()
            if processes == 1:
                count = sum(_bare_openslide(path, corners) for _ in range(_PASSES))
            else:
                parts = np.array_split(np.concatenate([corners] * _PASSES), processes)
                count = sum(pool.map(_bare_openslide, [path] * processes, parts))
            return count / (time.perf_counter() - start)

        measured: dict[str, list[float]] = {"ours": [], "one": [], "all": []}
        for _ in range(_REPEATS):
            measured["one"].append(bare(1))
            measured["ours"].append(ours(cores))
            measured["all"].append(bare(cores))
    middle = {name: sorted(values)[len(values) // 2] for name, values in measured.items()}
    name = f"tiles {_TILE} px of a {_SIDE} px slide, {cores} workers"
    yield BenchRow(name, middle["ours"], middle["one"], "bare OpenSlide, one process", "tiles/s", peak_memory_mb())
    yield BenchRow(
        name, middle["ours"], middle["all"], f"bare OpenSlide, {cores} processes", "tiles/s", peak_memory_mb()
    )


_PASSES = 4  # over the slide, so that starting up does not count


class _Repeated:
    """The tasks of one slide several times over."""

    def __init__(self, tasks: list[ReadTask]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[ReadTask]:
        for _ in range(_PASSES):
            yield from self._tasks


def _bare_openslide(path: Path, corners: np.ndarray) -> int:
    """The same tiles read with OpenSlide and nothing else, row by row."""
    with openslide.OpenSlide(path) as slide:
        for x, y in corners.tolist():
            np.asarray(slide.read_region((x, y), 0, (_TILE, _TILE)).convert("RGB"))
    return len(corners)


def _features(path: Path, folder: Path, encoder_name: str) -> BenchRow:
    from backbones import create_encoder

    encoder = create_encoder(encoder_name).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = PrepareOptions(mpp=_MPP, tile=_TILE, tissue=TissueOptions(preset="none"))
    cohort = [SlideFile(f"bench{i}", path) for i in range(2)]
    batch = 256 if device.type == "cuda" else _BATCH
    tiles = torch.randint(0, 256, (batch, _TILE, _TILE, 3), dtype=torch.uint8).permute(0, 3, 1, 2).to(device)
    encoder = encoder.to(device)

    def alone(count: int) -> float:
        cast = torch.autocast("cuda", torch.float16, enabled=device.type == "cuda")
        start, done = time.perf_counter(), 0
        with torch.inference_mode(), cast:
            while done < count:
                encoder(tiles).float().cpu()
                done += batch
        return done / (time.perf_counter() - start)

    def ours(run: int) -> tuple[float, int]:
        start = time.perf_counter()
        reports = prepare_cohort(cohort, folder / f"run{run}", encoder, options, progress=False)
        assert all(report.status == "done" for report in reports), reports
        count = sum(report.tiles or 0 for report in reports)
        return count / (time.perf_counter() - start), count

    alone(batch)
    _, count = ours(-1)
    pairs = [(ours(run)[0], alone(count)) for run in range(2)]
    rate, peer = sorted(pairs, key=lambda pair: pair[0] / pair[1])[0]  # the worse of two
    name = f"slides to features, {encoder_name}, {count} tiles, {device.type}"
    return BenchRow(name, rate, peer, "encoder alone on tiles in memory", "tiles/s", peak_memory_mb())
