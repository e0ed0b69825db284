"""What is timed: a mixer, the formulation its paper's code executes, and softmax attention."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

import attention
from attention.mixer import Mixer
from kernels.measure import Case, Contestant, Machine, Result, run_case

LONGEST = 20.0  # seconds of one forward pass beyond which a contestant is left out
LARGEST_MATRIX = 1e9  # bytes; forward and backward hold several of them


def case_of(name: str, size: Sequence[int], machine: Machine, device: torch.device) -> Case | None:
    """The mixer, its released formulation and softmax attention at (*grid, C); None where it takes no such grid."""
    *grid, dim = size
    cls = attention.class_of(name, "mixer")
    if len(grid) not in cls.grids:  # type: ignore[attr-defined]
        return None
    title = f"{name} {'x'.join(map(str, grid))}, {dim} channels"
    plain = build("softmax", dim, grid).to(device)
    try:
        module = build(name, dim, grid).to(device)
    except RuntimeError as error:  # some have parameters for every place
        reason = str(error).split(":")[-1].strip() or "cannot be built"
        absent = Contestant("fovea", lambda: torch.zeros(()), [], reason)
        return Case(title, [absent], "fovea", 0, 0)
    x = torch.randn(1, *grid, dim, device=device)
    # The papers' code is that of images; some of it builds its tables of tokens by tokens at once.
    refused = refusal(module, (1, *grid), machine, materialises=True)
    released = released_of(module) if len(grid) == 2 and not refused else None
    contestants = [
        _contestant("softmax attention", plain, plain, x, machine, same=False),
        _contestant("fovea", module, module, x, machine),
    ]
    if refused and len(grid) == 2:
        contestants.append(Contestant("released formulation", lambda: x, [x], refused, same=False))
    if released is not None:
        same = not module.takes_choices  # between ties the choice is arbitrary
        contestants.append(_contestant("released formulation", released, module, x, machine, same))
    shape = (1, *grid)
    return Case(title, contestants, "fovea", module.flops(shape), module.min_bytes(shape))


def results_of(case: Case, machine: Machine, device: torch.device, seconds: float) -> list[Result]:
    """Time the case; where the mixer itself is left out nothing runs, and the reason is all there is."""
    ours = next(contestant for contestant in case.contestants if contestant.name == case.baseline)
    if ours.absent:
        return [Result(case.name, ours.name, case.baseline, note=ours.absent)]
    return run_case(case, machine, device, seconds)


def released_of(module: Mixer) -> Callable[[Tensor], Tensor] | None:
    """The formulation of the paper's code, from the repository's tests where they are there."""
    place = f"tests.attention.released.{module.name}"
    try:
        found = importlib.util.find_spec(place)
    except ModuleNotFoundError:
        return None
    if found is None:
        return None
    formulation = importlib.import_module(place)
    build = getattr(formulation, "released_mixer", None) or formulation.released
    return cast("Callable[[Tensor], Tensor]", build(module))


def build(name: str, dim: int, grid: Sequence[int]) -> Mixer:
    """A mixer with heads of 32 channels and its defaults, in evaluation mode."""
    accepted = attention.parameters_of(name, "mixer")
    given = {"num_heads": max(1, dim // 32), "input_size": tuple(grid), "axes": len(grid)}
    torch.manual_seed(0)
    module = attention.create(name, kind="mixer", dim=dim, **{k: v for k, v in given.items() if k in accepted})
    return cast("Mixer", module.eval())


def _contestant(
    name: str,
    run: Callable[[Tensor], Tensor],
    module: Mixer,
    x: Tensor,
    machine: Machine,
    same: bool = True,
) -> Contestant:
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    shape = x.shape[:-1]
    absent = refusal(module, shape, machine)
    return Contestant(name, lambda: run(leaf), leaves, absent, same=same)


def refusal(module: Mixer, shape: Sequence[int], machine: Machine, materialises: bool = False) -> str:
    """Why this cannot be timed here in reasonable time and memory; empty where it can.

    Args:
        materialises: this formulation keeps the matrix of tokens by tokens even if the module does not.
    """
    seconds = module.flops(shape) / max(machine.matmul.values())
    if seconds > LONGEST:
        return f"one forward pass would take {seconds:.0f} s at the rate of a matrix product"
    matrix = 4 * module.num_heads * math.prod(shape[1:]) ** 2
    if (materialises or module.about.keeps_matrix) and "N^2" in module.about.complexity and matrix > LARGEST_MATRIX:
        return f"its matrix of tokens by tokens would take {matrix / 1e9:.0f} GB"
    return ""
