"""Group attention between the case's projections, on every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.group_attention import group_attention
from tests.parity.harness import Case, adapter


@adapter("kern_grouped_*")
def grouped(case: Case) -> dict[str, Tensor]:
    results = [_run(case, b) for b in ["reference", "torch", *(["triton"] if INTERPRETING else [])]]
    worst = {}
    for name, first in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], first, rtol=1e-4, atol=1e-4)
        # What is furthest from the first is returned, so that each backend is held against the case.
        worst[name] = max((r[name] for r in results), key=lambda t, f=first: (t - f).abs().max().item())
    return worst


def _run(case: Case, backend: str) -> dict[str, Tensor]:
    heads, inputs = case.config["heads"], case.inputs
    weights = {name: value.clone().requires_grad_() for name, value in case.state.items()}
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "k_global", "v_global")}
    q, k, v = (F.linear(leaves["x"], weights[f"to_{n}.weight"]).unflatten(2, (heads, -1)) for n in "qkv")
    known, worth = (leaves[name].transpose(0, 1) for name in ("k_global", "v_global"))
    order = inputs["idx"].squeeze(2)
    attended = group_attention(
        q, k, v, order, case.config["group_size"], k_global=known, v_global=worth, backend=backend
    ).flatten(2)
    out = F.linear(attended, weights["proj.weight"])
    wanted = weights | leaves
    gradients = torch.autograd.grad(out, list(wanted.values()), inputs["grad_out"])
    return {
        "output.out": out,
        "output.before_proj": attended,
        **{f"grad.{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)},
    }
