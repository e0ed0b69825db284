"""Gated attention pooling of packed bags, on every backend that can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.gated_attention_pool import MASKED, PoolWeights, gated_attention_pool
from kernels.segment import segment_ids
from tests.parity.harness import Case, adapter, compare

BACKENDS = ("torch", "triton", "reference") if INTERPRETING else ("torch", "reference")
NAMES = ("V.weight", "V.bias", "U.weight", "U.bias", "w.weight", "w.bias")


@adapter("kern_pool_*")
def gated_pool(case: Case) -> dict[str, Tensor]:
    results = {backend: _run(case, backend) for backend in BACKENDS}
    for result in results.values():
        compare(case, result, {})
        # The comparison's tolerance grows with the largest entry, which is infinite where a bag is empty.
        ours, expected = result["output.lse"], case.expected["output.lse"]
        torch.testing.assert_close(ours.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), rtol=2e-5, atol=2e-5)
        assert torch.equal(ours == -torch.inf, expected == -torch.inf)
    return results["torch"]


def _run(case: Case, backend: str) -> dict[str, Tensor]:
    x = case.inputs["x"].detach().requires_grad_()
    weights = PoolWeights(*(case.state[n].requires_grad_() if n in case.state else None for n in NAMES))  # type: ignore[arg-type]
    cu_seqlens, drop_mask = case.inputs["cu_seqlens"], case.inputs.get("drop_mask")
    out, lse, scores = gated_attention_pool(x, weights, cu_seqlens, drop_mask=drop_mask, backend=backend)
    bag = out.mean(1)
    masked = scores if drop_mask is None else scores.masked_fill(drop_mask, MASKED)
    probs = (masked - lse[segment_ids(cu_seqlens, len(x))]).exp()
    leaves = {"x": x, **{name: w for name, w in zip(NAMES, weights, strict=True) if w is not None}}
    cotangents = [case.inputs[f"grad_{name}"] for name in ("out", "bag", "scores")]
    gradients = torch.autograd.grad([out, bag, scores], list(leaves.values()), cotangents)
    return {
        "output.out": out,
        "output.bag": bag,
        "output.lse": lse.detach(),
        "output.scores": scores,
        "output.probs": probs,
        **{f"grad.{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)},
    }
