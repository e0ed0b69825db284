"""Running a module on a case: official weights in, output and gradients under their official names out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import attention
from tests.parity.harness import Case


def run_module(
    case: Case,
    module: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    x: str = "x",
    before: Callable[[Tensor], Tensor] = lambda x: x,
    after: Callable[[Tensor], Tensor] = lambda y: y,
    output: str = "y",
    **options: Any,
) -> dict[str, Tensor]:
    """Load the case's state into ``module``, run it on the case's input and pull back ``grad_out``.

    Args:
        names: official names of our parameters, where they differ; they must hold the same numbers in the same order.
        x: name of the input.
        before, after: from the official layout to ours, and back.
        options: passed on to the module.

    Returns:
        The output, the gradient of the input, and those of the parameters that have official names.
    """
    attention.load_official(module, case.state)
    module.train(case.mode == "train")
    given = case.inputs[x].clone().requires_grad_()
    out = after(module(before(given), **options))
    found = {f"output.{output}": out}
    if "grad_out" in case.inputs:
        parameters = dict(module.named_parameters())
        official = {ours: (names or {}).get(ours, ours) for ours in parameters}
        gradients = torch.autograd.grad(out, [given, *parameters.values()], case.inputs["grad_out"], allow_unused=True)
        found[f"grad.{x}"] = gradients[0]
        for ours, gradient in zip(parameters, gradients[1:], strict=True):
            name = f"grad.{official[ours]}"
            if gradient is not None and name in case.expected:
                found[name] = gradient.reshape(case.expected[name].shape)
    return found
