"""The operators that the released layers of neighbourhood attention call, in their old and their new layout."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.neighborhood_attention import neighborhood_attention
from kernels.neighborhood_attention.reference import neighborhood_scores
from kernels.windows import axis_mask, window
from tests.parity.harness import Case, adapter


@adapter("bb_na[123]d_*", "bb_gna[123]d_*")
def neighbourhood(case: Case) -> dict[str, Tensor]:
    config = case.config
    heads_first = config["layout"].startswith("B, heads")
    settings = {name: config.get(name, 1) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    leaves = {n: case.inputs[n].clone().requires_grad_() for n in ("q", "k", "v", "rpb") if n in case.inputs}
    out, lse = neighborhood_attention(**leaves, **settings, heads_first=heads_first, return_lse=True)
    found = {"output.y": out, "output.lse": lse}
    if "output.logits" in case.expected:
        found["output.logits"] = _logits(leaves, settings)
    if any(name.startswith("grad.") for name in case.expected):
        gradients = torch.autograd.grad(out, list(leaves.values()), case.inputs["grad_weight"])
        found |= {f"grad.{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def _logits(leaves: dict[str, Tensor], settings: dict) -> Tensor:
    """(B, heads, *grid, prod K) of tensors (B, heads, *grid, D): the scores of the keys in a window, row-major."""
    q, k = (leaves[name].movedim(1, -2) for name in "qk")
    frame = window(q.shape[1:-2], *settings.values())
    scores = neighborhood_scores(q, k, leaves.get("rpb"), frame, q.shape[-1] ** -0.5)
    assert all(int(axis_mask(axis).sum(1).min()) == axis.kernel for axis in frame.axes)
    return scores[scores != -torch.inf].view(*scores.shape[:2], *frame.grid, frame.neighbours)
