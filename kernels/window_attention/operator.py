"""Registration with PyTorch: ``torch.ops.fovea.window_attention`` and its backward, opaque to ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.operators import custom_op
from kernels.window_attention import eager
from kernels.window_attention.geometry import geometry


@custom_op("window_attention")
def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    grid: bool,
    shift: list[int],
    released: bool,
    hide: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, W, heads, E) and log-sum-exp (B, H, W, heads); ``backend`` is ``triton`` or ``torch``."""
    cut = geometry(q.shape, window, grid, shift, released, hide)
    if backend == "triton":
        from kernels.window_attention import triton_path

        return triton_path.forward(q, k, v, bias, cut, scale)
    return eager.forward(q, k, v, bias, cut, scale)


@window_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    grid: bool,
    shift: list[int],
    released: bool,
    hide: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:4], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:4], v.shape[4]), lse


@custom_op("window_attention_backward")
def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: list[int],
    grid: bool,
    shift: list[int],
    released: bool,
    hide: bool,
    scale: float,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty unless ``bias_gradient``)."""
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    cut = geometry(q.shape, window, grid, shift, released, hide)
    if backend == "triton":
        from kernels.window_attention import triton_path

        run: Any = triton_path.backward
    else:
        run = eager.backward
    *grads, d_bias = run(grad_out, grad_lse, q, k, v, bias, out, lse, cut, scale, bias_gradient)
    return *grads, lse.new_empty(0) if d_bias is None else d_bias


@window_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: list[int],
    grid: bool,
    shift: list[int],
    released: bool,
    hide: bool,
    scale: float,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = bias.new_empty(bias.shape) if bias is not None and bias_gradient else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, *options, ctx.backend = inputs
    ctx.options = options
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)  # an unused log-sum-exp then costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = ctx.needs_input_grad[3]
    d_q, d_k, d_v, d_bias = window_attention_backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, *ctx.options, wanted, ctx.backend
    )
    return d_q, d_k, d_v, d_bias if wanted else None, *([None] * (len(ctx.options) + 1))


window_attention_forward.register_autograd(_backward, setup_context=_setup_context)
