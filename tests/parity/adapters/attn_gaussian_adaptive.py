"""GAAM over tokens (axis 1 of a sequence), over channels (axis 2), and its block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attention
from attention.gaussian_adaptive import GaussianBlock
from tests.parity.harness import Case, adapter

_AXES = {1: "tokens", 2: "channels"}


@adapter("attn_gaam_axis1")
def tokens(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = attention.create(
        "gaussian_adaptive",
        dim=case.inputs["x"].shape[2],
        num_heads=config["num_heads"],
        num_gaussians=config["num_gaussians"],
        eps=config["eps"],
    )
    return _run(case, module)


@adapter("attn_gaam_axis2")
def channels(case: Case) -> dict[str, Tensor]:
    """As a gate, whose heads need not divide the channels."""
    config = case.config
    module = attention.create(
        "gaussian_adaptive",
        kind="gate",
        dim=case.inputs["x"].shape[2],
        num_heads=config["num_heads"],
        num_gaussians=config["num_gaussians"],
        eps=config["eps"],
    )
    return _run(case, module, transposed=True)


@adapter("attn_gaam_block")
def block(case: Case) -> dict[str, Tensor]:
    axes = [_AXES[axis] for axis in case.config["norm_axes"]]
    return _run(case, GaussianBlock(axes, case.config["num_heads"], case.config["num_gaussians"]))


def _run(case: Case, module: nn.Module, transposed: bool = False) -> dict[str, Tensor]:
    attention.load_official(module, case.state)
    x = case.inputs["x"].clone().requires_grad_()
    out = module(x.mT).mT if transposed else module(x)
    parameters = dict(module.named_parameters())
    grad_x, *gradients = torch.autograd.grad(out, [x, *parameters.values()], case.inputs["grad_out"])
    found = {"output.y": out, "grad.x": grad_x}
    for name, gradient in zip(parameters, gradients, strict=True):
        layer, _, kind = name.removeprefix("heads.").rpartition(".")
        prefix = f"{layer}." if layer else ""
        for head, row in enumerate(gradient):
            found[f"grad.{prefix}attention_heads.{head}.{kind}"] = row
    return found
