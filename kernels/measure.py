"""Timing implementations of one operator side by side, and what the machine could do at best."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.errors import InputError


@dataclass(frozen=True)
class Contestant:
    """One implementation in a comparison.

    Attributes:
        name: ours is ``fovea`` (or ``fovea`` and more words), a peer has its own name.
        run: computes the output from tensors it already holds.
        leaves: those of them that get a gradient; empty when the peer has no backward pass.
        absent: why it cannot run here; ``run`` is then not called.
        same: whether its output is the baseline's; one that computes something else is timed beside the others without
            a comparison.
    """

    name: str
    run: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor] = ()
    absent: str = ""
    same: bool = True


@dataclass(frozen=True)
class Case:
    """Implementations that compute the same thing.

    Attributes:
        baseline: the contestant whose time is 1.00.
        flops: useful floating-point operations of the forward pass.
        bytes: bytes the forward pass must at least read and write.
        tolerance: largest difference of the outputs, relative to the largest output; a faster wrong answer is none.
    """

    name: str
    contestants: Sequence[Contestant]
    baseline: str
    flops: float
    bytes: float
    tolerance: float = 2e-3


@dataclass
class Result:
    """Medians of one contestant, in seconds; ``memory`` is the peak of forward and backward in bytes, inputs apart."""

    case: str
    contestant: str
    baseline: str
    forward: float | None = None
    both: float | None = None
    forward_ratio: float | None = None
    both_ratio: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    roofline: float | None = None
    memory: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Measured limits: bytes per second of a copy (read and written), operations per second of a matrix product."""

    copy: float
    matmul: dict[torch.dtype, float] = field(default_factory=dict)

    def seconds(self, case: Case, dtype: torch.dtype) -> float:
        """The least time of the case's forward pass: its bytes or its operations, whichever takes longer."""
        return max(case.bytes / self.copy, case.flops / self.matmul.get(dtype, torch.inf))


def measure_machine(device: torch.device, dtypes: Sequence[torch.dtype]) -> Machine:
    """Copy bandwidth and the rate of a large matrix product."""
    megabytes = 2048 if device.type == "cuda" else 256
    source = torch.empty(megabytes << 18, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), device, 0.3)
    size = 8192 if device.type == "cuda" else 1024
    rates = {}
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        rates[dtype] = 2 * size**3 / median_seconds(lambda a=a: a @ a, device, 0.3)  # type: ignore[misc]
    return Machine(copy, rates)


def run_case(case: Case, machine: Machine, device: torch.device, seconds: float = 0.8) -> list[Result]:
    """Time every contestant; they take turns, so that a slow moment of the machine hits all alike.

    Args:
        seconds: about how long each contestant is timed, forward and again forward with backward.

    Raises:
        InputError: two contestants do not compute the same.
    """
    results = {c.name: Result(case.name, c.name, case.baseline, note=c.absent) for c in case.contestants}
    present = [c for c in case.contestants if not c.absent]
    outputs = {}
    for contestant in present:
        with torch.no_grad():
            out = contestant.run()
        if contestant.same:
            outputs[contestant.name] = (out if isinstance(out, Tensor) else out[0]).float()
    expected = outputs[case.baseline]
    dtype = present[0].leaves[0].dtype if present[0].leaves else torch.float32
    for name, out in outputs.items():
        off = ((out - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item() if out.numel() else 0.0
        if off > case.tolerance:
            raise InputError(
                f"{case.name}: {name} is {off:.1e} away from {case.baseline}; there is nothing to compare."
            )
    outputs.clear()

    def forward(contestant: Contestant) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return contestant.run()

        return call

    def both(contestant: Contestant) -> Callable[[], object]:
        leaves = list(contestant.leaves)
        out = contestant.run()
        grad = torch.randn_like(out if isinstance(out, Tensor) else out[0])

        def call() -> object:
            made = contestant.run()
            result = made if isinstance(made, Tensor) else made[0]
            return torch.autograd.grad(result, leaves, grad, allow_unused=True)  # what only an auxiliary loss trains

        return call

    for name, time_ in _take_turns({c.name: forward(c) for c in present}, device, seconds).items():
        results[name].forward = time_
    trained = [c for c in present if c.leaves]
    for name, time_ in _take_turns({c.name: both(c) for c in trained}, device, seconds).items():
        results[name].both = time_
    for contestant in trained:
        results[contestant.name].memory = peak_memory(both(contestant), device)
    base = results[case.baseline]
    for result in results.values():
        if result.forward is not None and base.forward is not None:
            result.forward_ratio = base.forward / result.forward
            result.bytes_per_second = case.bytes / result.forward
            result.flops_per_second = case.flops / result.forward
            result.roofline = machine.seconds(case, dtype) / result.forward
        if result.both is not None and base.both is not None:
            result.both_ratio = base.both / result.both
    return list(results.values())


def _take_turns(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each call over interleaved rounds."""
    once = {}
    for name, call in calls.items():
        call()
        once[name] = _once(call, device)
    if not calls:
        return {}
    rounds = max(3, min(50, int(seconds / max(statistics.median(once.values()), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_once(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU between two events, with the launch queue kept from running dry."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host runs ahead
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def median_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of ``call`` over about that many seconds."""
    return _take_turns({"": call}, device, seconds)[""]


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at most, beyond what is there before; None where that cannot be known."""
    return _peak_memory_cuda(call, device) if device.type == "cuda" else _peak_memory_cpu(call)


def _peak_memory_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes to standard error from outside Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak_memory_cpu(call: Callable[[], object]) -> int | None:
    """Largest sum of what the allocator has handed out during the call, from the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    try:
        events = trace.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    except AttributeError:  # the trace's inner form is not promised
        return None
    return int(max(itertools.accumulate((size for _, size in changes), initial=0)))
