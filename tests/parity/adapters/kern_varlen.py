"""Attention over packed sequences, on every backend that can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.varlen_attention import varlen_attention
from tests.parity.harness import Case, adapter, compare

BACKENDS = ("torch", "triton", "reference") if INTERPRETING else ("torch", "reference")


@adapter("kern_varlen_*")
def packed_attention(case: Case) -> dict[str, Tensor]:
    results = {backend: _run(case, backend) for backend in BACKENDS}
    for result in results.values():
        compare(case, result, {})
        # The comparison's tolerance grows with the largest entry, which is infinite where a query sees no key.
        ours, expected = result["output.lse"], case.expected["output.lse"]
        torch.testing.assert_close(ours.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours == -torch.inf, expected == -torch.inf)
    return results["torch"]


def _run(case: Case, backend: str) -> dict[str, Tensor]:
    q, k, v = (case.inputs[name].detach().requires_grad_() for name in "qkv")
    config = case.config
    out, lse = varlen_attention(
        q,
        k,
        v,
        case.inputs["cu_q"],
        case.inputs["cu_k"],
        causal=config["causal"],
        scale=config["scale"],
        backend=backend,
    )
    gradients = torch.autograd.grad(out, [q, k, v], case.inputs["grad_out"])
    named = dict(zip(("grad.q", "grad.k", "grad.v"), gradients, strict=True))
    return {"output.out": out, "output.lse": lse.detach(), **named}
