"""Registration with PyTorch: ``torch.ops.fovea.bi_level_routing_attention`` and its backward, opaque to the compiler.

Inputs are maps (B, H, W, heads, D) of any strides. ``planes`` says how outputs and gradients lie in memory: dense as
(B, heads, D, H, W), or dense as (B, H, W, heads, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.bi_level_routing_attention import eager
from kernels.bi_level_routing_attention.layout import empty_map, map_of
from kernels.bi_level_routing_attention.regions import regions
from kernels.operators import custom_op


@custom_op("bi_level_routing_attention")
def routing_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    region_size: list[int],
    kv_region_size: list[int],
    scale: float,
    mask_padding: bool,
    planes: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs, laid out as ``planes`` says, and log-sum-exp (B, heads, H, W); ``backend``: ``triton`` or ``torch``."""
    grids = regions(q.shape[1:3], region_size), regions(k.shape[1:3], kv_region_size)
    if backend == "triton":
        from kernels.bi_level_routing_attention import triton_path

        return triton_path.forward(q, k, v, region_graph, *grids, scale, mask_padding, planes)
    return eager.forward(q, k, v, region_graph, *grids, scale, mask_padding, planes)


@routing_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    region_size: list[int],
    kv_region_size: list[int],
    scale: float,
    mask_padding: bool,
    planes: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, _ = q.shape
    lse = q.new_empty((batch, heads, height, width), dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_map(q, v.shape[4], planes), lse


@custom_op("bi_level_routing_attention_backward")
def routing_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    out: Tensor,
    lse: Tensor,
    region_size: list[int],
    kv_region_size: list[int],
    scale: float,
    mask_padding: bool,
    planes: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as ``planes`` says; so are ``grad_out`` and ``out``."""
    grids = regions(q.shape[1:3], region_size), regions(k.shape[1:3], kv_region_size)
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if backend == "triton":
        from kernels.bi_level_routing_attention import triton_path

        return triton_path.backward(
            grad_out, grad_lse, q, k, v, region_graph, out, lse, *grids, scale, mask_padding, planes
        )
    d_out, result = map_of(grad_out, planes), map_of(out, planes)
    return eager.backward(d_out, grad_lse, q, k, v, region_graph, result, lse, *grids, scale, mask_padding, planes)


@routing_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    out: Tensor,
    lse: Tensor,
    region_size: list[int],
    kv_region_size: list[int],
    scale: float,
    mask_padding: bool,
    planes: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (empty_map(t, t.shape[4], planes) for t in (q, k, v))
    return d_q, d_k, d_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, region_graph, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, region_graph, *output)
    ctx.set_materialize_grads(False)  # an unused log-sum-exp then costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, region_graph, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = routing_attention_backward(grad_out, grad_lse, q, k, v, region_graph, out, lse, *ctx.options)
    planes = ctx.options[4]
    return *(map_of(g, planes) for g in grads), None, None, None, None, None, None, None


routing_attention_forward.register_autograd(_backward, setup_context=_setup_context)
