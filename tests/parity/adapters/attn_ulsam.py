"""Subspace attention while evaluating and while training; our groups are the released subspaces end to end."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from tests.parity.harness import Case, adapter


@adapter("attn_ulsam", "attn_ulsam_train")
def ulsam(case: Case) -> dict[str, Tensor]:
    splits = case.config["num_splits"]
    module = attention.create("ulsam", dim=case.config["nin"], num_splits=splits)
    attention.load_official(module, case.state).train(case.mode == "train")
    x = case.inputs["x"].clone().requires_grad_()
    out = module(x)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [x, *parameters.values()], case.inputs["grad_out"])
    found = {"output.y": out, "grad.x": gradients[0]}
    for name, gradient in zip(parameters, gradients[1:], strict=True):
        for i, part in enumerate(gradient.chunk(splits)):
            key = f"grad.subspaces.{i}.{name}"
            found[key] = part.reshape(case.expected[key].shape)
    return found
