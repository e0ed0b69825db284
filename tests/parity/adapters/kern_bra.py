"""Bi-level routing attention with a given graph, on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.bi_level_routing_attention import bi_level_routing_attention, routing_probabilities
from tests.parity.harness import Case, adapter


@adapter("kern_bra_*")
def routing(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    graph, heads = inputs["region_graph"], config["num_heads"]
    sizes = {"region_size": config["region_size"], "kv_region_size": config["kv_region_size"]}
    results = []
    for backend in ["reference", "torch", *(["triton"] if INTERPRETING else [])]:
        leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
        out, _, _ = bi_level_routing_attention(
            *leaves, region_graph=graph, num_heads=heads, scale=config["scale"], backend=backend, **sizes
        )
        results.append([out, *torch.autograd.grad(out, leaves, inputs["grad_out"])])
    # What is furthest from the first is returned, so that each backend is held against the case.
    first = results[0]
    worst = [max(tensors, key=lambda t, f=f: (t - f).abs().max().item()) for f, *tensors in zip(*results, strict=True)]
    for ours, reference in zip(worst, first, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    attn = routing_probabilities(
        inputs["q"], inputs["k"], region_graph=graph, num_heads=heads, scale=config["scale"], **sizes
    )
    return {
        "output.out": worst[0],
        "output.attn": attn,
        **{f"grad.{name}": gradient for name, gradient in zip("qkv", worst[1:], strict=True)},
    }
