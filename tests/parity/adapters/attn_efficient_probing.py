"""Efficient probing on images of one size, as packed bags."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from attention.efficient_probing import EfficientProbing
from tests.parity.harness import Case, adapter


@adapter("attn_ep", "attn_ep_dout2")
def efficient_probing(case: Case) -> dict[str, Tensor]:
    module = attention.create("efficient_probing", kind="pooling", num_classes=2, norm=None, **case.config)
    assert isinstance(module, EfficientProbing)
    classifier = {f"classifier.{name}": value for name, value in module.classifier.named_parameters()}
    attention.load_official(module, {**case.state, **classifier})
    module.train(case.mode == "train")
    x = case.inputs["x"].clone().requires_grad_()
    boundaries = torch.arange(len(x) + 1) * x.shape[1]
    out = module(x.flatten(0, 1), boundaries).embeddings
    parameters = {name: p for name, p in module.named_parameters() if name not in classifier}
    gradients = torch.autograd.grad(out, [x, *parameters.values()], case.inputs["grad_out"])
    named = zip(["x", *parameters], gradients, strict=True)
    return {"output.y": out, **{f"grad.{name}": gradient for name, gradient in named}}
