"""Neighbourhood attention: every backend against the released operators' masks, outputs and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.neighborhood_attention import neighborhood_attention
from kernels.neighborhood_attention.reference import neighborhood_scores
from kernels.windows import Window, axis_mask, window, window_mask
from tests.parity.harness import Case, adapter, compare

# On a GPU machine Triton does not take the cases' CPU tensors; there the operator's own tests hold it to the reference.
_BACKENDS = ["torch", "reference"] + (["triton"] if INTERPRETING else [])


@adapter("kern_na1d_*", "kern_na2d_[!a]*", "kern_na3d_*")  # na2d_av is another operator
def kern_na(case: Case) -> dict[str, Tensor]:
    for backend in _BACKENDS[1:]:
        compare(case, _run(case, backend), {})
    return _run(case, _BACKENDS[0])


def _run(case: Case, backend: str) -> dict[str, Tensor]:
    config = case.config
    settings = {name: config[name] for name in ("kernel_size", "stride", "dilation", "is_causal", "scale")}
    names = [name for name in ("q", "k", "v", "rpb") if name in case.inputs]
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in names}
    out, lse = neighborhood_attention(**leaves, **settings, return_lse=True, backend=backend)
    got = {"output.out": out, "output.lse": lse}
    grads = torch.autograd.grad(out, list(leaves.values()), case.inputs["grad_out"], retain_graph=True)
    got |= {f"grad.{name}": grad for name, grad in zip(names, grads, strict=True)}
    if "grad_lse" in case.inputs:
        cotangents = [case.inputs["grad_out"], case.inputs["grad_lse"]]
        grads = torch.autograd.grad([out, lse], list(leaves.values()), cotangents)
        got |= {f"gradlse.{name}": grad for name, grad in zip(names, grads, strict=True)}
    grid = leaves["q"].shape[1:-2]
    frame = window(grid, *(config[name] for name in ("kernel_size", "stride", "dilation", "is_causal")))
    if "output.mask" in case.expected:
        got["output.mask"] = window_mask(frame)
    if "output.logits" in case.expected:
        scores = neighborhood_scores(leaves["q"], leaves["k"], leaves.get("rpb"), frame, config["scale"])
        got["output.logits"] = _in_window_order(scores, frame)
    return got


def _in_window_order(scores: Tensor, frame: Window) -> Tensor:
    """(B, *grid, H, prod k) of (B, H, N, N): what is seen, row-major."""
    assert all(int(axis_mask(axis).sum(1).min()) == axis.kernel for axis in frame.axes)
    seen = scores[scores != -torch.inf].view(*scores.shape[:3], frame.neighbours)
    return seen.transpose(1, 2).unflatten(1, frame.grid)
