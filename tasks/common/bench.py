"""One row of a benchmark: ours beside a peer, measured in the same run."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class BenchRow:
    """Ours beside a peer.

    Attributes:
        name: what was measured, with its size.
        ours: seconds per call, or a rate when ``unit`` says so.
        peer: the same for the peer.
        peer_name: what the peer is.
        unit: ``"s"`` (smaller is better) or a rate such as ``"tiles/s"`` (larger is better).
        peak_mb: peak memory of ours in MB, where it was measured.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str = "s"
    peak_mb: float | None = None

    @property
    def ratio(self) -> float:
        """How many times better than the peer ours is (above 1: faster)."""
        return self.peer / self.ours if self.unit == "s" else self.ours / self.peer


def median_times(calls: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that a slow minute of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm-up
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def each_apart(measure: Callable[..., list[BenchRow]], jobs: Sequence[tuple[object, ...]]) -> Iterator[BenchRow]:
    """The rows of ``measure(*job)`` for each job, in a fresh process each.

    What a large model leaves behind, memory in pieces above all, slows down those that are measured after it.
    """
    spawn = multiprocessing.get_context("spawn")
    for job in jobs:
        # By default Ctrl-C ends a Python process with a stack trace; this one is to end with its parent, silently.
        with ProcessPoolExecutor(1, spawn, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as process:
            yield from process.submit(measure, *job).result()


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, MB (kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
