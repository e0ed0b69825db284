"""A linear layer over the rows of one large matrix, with an optional ReLU: what every pooler does to a bag first.

``relu(x W^T + b)`` for ``x (T, D)`` with ``T`` up to hundreds of thousands. The CPU path works in pieces that stay in
cache, applies the bias and the ReLU there, and writes each result once: fresh memory costs as much as the arithmetic.
Its products go through oneDNN, as 1 x 1 convolutions, because the BLAS behind ``torch.mm`` may lack the widest vector
instructions of the processor (MKL on AMD: half the rate); both are exact float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from kernels.backend import choose
from kernels.operators import autocasting

Activation = Literal["relu", "gelu"] | None

# Rows per piece: outputs of a few MB stay in the cache. The weight gradient gains from longer pieces.
FORWARD_ROWS = 2048
BACKWARD_ROWS = 4096
# Below these, oneDNN's preparation costs more than it saves (measured with D = 1024, H = 512).
_ONEDNN_ROWS = 256
_ONEDNN_GRADIENT_ROWS = 1536


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = None, backend: str = "auto"
) -> Tensor:
    """``activation(x W^T + b)``, (T, H), for ``x (T, D)``, ``weight (H, D)`` and ``bias (H,)``.

    Half-precision ``x`` is converted piece by piece on the CPU path, never as a whole.

    Args:
        backend: ``"torch"`` forces the CPU path on the CPU, which ``"auto"`` takes where it pays; ``"triton"`` is
            taken where Triton serves, so that one word can go to a whole model, and means the vendor's product.

    Raises:
        InputError: a backend is forced that cannot serve.
    """
    choice = choose("linear", backend, (x, weight), torch_is_faster="the vendor's product is all there is to it")
    could = choice.backend == "torch" and activation != "gelu" and x.device.type == "cpu"
    if could and not torch.is_autocast_enabled("cpu") and (backend == "torch" or cpu_path_serves(x, weight)):
        return _Linear.apply(x, weight, bias, activation == "relu")
    return linear_reference(x, weight, bias, activation)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = None) -> Tensor:
    """:func:`linear` in plain PyTorch, on any device and under autocast."""
    if not autocasting(x):
        x = x.to(weight.dtype)
    out = F.linear(x, weight, bias)
    if activation == "relu":
        return out.relu()
    return F.gelu(out) if activation == "gelu" else out


def cpu_path_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the CPU path is right for this input and worth its overhead."""
    return (
        x.device.type == "cpu"
        and weight.dtype == torch.float32
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.is_contiguous()
        and len(x) >= _ONEDNN_ROWS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        out = weight.new_empty(len(x), len(weight))
        for rows in pieces(len(x), FORWARD_ROWS):
            piece = project(x[rows].to(weight.dtype), weight, bias)
            if relu:
                torch.clamp_min(piece, 0, out=out[rows])
            else:
                out[rows] = piece
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        d_x = weight.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight)
        d_bias = weight.new_zeros(len(weight)) if ctx.needs_input_grad[2] else None
        for rows in pieces(len(x), BACKWARD_ROWS):
            piece = grad[rows].contiguous()
            if out is not None:
                piece = torch.ops.aten.threshold_backward(piece, out[rows], 0)
            d_weight += weight_gradient(piece, x[rows].to(weight.dtype))
            if d_bias is not None:
                d_bias += piece.sum(0)
            if d_x is not None:
                torch.mm(piece, weight, out=d_x[rows])
        return (None if d_x is None else d_x.to(x.dtype)), d_weight, d_bias, None


def pieces(total: int, rows: int) -> list[slice]:
    """Slices of ``rows`` rows that cover ``total``."""
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of one piece, no gradient; through oneDNN where it is faster."""
    if len(x) < _ONEDNN_ROWS or not _onednn(x):
        return F.linear(x, weight, bias)
    whole = len(x) // 16 * 16
    out = torch.conv2d(_as_image(x[:whole]), weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(whole, -1)
    return out if whole == len(x) else torch.cat([out, F.linear(x[whole:], weight, bias)])


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x``, (H, D), of one piece; through oneDNN where it is faster."""
    if len(x) < _ONEDNN_GRADIENT_ROWS or not _onednn(x):
        return grad.t() @ x
    whole = len(x) // 16 * 16
    shape = (grad.shape[1], x.shape[1], 1, 1)
    out = conv2d_weight(_as_image(x[:whole]), shape, _as_image(grad[:whole]))[:, :, 0, 0]
    return out if whole == len(x) else out.addmm(grad[whole:].t(), x[whole:])


def _onednn(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _as_image(x: Tensor) -> Tensor:
    """Rows (T, D) as a channels-last image batch (16, D, T / 16, 1), a view; from 16 images on, PyTorch takes oneDNN
    for a 1 x 1 kernel whatever the number of threads."""
    return x.view(16, len(x) // 16, 1, x.shape[1]).permute(0, 3, 1, 2)
