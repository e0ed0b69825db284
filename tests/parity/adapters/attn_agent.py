"""Agent attention in the hosts of its paper: DeiT, Swin, PVT, CSWin, and Swin on maps of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attention
from attention.agent import AgentAttention
from attention.agent_stripes import StripeAgentAttention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


def _run(case: Case, module: AgentAttention, **layout: Any) -> dict[str, Tensor]:
    names = {name: name.removeprefix("bias.") for name, _ in module.named_parameters()}
    return run_module(case, module, names=names, **layout)


def _create(case: Case, **changes: Any) -> AgentAttention:
    module = attention.create(
        "agent",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        agents=case.config["agent_num"],
        **changes,
    )
    assert isinstance(module, AgentAttention)
    return module


@adapter("attn_agent_deit")
def deit(case: Case) -> dict[str, Tensor]:
    return _run(case, _create(case, input_size=[case.config["window"]] * 2, prefix=1))


@adapter("attn_agent_swin")
def swin(case: Case) -> dict[str, Tensor]:
    size = case.config["window_size"]
    module = _create(case, input_size=size)
    return _run(case, module, before=lambda x: x.unflatten(1, size), after=lambda y: y.flatten(1, 2))


@adapter("attn_agent_swin_anyres")
def any_resolution(case: Case) -> dict[str, Tensor]:
    module = _create(
        case, input_size=case.config["window_size"], agent_grid=tuple(case.config["downstream_agent_shape"])
    )
    return _run(case, module, before=lambda x: x.unflatten(1, (6, 10)), after=lambda y: y.flatten(1, 2))


@adapter("attn_agent_pvt_sr[12]")
def pvt(case: Case) -> dict[str, Tensor]:
    side = round(case.config["num_patches"] ** 0.5)
    module = _create(case, input_size=(side, side), sr_ratio=case.config["sr_ratio"], qkv_bias=case.config["qkv_bias"])
    found = _run(case, module, before=lambda x: x.unflatten(1, (side, side)), after=lambda y: y.flatten(1, 2))
    if case.config["sr_ratio"] == 1:  # one projection here, two in the released code
        out = module(case.inputs["x"].unflatten(1, (side, side))).flatten(1, 2)
        (weight,) = torch.autograd.grad(out, module.qkv.weight, case.inputs["grad_out"])
        found["grad.q.weight"], found["grad.kv.weight"] = weight.split([module.dim, 2 * module.dim])
    return found


@adapter("attn_agent_cswin_stripe")
def stripes(case: Case) -> dict[str, Tensor]:
    side, n = case.config["resolution"], round(case.config["agent_num"] ** 0.5)
    module = StripeAgentAttention(
        case.config["dim"], case.config["num_heads"], (side, case.config["split_size"]), (n, n)
    )
    attention.load_official(module, case.state)
    qkv = case.inputs["qkv"].clone().requires_grad_()
    out = module(*qkv.unflatten(2, (side, side))).flatten(1, 2)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [qkv, *parameters.values()], case.inputs["grad_out"])
    names = ["qkv", *(name.removeprefix("bias.") for name in parameters)]
    return {"output.y": out} | {f"grad.{name}": g for name, g in zip(names, gradients, strict=True)}
