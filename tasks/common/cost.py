"""What a network costs: parameters, floating-point operations per image, images per second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
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
def measure(
    model: nn.Module, img_size: int | Sequence[int], device: torch.device, channels: int = 3, batch_size: int = _BATCH
) -> Cost:
    """Cost of ``model`` for images (B, channels, height, width), ``img_size`` being both or the one side of a square.

    The model is left on ``device`` in evaluation mode.
    """
    model.to(device).eval()
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    image = torch.zeros(1, channels, *sides, device=device)
    flops, uncounted = count_flops(model, lambda: model(image))
    batch = torch.zeros(batch_size, channels, *sides, device=device)
    rates: list[float] = []
    model(batch)  # warm-up
    begin = time.perf_counter()
    while not rates or (time.perf_counter() - begin < _SECONDS and len(rates) < 50):
        start = time.perf_counter()
        model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(batch_size / (time.perf_counter() - start))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, flops, max(rates), device.type, batch_size, uncounted)


def count_flops(model: nn.Module, call: Callable[[], Any]) -> tuple[float, list[str]]:
    """Operations of ``call()``, which runs ``model``, and the operators of ours that were not counted.

    PyTorch's counter does not look into the operators of :mod:`kernels`. An attention module that states its own cost
    is counted by that where one of them runs in it.
    """
    seen, corrections = _OwnOperators(), []
    with FlopCounterMode(display=False) as counter, seen, contextlib.ExitStack() as hooks:
        before: list[tuple[nn.Module, float, set[str]]] = []

        def enter(module: nn.Module, _inputs: Any) -> None:
            before.append((module, counter.get_total_flops(), set(seen.names)))
            seen.names.clear()

        def leave(module: nn.Module, inputs: Any, _output: Any) -> None:
            _, flops, names = before.pop()
            if seen.names and not before:  # of modules within each other the outermost speaks for all
                with contextlib.suppress(NotImplementedError):  # one that states no cost stays uncounted
                    stated = sum(part.flops for part in module.cost(_positions(module, inputs[0])))  # type: ignore[operator]
                    corrections.append(stated - (counter.get_total_flops() - flops))
                    seen.names.clear()
            seen.names |= names

        for module in model.modules():
            if callable(getattr(module, "cost", None)):
                for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                    hooks.callback(handle.remove)
        call()
    return float(counter.get_total_flops()) + sum(corrections), sorted(seen.names)


def _positions(module: nn.Module, tensor: Tensor) -> tuple[int, ...]:
    """The shape that a module's cost is asked for: without channels, which are last for mixers and second for gates."""
    shape = tuple(tensor.shape)
    return (shape[0], *shape[2:]) if getattr(module, "kind", "mixer") == "gate" else shape[:-1]


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
        flops, _ = count_flops(model, lambda: found.extend(_next(exits)))  # noqa: B023 (called at once)
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
