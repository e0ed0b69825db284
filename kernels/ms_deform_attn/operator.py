"""Registration with PyTorch: ``torch.ops.fovea.ms_deform_attn`` and its backward.

``sizes`` holds height and width of each level in turn; ``backend`` is ``triton`` or ``torch``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.ms_deform_attn import eager
from kernels.operators import custom_op


@custom_op("ms_deform_attn")
def ms_deform_attn_forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    """(B, Q, H * D)."""
    if backend == "triton":
        from kernels.ms_deform_attn import triton_path

        return triton_path.forward(value, sizes, locations, weights)
    return eager.forward(value, sizes, locations, weights)


@ms_deform_attn_forward.register_fake
def _(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    return value.new_empty(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


@custom_op("ms_deform_attn_backward")
def ms_deform_attn_backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    grad = grad.contiguous()  # autograd may hand over an expanded or transposed one
    if backend == "triton":
        from kernels.ms_deform_attn import triton_path

        return triton_path.backward(grad, value, sizes, locations, weights)
    return eager.backward(grad, value, sizes, locations, weights)


@ms_deform_attn_backward.register_fake
def _(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    value, locations, weights = ctx.saved_tensors
    d_value, d_locations, d_weights = ms_deform_attn_backward(grad, value, ctx.sizes, locations, weights, ctx.backend)
    return d_value, None, d_locations, d_weights, None


ms_deform_attn_forward.register_autograd(_backward, setup_context=_setup_context)
