"""Registration with PyTorch: ``torch.ops.fovea.linear_attention_2pass`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.linear_attention import eager
from kernels.linear_attention.forms import Form
from kernels.operators import custom_op


@custom_op("linear_attention_2pass")
def linear_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    normaliser: str,
    feature_map: str,
    slope: float,
    scale: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, E) and the reduced state (S, H, D + 1, E + 1); ``backend`` is ``triton`` or ``torch``."""
    form = Form(normaliser, feature_map, slope, scale, eps)
    run: Any = _path(backend).forward
    return run(q, k, v, key_weight, query_weight, cos, sin, key_cos, key_sin, cu_q, cu_k, form)


@linear_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    normaliser: str,
    feature_map: str,
    slope: float,
    scale: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    states = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    state = q.new_empty(
        states, q.shape[2], q.shape[3] + 1, v.shape[3] + 1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return q.new_empty(*q.shape[:3], v.shape[3]), state


@custom_op("linear_attention_2pass_backward")
def linear_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    state: Tensor,
    normaliser: str,
    feature_map: str,
    slope: float,
    scale: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, key_weight and query_weight (empty without one)."""
    form = Form(normaliser, feature_map, slope, scale, eps)
    run: Any = _path(backend).backward
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grad_out = grad_out.contiguous()
    *grads, d_key_weight, d_query_weight = run(
        grad_out, q, k, v, key_weight, query_weight, cos, sin, key_cos, key_sin, cu_q, cu_k, state, form
    )
    absent = (state.new_empty(0), state.new_empty(0))
    return (
        *grads,
        absent[0] if d_key_weight is None else d_key_weight,
        absent[1] if d_query_weight is None else d_query_weight,
    )


@linear_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    state: Tensor,
    normaliser: str,
    feature_map: str,
    slope: float,
    scale: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = [state.new_empty(0) if w is None else w.new_empty(w.shape) for w in (key_weight, query_weight)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), weights[0], weights[1]


def _path(backend: str) -> Any:
    if backend == "triton":
        from kernels.linear_attention import triton_path

        return triton_path
    return eager


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], output[1])
    ctx.options = inputs[11:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, state = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 17
    d_q, d_k, d_v, d_key_weight, d_query_weight = linear_attention_backward(grad_out, *tensors, state, *ctx.options)
    return (
        d_q,
        d_k,
        d_v,
        None if tensors[3] is None else d_key_weight,
        None if tensors[4] is None else d_query_weight,
        *(None,) * 12,
    )


linear_attention_forward.register_autograd(_backward, setup_context=_setup_context)
