"""Tiles through an encoder: workers read and decode ahead while the encoder computes.

One set of workers serves the whole cohort. Each is handed batches of tile positions, keeps the slide it is on open, and
gives back uint8 tiles; the encoder normalises. Batches come back in the order they were handed out, so that the result
does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kernels.errors import InputError
from tasks.wsi_mil.partial import KEPT, REJECTED, WHITE
from tasks.wsi_mil.quality import sharpness
from tasks.wsi_mil.slides import Slide, open_slide
from tasks.wsi_mil.tiling import TilePlan

log = logging.getLogger(__name__)


class Encoder(Protocol):
    """What turns tiles into features (``backbones.create_encoder`` makes one; it is an ``nn.Module``).

    Called with uint8 RGB tiles (B, 3, H, W), it returns float features (B, dim).
    """

    name: str
    dim: int
    weights: str

    def __call__(self, tiles: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ReadTask:
    """A batch of tiles to read from one slide.

    Attributes:
        job: number of the slide in this run.
        corners: (n, 2) level-0 x, y.
        on_bad_tile: ``error``, or ``white`` to replace what cannot be read.
        min_sharpness: tiles below it are rejected; None keeps all.
        slot: where in the shared memory the tiles go.
    """

    job: int
    path: Path
    plan: TilePlan
    corners: np.ndarray
    on_bad_tile: str = "error"
    min_sharpness: float | None = None
    slot: int = 0


@dataclass
class TileBatch:
    """Tiles of one task: ``tiles (n, 3, H, W)`` uint8 and their ``state (n,)``; or the reason of failure."""

    job: int
    tiles: Tensor
    state: Tensor
    error: str | None = None


class TileBatches:
    """The tiles of tasks in the tasks' order, read ahead by workers; with 0 workers they are read in this process.

    The workers write into shared memory that is used again and again: fresh memory for each batch would cost a tenth of
    the time of decoding. So a batch's tiles are good until two more batches have been taken.

    Args:
        tasks: taken a few at a time, as they are needed.
        workers: reading processes, started at once.
        batch_size: most tiles of a task.
        tile: side of the tiles.
    """

    def __init__(self, tasks: Iterable[ReadTask], workers: int, batch_size: int, tile: int) -> None:
        # Read ahead, being handed out, held by the consumer, and held by the consumer's last step.
        slots = _READ_AHEAD * workers + 3
        self._memory = torch.empty(
            slots if workers else 0, batch_size, tile, tile, 3, dtype=torch.uint8
        ).share_memory_()
        self._batches = iter(
            DataLoader(
                _TileReader(self._memory),
                batch_size=None,
                sampler=_Slotted(tasks, slots),
                num_workers=workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # without automatic batching it is given single items
                prefetch_factor=_READ_AHEAD if workers else None,
                worker_init_fn=_one_thread,
            )
        )

    def __iter__(self) -> Iterator[TileBatch]:
        for result in self._batches:
            tiles = result.tiles if result.tiles is not None else self._memory[result.slot, : len(result.state)]
            yield TileBatch(result.job, tiles.permute(0, 3, 1, 2), torch.from_numpy(result.state), result.error)


_READ_AHEAD = 2  # batches per worker


@dataclass
class _ReadResult:
    """What a worker sends: the tiles themselves stay in the shared memory."""

    job: int
    slot: int
    state: np.ndarray
    tiles: Tensor | None = None
    error: str | None = None


class _Slotted:
    """Tasks with their places in the shared memory, in turn."""

    def __init__(self, tasks: Iterable[ReadTask], slots: int) -> None:
        self._tasks, self._slots = tasks, slots

    def __iter__(self) -> Iterator[ReadTask]:
        for number, task in enumerate(self._tasks):
            yield replace(task, slot=number % self._slots)


class _TileReader(Dataset):
    """Reads tasks; the slide of the last task stays open."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._slide: Slide | None = None

    def __getitem__(self, task: ReadTask) -> _ReadResult:
        count, side = len(task.corners), task.plan.tile
        own = torch.empty(count, side, side, 3, dtype=torch.uint8) if not len(self._memory) else None
        tiles = own if own is not None else self._memory[task.slot, :count]
        try:
            slide = self._open(task.path)
            state = read_tiles(slide, task.plan, task.corners, tiles.numpy(), task.on_bad_tile, task.min_sharpness)
        except InputError as error:
            return _ReadResult(task.job, task.slot, np.empty(0, np.float32), own, str(error))
        return _ReadResult(task.job, task.slot, state, own)

    def _open(self, path: Path) -> Slide:
        if self._slide is None or self._slide.path != path:
            if self._slide is not None:
                self._slide.close()
            self._slide = None
            self._slide = open_slide(path)
        return self._slide


def read_tiles(
    slide: Slide,
    plan: TilePlan,
    corners: np.ndarray,
    out: np.ndarray,
    on_bad_tile: str = "error",
    min_sharpness: float | None = None,
) -> np.ndarray:
    """Read tiles into ``out (n, H, W, 3)`` uint8; the state of each, (n,) float32: kept, rejected (blurred) or white.

    Raises:
        InputError: a tile cannot be read and ``on_bad_tile`` is ``error``.
    """
    state = np.full(len(corners), KEPT, np.float32)
    for i, (x, y) in enumerate(corners.tolist()):
        try:
            out[i] = slide.read_region(x, y, plan.size, plan.size, plan.downsample)
        except InputError as error:
            if on_bad_tile != "white":
                raise
            log.warning("%s; taken as white", error)
            out[i], state[i] = 255, WHITE
            continue
        if min_sharpness is not None and sharpness(out[i]) < min_sharpness:
            state[i] = REJECTED
    return state


def _as_it_is(result: _ReadResult) -> _ReadResult:
    return result


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def choose_workers(workers: int | str, device: torch.device) -> int:
    """Number of reading processes; ``auto`` leaves the cores to the encoder where it computes on them."""
    if workers != "auto":
        try:
            number = int(workers)
        except ValueError:
            number = -1
        if number < 0:
            raise InputError(
                f"data.workers={workers} is no number of processes; give auto, 0 (read in the main process) or more."
            )
        return number
    cores = available_cores()
    # Decoding a tile takes about a fifteenth of the time the smallest encoder needs on one core.
    return min(16, max(1, cores - 1)) if device.type == "cuda" else max(1, cores // 8)


def available_cores() -> int:
    """Cores this process may use (a cluster's limit counts, not the machine's size)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str = "auto") -> torch.device:
    """``auto``: a GPU where there is one, else the CPU.

    Raises:
        InputError: the named device does not exist here.
    """
    if name in ("auto", "gpu"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"data.device={name} cannot be used here ({' '.join(str(error).split())[:120]}); use auto or cpu."
        ) from error
    return device


def encode(
    batches: Iterable[TileBatch], encoder: nn.Module, device: torch.device, amp: bool = True
) -> Iterator[tuple[TileBatch, np.ndarray]]:
    """Each batch with its features, (n, D) float32; rejected tiles are not computed and have zeros.

    On a GPU the next batch is queued before the last one's result is fetched, so that the device does not wait for the
    disk.
    """
    encoder = encoder.eval().to(device)
    waiting: tuple[TileBatch, Tensor] | None = None
    cast = torch.autocast("cuda", torch.float16) if amp and device.type == "cuda" else contextlib.nullcontext()
    for batch in batches:
        with torch.inference_mode(), cast:
            features = _forward(encoder, batch, device)
        if device.type != "cuda":
            yield batch, features.numpy()
            continue
        if waiting is not None:
            yield waiting[0], waiting[1].cpu().numpy()
        waiting = (batch, features)
    if waiting is not None:
        yield waiting[0], waiting[1].cpu().numpy()


def _forward(encoder: nn.Module, batch: TileBatch, device: torch.device) -> Tensor:
    if batch.error is not None:
        return torch.empty(0, 0)
    good = batch.state != REJECTED
    everything = bool(good.all())
    tiles = batch.tiles if everything else batch.tiles[good]
    dim = int(encoder.dim)  # type: ignore[arg-type]
    if not len(tiles):
        return torch.zeros(len(good), dim)
    features = encoder(tiles.to(device)).float()
    if features.shape != (len(tiles), dim):
        raise ValueError(f"encoder gave {tuple(features.shape)} for {len(tiles)} tiles; it says dim={dim}")
    if everything:
        return features
    return features.new_zeros(len(good), dim).index_copy(0, good.nonzero()[:, 0].to(features.device), features)


def weights_fingerprint(encoder: nn.Module) -> str:
    """A short hash of the encoder's weights, from up to 1024 values of every tensor; the same on every device.

    Weights that follow from a seed are known by the encoder's own fingerprint: their last bits depend on the machine.
    """
    stated = getattr(encoder, "fingerprint", None)
    if stated and str(getattr(encoder, "weights", "")).startswith("random"):
        return str(stated)
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // 1024))].cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return total.hexdigest()[:16]
