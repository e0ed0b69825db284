"""Registration with PyTorch: ``torch.ops.fovea.group_attention`` and its backward, opaque to ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.group_attention import eager
from kernels.group_attention.groups import groups
from kernels.operators import custom_op


@custom_op("group_attention")
def group_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    group_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, N, H, E), and what the gradient needs: the log-sum-exp of both softmaxes, (B, H, N) in sorted order.

    The second is empty without global tokens; ``backend`` is ``triton`` or ``torch``.
    """
    if q.numel() == 0 or v.numel() == 0:
        precise = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=precise)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse, lse.new_zeros(0) if k_global is None else lse.clone()
    cut = groups(q.shape[1], group_size)
    if backend == "triton":
        from kernels.group_attention import triton_path

        return triton_path.forward(q, k, v, order, k_global, v_global, cut, scale)
    return eager.forward(q, k, v, order, k_global, v_global, cut, scale)


@group_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    group_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, lse.new_empty(0 if k_global is None else lse.shape)


@custom_op("group_attention_backward")
def group_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_global: Tensor,
    group_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, k_global and v_global (the last two empty without global tokens)."""
    if q.numel() == 0 or v.numel() == 0:
        d_q, d_k, d_v, d_known, d_worth = (
            q.new_zeros(0 if t is None else t.shape) for t in (q, k, v, k_global, v_global)
        )
        return d_q, d_k, d_v, d_known, d_worth
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grad_out = grad_out.contiguous()
    cut = groups(q.shape[1], group_size)
    if backend == "triton":
        from kernels.group_attention import triton_path

        grads = triton_path.backward(grad_out, q, k, v, order, k_global, v_global, out, lse, lse_global, cut, scale)
    else:
        grads = eager.backward(grad_out, q, k, v, order, k_global, v_global, out, lse, cut, scale)
    d_q, d_k, d_v, known, worth = grads
    if known is None or worth is None:
        return d_q, d_k, d_v, q.new_empty(0), q.new_empty(0)
    return d_q, d_k, d_v, known.to(q.dtype).contiguous(), worth.to(q.dtype).contiguous()


@group_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_global: Tensor,
    group_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_known, d_worth = (q.new_empty(0 if t is None else t.shape) for t in (q, k, v, k_global, v_global))
    return d_q, d_k, d_v, d_known, d_worth


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, order, k_global, v_global, ctx.group_size, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, order, k_global, v_global, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, order, k_global, v_global, out, lse, lse_global = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 9
    *tokens, d_known, d_worth = group_attention_backward(
        grad_out, q, k, v, order, k_global, v_global, out, lse, lse_global, ctx.group_size, ctx.scale, ctx.backend
    )
    if k_global is None:
        d_known = d_worth = None
    return *tokens, None, d_known, d_worth, None, None, None


group_attention_forward.register_autograd(_backward, setup_context=_setup_context)
