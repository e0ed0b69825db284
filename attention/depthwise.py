"""A depthwise convolution whose weights' gradient is quick on the CPU for wide kernels as well."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.operators import autocasting

COLUMNS = 3  # of the widest kernel that oneDNN has a depthwise routine for in this direction


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` of every channel by itself, with a kernel of odd side and maps of the same size in and out.

    For the gradient of weights wider than 3, oneDNN takes its routine for dense convolutions. With slices of 3 columns,
    one after the other, the whole backward pass of 5 x 5 takes a third of the time on maps of 56 x 56 x 64 and half on
    14 x 14 x 256.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__(dim, dim, side, padding=side // 2, groups=dim)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        slow = weight.shape[3] > COLUMNS and input.device.type == "cpu" and input.dtype == torch.float32
        trained = weight.requires_grad and torch.is_grad_enabled() and not autocasting(input)
        if slow and trained and not torch.compiler.is_compiling():
            return _Depthwise.apply(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[3] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        side = weight.shape[3]
        d_x = _backward(grad, x, weight, (side // 2, side // 2), 0) if for_x else None
        d_weight = None
        if for_weight:
            padded = F.pad(x, (side // 2, side // 2))
            parts: list[Tensor] = []
            for first, part in zip(range(0, side, COLUMNS), weight.split(COLUMNS, dim=3), strict=True):
                seen = padded.narrow(3, first, x.shape[3] + part.shape[3] - 1)
                parts.append(_backward(grad, seen, part, (side // 2, 0), 1))
            d_weight = torch.cat(parts, 3)
        return d_x, d_weight, grad.sum((0, 2, 3)) if for_bias else None


def _backward(grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], which: int) -> Tensor:
    """The gradient of the input (``which`` 0) or the weights (1) of a depthwise convolution."""
    wanted = [which == 0, which == 1, False]
    options = ([1, 1], list(padding), [1, 1], False, [0, 0], len(weight))
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options, wanted)[which]
