"""Position and channel attention of DAUNet and of multi-scale self-guided attention, alone and between convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attention
from attention.dual_position_channel import ChannelAttention, PositionAttention
from tests.parity.harness import Case, adapter


@adapter("seg_daunet_position_attention", "seg_msa_position_attention")
def position(case: Case) -> dict[str, Tensor]:
    form = "daunet" if "daunet" in case.name else "danet"
    return _run(case, PositionAttention(case.inputs["x"].shape[1], form=form))


@adapter("seg_daunet_channel_attention", "seg_msa_channel_attention")
def channel(case: Case) -> dict[str, Tensor]:
    return _run(case, ChannelAttention("daunet" if "daunet" in case.name else "danet"))


def _run(case: Case, module: nn.Module) -> dict[str, Tensor]:
    attention.load_official(module, case.state).eval()
    x = case.inputs["x"].clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out.sum(), [x])
    return {"output.out": out, "grad.input.x": gradient}


@adapter("seg_msa_pam_layer", "seg_msa_cam_layer")
def layer(case: Case) -> dict[str, Tensor]:
    width = case.config["in_ch"]
    inner = PositionAttention(width) if case.config["use_pam"] else ChannelAttention()
    steps = []
    for inputs in (2 * width, width):
        steps.append([nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.PReLU()])
    module = nn.Sequential(*steps[0], inner, *steps[1])
    state = {key.removeprefix("attn."): value for key, value in case.state.items()}
    within = {key.removeprefix("3."): value for key, value in state.items() if key.startswith("3.")}
    attention.load_official(inner, within)
    module.load_state_dict({**state_of(inner, "3."), **{k: v for k, v in state.items() if not k.startswith("3.")}})
    return {"output.out": module.eval()(case.inputs["x"])}


def state_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items()}
