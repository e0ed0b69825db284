"""Weighted sums over neighbourhoods (NATTEN's ``na2d_av``, the core of ContMix), on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.dynamic_conv import neighborhood_av
from tests.parity.harness import Case, adapter


@adapter("kern_na2d_av*")
def neighbourhood_sum(case: Case) -> dict[str, Tensor]:
    results = []
    for backend in ("torch", "reference", *(["triton"] if INTERPRETING else [])):
        attn, value = (case.inputs[name].clone().requires_grad_() for name in ("attn", "value"))
        out = neighborhood_av(
            attn, value, case.config["kernel_size"], dilation=case.config["dilation"], backend=backend
        )
        out.backward(case.inputs["grad_out"])
        results.append({"output.out": out.detach(), "grad.attn": attn.grad, "grad.value": value.grad})
    for other in results[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=case.tolerance, atol=case.tolerance)
    return results[0]
