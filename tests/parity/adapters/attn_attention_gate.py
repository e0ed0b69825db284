"""The gate of AGUNet's skip connections."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from tests.parity.harness import Case, adapter


@adapter("seg_agunet_attention_gate")
def gate(case: Case) -> dict[str, Tensor]:
    module = attention.create(
        "attention_gate",
        dim=case.config["skip_channels"],
        signal_dim=case.config["gating_channels"],
        hidden_dim=case.config["filters"],
        norm_eps=case.config["bn_eps"],
    )
    attention.load_official(module, case.state).eval()
    x = case.inputs["x"].clone().requires_grad_()
    out = module(x, case.inputs["g"])
    (gradient,) = torch.autograd.grad(out.sum(), [x])
    return {"output.out": out, "grad.input.x": gradient}
