"""InLine attention in the four networks of its release."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

import attention
from attention.block_parts import depthwise, depthwise_each
from attention.inline import inline_core, kernel_maker, local_kernels
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_inline_swin_*")
def swin(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = attention.create("inline", dim=config["dim"], num_heads=config["num_heads"], phi=config["kernel_func"])
    grid = tuple(config["window_size"])
    return run_module(case, module, before=lambda x: x.unflatten(1, grid), after=lambda y: y.flatten(1, 2))


@adapter("attn_inline_deit")
def deit(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = attention.create("inline", dim=config["dim"], num_heads=config["num_heads"], prefix_tokens=1)
    return run_module(case, module)


@adapter("attn_inline_pvt_rect")
def pvt(case: Case) -> dict[str, Tensor]:
    """The projection comes in two parts, and so do its gradients."""
    module = attention.create("inline", dim=case.config["dim"], num_heads=case.config["num_heads"])
    joined = {
        f"grad.qkv.{part}": torch.cat([case.expected[f"grad.{name}.{part}"] for name in ("q", "kv")])
        for part in ("weight", "bias")
    }
    whole = replace(case, expected=case.expected | joined)
    found = run_module(whole, module, before=lambda x: x.unflatten(1, (6, 9)), after=lambda y: y.flatten(1, 2))
    for part in ("weight", "bias"):
        found[f"grad.q.{part}"], found[f"grad.kv.{part}"] = found.pop(f"grad.qkv.{part}").split([32, 64])
    return found


class _Stripes(nn.Module):
    """The part of the cross-shaped network: projected tokens of stripes and the mean of the image come from outside."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.residual = kernel_maker(dim, num_heads, 9)

    def forward(self, qkv: Tensor, mean: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (self.num_heads, -1)).unbind(0)
        side = math.isqrt(v.shape[1])
        maps = v.flatten(2).unflatten(1, (side, side))
        local = depthwise(maps, self.get_v.weight, self.get_v.bias)
        local = local + depthwise_each(maps, local_kernels(self.residual, mean))
        return inline_core(q, k, v).flatten(2) + local.flatten(1, 2)


@adapter("attn_inline_cswin_full")
def cswin(case: Case) -> dict[str, Tensor]:
    module = _Stripes(case.config["dim"], case.config["num_heads"])
    attention.load_official(module, case.state)
    inputs = [case.inputs[name].clone().requires_grad_() for name in ("qkv", "x_mean")]
    out = module(*inputs)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [*inputs, *parameters], case.inputs["grad_out"])
    keys = [f"grad.{name}" for name in ("qkv", "x_mean", *names)]
    return {"output.y": out, **dict(zip(keys, gradients, strict=True))}
