"""Registration with PyTorch: ``torch.ops.fovea.varlen_attention`` and its backward, opaque to ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.operators import custom_op
from kernels.varlen_attention import eager


@custom_op("varlen_attention")
def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (Tq, H, E) and log-sum-exp (Tq, H); ``backend`` is ``triton`` or ``torch``."""
    if backend == "triton":
        from kernels.varlen_attention import triton_path

        return triton_path.forward(q, k, v, cu_q, cu_k, key_bias, causal, scale)
    return eager.forward(q, k, v, cu_q, cu_k, key_bias, causal, scale)


@varlen_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


@custom_op("varlen_attention_backward")
def varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias (empty without one)."""
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if backend == "triton":
        from kernels.varlen_attention import triton_path

        run: Any = triton_path.backward
    else:
        run = eager.backward
    *grads, d_bias = run(grad_out, grad_lse, q, k, v, cu_q, cu_k, key_bias, out, lse, causal, scale)
    return *grads, lse.new_empty(0) if d_bias is None else d_bias


@varlen_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = lse.new_empty(0) if key_bias is None else key_bias.new_empty(key_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, key_bias, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k, key_bias, *output)
    ctx.set_materialize_grads(False)  # an unused log-sum-exp then costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, key_bias, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    d_q, d_k, d_v, d_bias = varlen_attention_backward(
        grad_out, grad_lse, q, k, v, cu_q, cu_k, key_bias, out, lse, ctx.causal, ctx.scale, ctx.backend
    )
    return d_q, d_k, d_v, None, None, None if key_bias is None else d_bias, None, None, None


varlen_attention_forward.register_autograd(_backward, setup_context=_setup_context)
