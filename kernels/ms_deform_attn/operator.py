"""Registration with PyTorch: ``torch.ops.fovea.ms_deform_attn`` and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.ms_deform_attn import eager
from kernels.operators import custom_op


@custom_op("ms_deform_attn")
def ms_deform_attn_forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int], backend: str
) -> Tensor:
    """Output (B, Q, H, D) for ``shapes`` (H_0, W_0, H_1, ...); ``backend`` is ``triton`` or ``torch``."""
    out = _path(backend).forward(value, locations, weights, shapes, starts)
    assert isinstance(out, Tensor)
    return out


@ms_deform_attn_forward.register_fake
def _(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int], backend: str) -> Tensor:
    return value.new_empty(*locations.shape[:3], value.shape[3])


@custom_op("ms_deform_attn_backward")
def ms_deform_attn_backward(
    grad_out: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    starts: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    # Autograd may hand over an expanded or transposed gradient; kernels index it as they index the output.
    grads = _path(backend).backward(grad_out.contiguous(), value, locations, weights, shapes, starts)
    return tuple(grads)


@ms_deform_attn_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    starts: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _path(backend: str) -> Any:
    if backend == "triton":
        from kernels.ms_deform_attn import triton_path

        return triton_path
    return eager


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, ctx.shapes, ctx.starts, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    grads = ms_deform_attn_backward(grad_out, *ctx.saved_tensors, ctx.shapes, ctx.starts, ctx.backend)
    return *grads, None, None, None


ms_deform_attn_forward.register_autograd(_backward, setup_context=_setup_context)
