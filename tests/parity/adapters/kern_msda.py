"""Deformable sampling, on every implementation in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.ms_deform_attn import ms_deform_attn
from tests.parity.harness import Case, adapter


@adapter("det_msda_core")
def core(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    found: dict[str, Tensor] = {}
    for backend in ("reference", *(["triton"] if INTERPRETING else []), "torch"):
        leaves = [inputs[name].clone().requires_grad_() for name in ("value", "loc", "weight")]
        value, locations, weights = leaves
        out = ms_deform_attn(value, inputs["spatial_shapes"], locations, weights, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        got = {"output.y": out, **dict(zip(("grad.value", "grad.loc", "grad.weight"), gradients, strict=True))}
        if found:  # the last is what the harness holds against the released numbers
            for name, tensor in got.items():
                torch.testing.assert_close(tensor, found[name], rtol=1e-4, atol=1e-4)
        found = got
    return found
