"""What a network costs: parameters, floating-point operations per image, images per second."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_BATCH, _SECONDS = 32, 0.5


@dataclass(frozen=True)
class Cost:
    """Of one network at one image size.

    Attributes:
        parameters: numbers that are trained.
        flops: operations for one image, a multiply-add being two; those of ``uncounted`` operators are not in it.
        images_per_second: of the forward pass in evaluation mode, in batches of ``batch``, the best of several.
        device: where that was measured.
        uncounted: operators of ours that ran and that PyTorch's counter does not know.
    """

    parameters: int
    flops: float
    images_per_second: float
    device: str
    batch: int
    uncounted: list[str] = field(default_factory=list)


@torch.no_grad()
def measure(model: nn.Module, img_size: int, device: torch.device) -> Cost:
    """Cost of ``model`` for images (B, 3, img_size, img_size); it is left on ``device`` in evaluation mode."""
    model.to(device).eval()
    image = torch.zeros(1, 3, img_size, img_size, device=device)
    flops, uncounted = count_flops(lambda: model(image))
    batch = torch.zeros(_BATCH, 3, img_size, img_size, device=device)
    rates: list[float] = []
    model(batch)  # warm-up
    begin = time.perf_counter()
    while not rates or (time.perf_counter() - begin < _SECONDS and len(rates) < 50):
        start = time.perf_counter()
        model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(_BATCH / (time.perf_counter() - start))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, flops, max(rates), device.type, _BATCH, uncounted)


def count_flops(call: Any) -> tuple[float, list[str]]:
    """Operations of ``call()`` and the operators of ours that were not counted."""
    seen = _OwnOperators()
    with FlopCounterMode(display=False) as counter, seen:
        call()
    return float(counter.get_total_flops()), sorted(seen.names)


@torch.no_grad()
def exit_flops(model: Any, img_size: int) -> list[float] | None:
    """Operations for one image up to each exit; None for a network that cannot be computed exit by exit."""
    if not hasattr(model, "exits"):
        return None
    image = torch.zeros(1, 3, img_size, img_size, device=next(model.parameters()).device)
    costs: list[float] = []
    total = 0.0
    exits = iter(model.exits(image))
    while True:
        found: list[Tensor] = []
        flops, _ = count_flops(lambda: found.extend(_next(exits)))  # noqa: B023 (called at once)
        if not found:
            return costs
        total += flops
        costs.append(total)


def _next(exits: Any) -> list[Tensor]:
    answer = next(exits, None)
    return [] if answer is None else [answer]


class _OwnOperators(TorchDispatchMode):
    """Notes the operators of :mod:`kernels` that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "fovea":
            self.names.add(func.name().removeprefix("fovea::").partition(".")[0])
        return func(*args, **(kwargs or {}))
