"""Window and grid attention with relative position bias, on every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.window_attention import relative_position_bias, window_attention
from tests.parity.harness import Case, adapter

_BACKENDS = ["reference", "torch", *(["triton"] if INTERPRETING else [])]


@adapter("kern_window_*", "kern_grid_*")
def window(case: Case) -> dict[str, Tensor]:
    """The projections around the operator; backends must agree, and the last one's numbers are compared."""
    found = [_run(case, backend) for backend in _BACKENDS]
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return found[-1]


def _run(case: Case, backend: str) -> dict[str, Tensor]:
    config = case.config
    sides = tuple(config["partition"])
    kind = "grid" if case.name.startswith("kern_grid") else "window"
    layout = "maxvit_tf" if config["rel_pos_type"] == "bias_tf" else "swin"
    leaves = {name: value.clone().requires_grad_() for name, value in case.state.items()}
    x = case.inputs["x"].clone().requires_grad_()
    width = config["dim_head"]
    fused = F.linear(x, leaves["qkv.weight"], leaves["qkv.bias"])
    if config["head_first"]:
        q, k, v = fused.unflatten(-1, (-1, 3, width)).unbind(-2)
    else:
        q, k, v = fused.unflatten(-1, (3, -1, width)).unbind(3)
    bias = relative_position_bias(leaves["rel_pos.relative_position_bias_table"], sides, layout)
    core = window_attention(q, k, v, sides, kind=kind, bias=bias, backend=backend)
    assert isinstance(core, Tensor)
    out = F.linear(core.flatten(-2), leaves["proj.weight"], leaves["proj.bias"])
    gradients = torch.autograd.grad(out, [x, *leaves.values()], case.inputs["grad_out"])
    cut = {f"output.core_{name}": _windows(t, sides, kind) for name, t in zip("qkv", (q, k, v), strict=True)}
    return {
        "output.out": out,
        **cut,
        "output.core_out": _windows(core, sides, kind),
        "output.core_bias": bias.view_as(case.expected["output.core_bias"]),
        **{f"grad.{name}": g for name, g in zip(["x", *leaves], gradients, strict=True)},
    }


def _windows(x: Tensor, sides: tuple[int, ...], kind: str) -> Tensor:
    """(B, H, W, heads, C) as (B * windows, heads, tokens, C), as the cases keep it."""
    h, w = sides
    if kind == "grid":
        x = x.unflatten(2, (w, -1)).unflatten(1, (h, -1)).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).permute(0, 1, 3, 5, 2, 4, 6)
    return x.flatten(4, 5).flatten(0, 2)
