"""CrossViT's attention, its block and the exchange between two branches, whose class tokens come first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import attention
from attention.crossvit import CrossViTBlock, MultiScaleBlock
from tests.parity.harness import Case, adapter


@adapter("attn_crossvit")
def cross(case: Case) -> dict[str, Tensor]:
    module = attention.create("crossvit", **case.config)
    return _run(case, module, ["x"], ["y"], lambda x: [module(x[:, :1], x[:, 1:])])


@adapter("attn_crossvit_block")
def block(case: Case) -> dict[str, Tensor]:
    module = CrossViTBlock(**case.config, eps=1e-5)
    return _run(case, module, ["x"], ["y"], lambda x: [module(x[:, :1], x[:, 1:])])


@adapter("attn_crossvit_multiscale")
def multiscale(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = MultiScaleBlock(
        config["dim"], config["num_heads"], config["depth"], config["mlp_ratio"], config["qkv_bias"], eps=1e-5
    )
    return _run(case, module, ["xs", "xl"], ["ys", "yl"], lambda *branches: module(branches))


def _run(
    case: Case,
    module: nn.Module,
    inputs: list[str],
    outputs: list[str],
    forward: Callable[..., list[Tensor]],
) -> dict[str, Tensor]:
    """Outputs, and the gradients of what the first of them depends on."""
    attention.load_official(module, case.state)
    module.eval()
    given = [case.inputs[name].clone().requires_grad_() for name in inputs]
    out = forward(*given)
    parameters = dict(module.named_parameters())
    official = [name.replace("fusion.0.0.", "fusion.0.").replace("fusion.1.0.", "fusion.1.") for name in parameters]
    gradients = torch.autograd.grad(out[0], [*given, *parameters.values()], case.inputs["grad_out"], allow_unused=True)
    found = {f"output.{name}": value for name, value in zip(outputs, out, strict=True)}
    for name, gradient in zip([*inputs, *official], gradients, strict=True):
        if gradient is not None:
            found[f"grad.{name}"] = gradient
    return found
