"""Modules of every kind as the contract tests build them: small, from their YAML, with parameters that matter.

A new module needs no entry here. What it cannot do it says itself, by the class attributes of its base.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import attention
import conf
from attention.registry import Kind

DIM, HEADS = 32, 4
CONFIGURATIONS = Path(conf.__file__).parent / "attention"
SIZES = {1: [(1,), (7,), (50,)], 2: [(1, 1), (1, 7), (13, 9), (8, 8)], 3: [(1, 1, 1), (3, 5, 4)]}
"""Grids by number of axes: single tokens, strips, odd rectangles."""
ORDINARY = {1: (11,), 2: (5, 6), 3: (3, 2, 4)}


def configured(name: str) -> dict[str, Any]:
    """The parameters of the module's YAML."""
    values: dict[str, Any] = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values.pop("name") == name
    return values


def make(name: str, kind: Kind, *, seed: int = 0, dim: int = DIM, **changes: Any) -> nn.Module:
    """The module in evaluation mode; zero-initialised parameters are replaced, so that nothing is switched off."""
    accepted = attention.parameters_of(name, kind)
    params: dict[str, Any] = {"dim": dim, **configured(name), **changes}
    if "num_heads" in accepted and "num_heads" not in params:
        params["num_heads"] = HEADS
    if "input_size" in accepted and "input_size" not in params:
        params["input_size"] = (8, 8)
    torch.manual_seed(seed)
    module = attention.create(name, kind=kind, **params)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def grids(module: nn.Module) -> list[tuple[int, ...]]:
    """Every grid of :data:`SIZES` that the module takes."""
    return [size for axes in module.grids for size in SIZES[axes]]  # type: ignore[union-attr]


def ordinary_grid(module: nn.Module) -> tuple[int, ...]:
    """One small grid; an image where the module takes images."""
    taken: tuple[int, ...] = module.grids  # type: ignore[assignment]
    return ORDINARY[2 if 2 in taken else taken[0]]


def released(module: nn.Module, kind: Kind) -> Callable[..., Tensor] | None:
    """The formulation of the paper's code with the parameters of ``module``, where there is one."""
    place = f"tests.attention.released.{module.name}"
    if importlib.util.find_spec(place) is None:
        return None
    found = importlib.import_module(place)
    build = getattr(found, f"released_{kind}", None) or getattr(found, "released", None)
    return None if build is None else build(module)


def gradients_are_right(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether the gradients of inputs and parameters are those of finite differences, in float64."""
    module = module.double()
    names = [name for name, p in module.named_parameters() if p.requires_grad]

    def run(*values: Tensor) -> Tensor:
        given, parameters = values[: len(inputs)], dict(zip(names, values[len(inputs) :], strict=True))
        out = torch.func.functional_call(module, parameters, given)
        assert isinstance(out, Tensor)
        return out

    leaves = [t.double().requires_grad_() for t in inputs]
    leaves += [module.get_parameter(name).detach().clone().requires_grad_() for name in names]
    return torch.autograd.gradcheck(run, leaves, fast_mode=True, atol=1e-4, rtol=1e-3)


def compiled_agrees(module: nn.Module, *inputs: Tensor) -> None:
    """Compile without graph breaks; outputs and the first input's gradient must be those of eager execution."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for run in (module, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(*leaves)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1])
        found.append((out.detach(), grad))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def exported_agrees(module: nn.Module, some: Tensor, more: Tensor) -> None:
    """Export with a batch of any size; the program must give for another one what the module gives."""
    with torch.no_grad():
        program = torch.export.export(module, (some,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(more), module(more), rtol=1e-4, atol=1e-5)


def close_enough(low: Tensor, full: Tensor, share: float = 0.05) -> None:
    """Whether a result in low precision is that of full precision up to ``share`` of its largest value."""
    assert low.isfinite().all()
    largest = full.abs().max().clamp_min(1e-3)
    assert (low.float() - full).abs().max() <= share * largest, float((low.float() - full).abs().max() / largest)


def every(kind: Kind) -> Any:
    """Parametrise a test over all modules of a kind."""
    import pytest

    return pytest.mark.parametrize("name", attention.available(kind=kind))


make_mixer = functools.partial(make, kind="mixer")
make_gate = functools.partial(make, kind="gate")
make_cross = functools.partial(make, kind="cross")
