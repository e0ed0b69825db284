"""Parity cases: tensors made by running the papers' released code, and how our code is held against them.

A case is ``NAME.json`` (configuration, tolerance, what each tensor is) beside ``NAME.safetensors`` (``state.*``,
``input.*``, ``output.*``, ``grad.*``). An adapter says how our code is run on it:

    @adapter("mil_abmil_*", skip={"output.Y_hat": "arg-max of a checked output"})
    def abmil(case: Case) -> dict[str, Tensor]:
        ...
        return {"output.logits": ..., "grad.x": ...}

Every ``output.*`` and ``grad.*`` tensor of the case must be returned or be in ``skip`` with a reason.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

OWN = Path(__file__).parent / "cases"
SHARED = Path(__file__).parents[3] / "shared" / "parity"


@dataclass
class Case:
    """One parity case; tensors keep the names of the file without their prefix."""

    name: str
    config: dict[str, Any]
    mode: str
    tolerance: float
    state: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Tensor] = field(default_factory=dict)  # "output.NAME" and "grad.NAME"


@dataclass
class Adapter:
    """How cases whose names match one of ``patterns`` are run."""

    patterns: tuple[str, ...]
    run: Callable[[Case], Mapping[str, Tensor]]
    skip: Mapping[str, str]


_adapters: list[Adapter] = []


def adapter(*patterns: str, skip: Mapping[str, str] | None = None) -> Callable[[Callable], Callable]:
    """Decorator: this function runs the cases whose names match one of ``patterns``."""

    def add(run: Callable) -> Callable:
        _adapters.append(Adapter(patterns, run, skip or {}))
        return run

    return add


def adapter_for(name: str) -> Adapter | None:
    """The adapter for a case, the most specific pattern first."""
    found = [(len(p), a) for a in _adapters for p in a.patterns if fnmatch.fnmatch(name, p)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def case_paths() -> dict[str, Path]:
    """Every case by name: the repository's own, and the whole shared set where it is there."""
    return {path.stem: path for folder in (SHARED, OWN) for path in sorted(folder.glob("*.json"))}


def load_case(path: Path) -> Case:
    """Read one case."""
    about = json.loads(path.read_text())
    case = Case(path.stem, about["config"], about["mode"], float(about["tolerance"]))
    for name, tensor in load_file(path.with_suffix(".safetensors")).items():
        prefix, _, rest = name.partition(".")
        if prefix == "state":
            case.state[rest] = tensor
        elif prefix == "input":
            case.inputs[rest] = tensor
        else:
            case.expected[name] = tensor
    return case


def compare(case: Case, got: Mapping[str, Tensor], skip: Mapping[str, str]) -> None:
    """Fail with the name of the first tensor that is absent, of another shape, or further off than the tolerance."""
    absent = [name for name in case.expected if name not in got and name not in skip]
    assert not absent, f"{case.name}: the adapter returns nothing for {absent}"
    for name, expected in case.expected.items():
        if name in skip:
            continue
        ours = got[name].detach()
        assert ours.shape == expected.shape, f"{case.name} {name}: {tuple(ours.shape)}, not {tuple(expected.shape)}"
        # The log-sum-exp of nothing is -inf, which must be met exactly and says nothing of the others' size.
        sizes = expected.double().abs().where(expected.isfinite(), 0)
        scale = max(1.0, sizes.max().item() if expected.numel() and "attn" not in name else 1.0)
        torch.testing.assert_close(
            ours.double(),
            expected.double(),
            rtol=case.tolerance,
            atol=case.tolerance * scale,
            msg=lambda text, name=name: f"{case.name} {name}: {text}",
        )
