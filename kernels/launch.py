"""Launching Triton kernels: one call that picks a configuration, launches, and can be recorded instead.

A kernel never reads what it writes, so that launching it twice changes nothing: tuning relies on it. Accumulation over
programs goes through partial results and a second pass, not through atomics.

Recording lets :mod:`kernels.static` compile exactly what the operators would launch, on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import autotune
from kernels.backend import INTERPRETING, autotuning

MAX_CONFIGS = 12  # candidates of one kernel; bounds the time of tuning and of the compile gate
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes:
        constants: the kernel's tile sizes and other ``tl.constexpr`` arguments that may be chosen freely.
        spills: bytes of stack per thread that this configuration is allowed, with a comment where it is not 0.
    """

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    spills: int = 0

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{tiles} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Any
    arguments: Mapping[str, Any]
    config: Config


@dataclass
class Recorder:
    """Collects launches."""

    launches: list[Launch] = field(default_factory=list)


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Within the block, launches are recorded with every candidate configuration, and nothing runs."""
    global _recorder
    before, _recorder = _recorder, Recorder()
    try:
        yield _recorder
    finally:
        _recorder = before


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: small tiles keep that bearable."""
    return INTERPRETING and _recorder is None


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    configs: Sequence[Config],
    key: Sequence[Hashable] = (),
) -> None:
    """Launch ``kernel`` with the best of ``configs``.

    Args:
        grid: from the configuration's constants to the numbers of programs; fold what may exceed 65,535 into axis 0.
        arguments: by name, all of the kernel's but the configuration's constants; ``None`` for an absent tensor.
        configs: the first is taken unless tuning is on; at most ``MAX_CONFIGS``.
        key: what, beside the kernel and the GPU, the best configuration depends on.
    """
    assert 0 < len(configs) <= MAX_CONFIGS, f"{kernel}: {len(configs)} configurations"
    if _recorder is not None:
        _recorder.launches += [Launch(kernel, dict(arguments), config) for config in configs]
        return
    if 0 in grid(configs[0].constants):
        return
    if INTERPRETING:
        kernel[grid(configs[0].constants)](**arguments, **configs[0].constants)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))

    def run(config: Config) -> None:
        kernel[grid(config.constants)](
            **arguments, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages
        )

    with torch.cuda.device(device):
        tune = autotuning() and len(configs) > 1 and not torch.are_deterministic_algorithms_enabled()
        first = autotune.best(kernel, configs, key, device, run) if tune else configs[0]
        _first_that_launches(run, [first, *(config for config in configs if config != first)])


def _first_that_launches(run: Callable[[Config], None], configs: Sequence[Config]) -> None:
    """A GPU with less shared memory than the one a configuration was made for refuses it; the next may fit."""
    from triton.runtime.errors import OutOfResources

    for position, config in enumerate(configs):
        try:
            return run(config)
        except OutOfResources as error:
            if position + 1 == len(configs):
                raise
            _log.warning("configuration %s does not fit this GPU (%s); trying the next", config, error)
    return None


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: exact float32 unless PyTorch was told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
