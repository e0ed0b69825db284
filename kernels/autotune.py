"""The fastest configuration of a kernel on this GPU, timed once and remembered on disk.

Off unless asked for (``FOVEA_AUTOTUNE=1``, ``kernels.autotune=true``): each operator's first configuration is a sane
default. What was found is kept in ``$FOVEA_CACHE/kernels.json``, else ``fovea/kernels.json`` in the user's cache
folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kernels.launch import Config

_log = logging.getLogger(__name__)
_known: dict[str, str] = {}
_read_from: Path | None = None

Timer = Callable[[Callable[[], None]], float]


def best(
    kernel: Any,
    configs: Sequence[Config],
    key: Sequence[Hashable],
    device: torch.device,
    run: Callable[[Config], None],
    timer: Timer | None = None,
) -> Config:
    """The fastest of ``configs``, from memory, from disk, or by timing each once.

    Args:
        key: what the answer depends on beside the kernel's source, the GPU and the versions.
        timer: milliseconds of a call; Triton's own benchmark by default. A configuration that does not launch loses.
    """
    name = _name(kernel, key, device)
    choices = {str(config): config for config in configs}
    _read()
    if _known.get(name) in choices:
        return choices[_known[name]]
    times = {text: _time(lambda c=config: run(c), timer or _milliseconds) for text, config in choices.items()}  # type: ignore[misc]
    fastest = min(times, key=lambda text: times[text])
    if math.isinf(times[fastest]):
        return configs[0]
    _log.info("tuned %s: %s (%.3f ms; default %.3f ms)", name, fastest, times[fastest], times[str(configs[0])])
    _known[name] = fastest
    _write()
    return choices[fastest]


def size_bucket(size: int) -> int:
    """Sizes within a factor of two share their tuning: the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def cache_file() -> Path:
    """Where the choices are kept."""
    if chosen := os.environ.get("FOVEA_CACHE"):
        return Path(chosen) / "kernels.json"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fovea" / "kernels.json"


def forget() -> None:
    """Drop what this process remembers; the file stays and is read again."""
    global _read_from
    _known.clear()
    _read_from = None


def _name(kernel: Any, key: Sequence[Hashable], device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    source = hashlib.sha256(inspect.getsource(kernel.fn).encode()).hexdigest()[:12]
    return f"{gpu} | triton {metadata.version('triton')} | {kernel.__name__} {source} | {' '.join(map(str, key))}"


def _time(call: Callable[[], None], timer: Timer) -> float:
    try:
        return timer(call)
    except Exception as error:
        _log.info("a configuration does not launch: %s", error)
        return math.inf


def _milliseconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=25, return_mode="median"))


def _read() -> None:
    global _read_from
    path = cache_file()
    if _read_from == path:
        return
    _read_from = path
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or broken: it is only a cache
        return
    if isinstance(content, dict):
        _known.update({str(k): str(v) for k, v in content.items()})


def _write() -> None:
    """Replace the file by one with what other processes have added meanwhile and ours; a cache never stops a run."""
    global _read_from
    path = cache_file()
    ours = dict(_known)
    _read_from = None
    _read()
    _known.update(ours)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".kernels")
        with os.fdopen(handle, "w") as file:
            json.dump(_known, file, indent=1, sort_keys=True)
        Path(temporary).replace(path)
    except OSError as error:
        _log.info("the tuned configurations could not be kept in %s: %s", path, error)
