"""Registration with PyTorch: ``torch.ops.fovea.neighborhood_av``, ``neighborhood_qk`` and their backwards.

All tensors have the heads before the grid, or all after it (``heads_first`` false); outputs are contiguous in that
order. ``padding`` is ``shift`` or ``zero``, ``backend`` ``triton`` or ``torch``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from kernels.dynamic_conv import eager
from kernels.dynamic_conv.taps import Taps
from kernels.operators import custom_op


def heads_first_view(tensor: Tensor, heads_first: bool) -> Tensor:
    """(B, H, *grid, D) of a tensor in either order."""
    return tensor if heads_first else tensor.movedim(-2, 1)


def grid_of(tensor: Tensor, heads_first: bool) -> tuple[int, ...]:
    """The token grid of a tensor in either order."""
    return tuple(tensor.shape[2:-1]) if heads_first else tuple(tensor.shape[1:-2])


def _back(tensor: Tensor, heads_first: bool) -> Tensor:
    return tensor if heads_first else tensor.movedim(1, -2).contiguous()


def _path(backend: str) -> ModuleType:
    if backend == "triton":
        from kernels.dynamic_conv import triton_path

        return triton_path
    return eager


def _taps(like: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: str, heads_first: bool) -> Taps:
    return Taps(grid_of(like, heads_first), tuple(kernel), tuple(dilation), padding == "zero")


# ------------------------------------------------------------------------------------------- the windows' weighted sums


@custom_op("neighborhood_av")
def neighborhood_av_forward(
    attn: Tensor, value: Tensor, kernel: list[int], dilation: list[int], padding: str, heads_first: bool, backend: str
) -> Tensor:
    """Weights (..., P) and values (..., D) to (..., D)."""
    taps = _taps(value, kernel, dilation, padding, heads_first)
    a, v = (heads_first_view(t, heads_first) for t in (attn, value))
    return _back(_path(backend).weighted_sum(a, v, 1.0, taps), heads_first)


@neighborhood_av_forward.register_fake
def _(
    attn: Tensor, value: Tensor, kernel: list[int], dilation: list[int], padding: str, heads_first: bool, backend: str
) -> Tensor:
    return value.new_empty(value.shape)


@custom_op("neighborhood_av_backward")
def neighborhood_av_backward(
    grad: Tensor,
    attn: Tensor,
    value: Tensor,
    kernel: list[int],
    dilation: list[int],
    padding: str,
    heads_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights and of the values."""
    taps = _taps(value, kernel, dilation, padding, heads_first)
    # Autograd may hand over an expanded or transposed gradient.
    a, v, g = (heads_first_view(t, heads_first) for t in (attn, value, grad.contiguous()))
    path = _path(backend)
    d_attn = path.products(g, v, None, 1.0, taps)
    return _back(d_attn, heads_first), _back(path.transposed_sum(a, g, 1.0, taps), heads_first)


@neighborhood_av_backward.register_fake
def _(
    grad: Tensor,
    attn: Tensor,
    value: Tensor,
    kernel: list[int],
    dilation: list[int],
    padding: str,
    heads_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return attn.new_empty(attn.shape), value.new_empty(value.shape)


def _setup_av(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attn, value, *ctx.settings = inputs
    ctx.save_for_backward(attn, value)
    ctx.set_materialize_grads(False)


def _backward_av(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    d_attn, d_value = neighborhood_av_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return d_attn, d_value, None, None, None, None, None


neighborhood_av_forward.register_autograd(_backward_av, setup_context=_setup_av)


# -------------------------------------------------------------------------------------------------- the windows' logits


@custom_op("neighborhood_qk")
def neighborhood_qk_forward(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    scale: float,
    kernel: list[int],
    dilation: list[int],
    padding: str,
    heads_first: bool,
    backend: str,
) -> Tensor:
    """Queries and keys (..., D) to logits (..., P)."""
    taps = _taps(q, kernel, dilation, padding, heads_first)
    a, b = (heads_first_view(t, heads_first) for t in (q, k))
    return _back(_path(backend).products(a, b, rpb, scale, taps), heads_first)


@neighborhood_qk_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    scale: float,
    kernel: list[int],
    dilation: list[int],
    padding: str,
    heads_first: bool,
    backend: str,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], math.prod(kernel))


@custom_op("neighborhood_qk_backward")
def neighborhood_qk_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    scale: float,
    kernel: list[int],
    dilation: list[int],
    padding: str,
    heads_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, of the keys and of the table of relative positions (empty without one)."""
    taps = _taps(q, kernel, dilation, padding, heads_first)
    a, b, g = (heads_first_view(t, heads_first) for t in (q, k, grad.contiguous()))
    path = _path(backend)
    d_q = path.weighted_sum(g, b, scale, taps)
    d_k = path.transposed_sum(g, a, scale, taps)
    d_rpb = q.new_empty(0) if rpb is None else path.table_gradient(g, taps).to(rpb.dtype)
    return _back(d_q, heads_first), _back(d_k, heads_first), d_rpb


@neighborhood_qk_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    scale: float,
    kernel: list[int],
    dilation: list[int],
    padding: str,
    heads_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_rpb = q.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), d_rpb


def _setup_qk(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, rpb, *ctx.settings = inputs
    ctx.save_for_backward(q, k, rpb)
    ctx.set_materialize_grads(False)


def _backward_qk(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    q, k, rpb = ctx.saved_tensors
    d_q, d_k, d_rpb = neighborhood_qk_backward(grad, q, k, rpb, *ctx.settings)
    return d_q, d_k, None if rpb is None else d_rpb, None, None, None, None, None, None


neighborhood_qk_forward.register_autograd(_backward_qk, setup_context=_setup_qk)
