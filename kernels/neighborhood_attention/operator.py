"""Registration with PyTorch: ``torch.ops.fovea.neighborhood_attention`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.neighborhood_attention import eager
from kernels.operators import custom_op
from kernels.windows import Axis, Window


@custom_op("neighborhood_attention")
def neighborhood_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, *grid, H, E) and log-sum-exp (B, *grid, H); ``backend`` is ``triton`` or ``torch``."""
    window = _window(q, kernel_size, stride, dilation, is_causal)
    if backend == "triton":
        from kernels.neighborhood_attention import triton_path

        return triton_path.forward(q, k, v, rpb, window, scale)
    return eager.forward(q, k, v, rpb, window, scale)


@neighborhood_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


@custom_op("neighborhood_attention_backward")
def neighborhood_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rpb (empty unless ``bias_gradient``)."""
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    window = _window(q, kernel_size, stride, dilation, is_causal)
    if backend == "triton":
        from kernels.neighborhood_attention import triton_path

        run: Any = triton_path.backward
    else:
        run = eager.backward
    *grads, d_rpb = run(grad_out, grad_lse, q, k, v, rpb, out, lse, window, scale, bias_gradient)
    return *grads, lse.new_empty(0) if d_rpb is None else d_rpb


@neighborhood_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_rpb = lse.new_empty(0) if rpb is None or not bias_gradient else rpb.new_empty(rpb.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_rpb


def _window(q: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool]) -> Window:
    return Window(tuple(map(Axis, q.shape[1:-2], kernel_size, stride, dilation, is_causal)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rpb, *ctx.setting, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, rpb, *output)
    ctx.set_materialize_grads(False)  # an unused log-sum-exp then costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, rpb, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = rpb is not None and ctx.needs_input_grad[3]
    d_q, d_k, d_v, d_rpb = neighborhood_attention_backward(
        grad_out, grad_lse, q, k, v, rpb, out, lse, *ctx.setting, ctx.scale, wanted, ctx.backend
    )
    return d_q, d_k, d_v, d_rpb if wanted else None, None, None, None, None, None, None


neighborhood_attention_forward.register_autograd(_backward, setup_context=_setup_context)
