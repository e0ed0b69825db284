"""Reversed attention of DependencyViT, with the message of the layer before as a second input."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from attention.reversed import ReversedAttention
from tests.parity.harness import Case, adapter


@adapter("attn_reversed")
def reversed_attention(case: Case) -> dict[str, Tensor]:
    module = attention.create(
        "reversed",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        temperature=case.config["head_selector_temperature"],
        qkv_bias=case.config["qkv_bias"],
    )
    assert isinstance(module, ReversedAttention)
    attention.load_official(module, case.state)
    x, before = (case.inputs[name].clone().requires_grad_() for name in ("x", "m"))
    extras = {"message": before}
    out = module(x, extras=extras)
    found = {
        "output.y": out,
        "output.m_out": extras["message"],
        "output.dependency": module.dependency(x, message=before),
    }
    leaves = {"x": x, "m": before, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(out, list(leaves.values()), case.inputs["grad_out"])
    return found | {f"grad.{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
