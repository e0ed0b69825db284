"""Dual cross attention: selection by rollout, and pairs of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import attention
from attention.dcal import GlobalLocalCrossAttention
from tests.parity.harness import Case, adapter


@adapter("attn_dcal_glca")
def glca(case: Case) -> dict[str, Tensor]:
    module = attention.create("glca", **case.config)
    assert isinstance(module, GlobalLocalCrossAttention)
    attentions = case.inputs["attns"]
    found = _run(case, module, ["x"], lambda x: module(x, x, attentions=attentions))
    return {**found, "output.index": module.select(attentions)[0]}


@adapter("attn_dcal_pwca")
def pwca(case: Case) -> dict[str, Tensor]:
    module = attention.create("pwca", **case.config)
    return _run(case, module, ["x1", "x2"], module)


def _run(case: Case, module: nn.Module, inputs: list[str], forward: Callable[..., Tensor]) -> dict[str, Tensor]:
    attention.load_official(module, case.state)
    given = [case.inputs[name].clone().requires_grad_() for name in inputs]
    out = forward(*given)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [*given, *parameters.values()], case.inputs["grad_out"])
    named = zip([*inputs, *parameters], gradients, strict=True)
    return {"output.y": out, **{f"grad.{name}": gradient for name, gradient in named}}
