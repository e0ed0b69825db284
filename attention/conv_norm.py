"""Convolutions followed by batch normalisation: folded while evaluating, blind to masked tokens while training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from attention.masked_norm import masked_batch_norm


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 where it is of lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fold(conv: _ConvNd, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that ``conv`` and ``norm`` are with the running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = wide(norm.weight) * (wide(norm.running_var) + norm.eps).rsqrt()
    bias = wide(norm.bias) - wide(norm.running_mean) * scale
    if conv.bias is not None:
        bias = bias + wide(conv.bias) * scale
    weight = wide(conv.weight) * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: _BatchNorm, mask: Tensor | None = None) -> Tensor:
    """``norm(conv(x))`` for (B, C, H, W), where masked tokens are 0; ``mask`` is (B, H, W), true for real tokens."""
    if norm.training:
        return masked_batch_norm(norm, conv(x), mask)
    weight, bias = fold(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def pointwise_norm(x: Tensor, conv: nn.Conv1d, norm: nn.BatchNorm1d) -> Tensor:
    """``norm(conv(x))`` for (B, C, N) and a kernel of one tap."""
    if norm.training:
        return norm(pointwise(x, conv.weight, conv.bias, conv.groups))
    return pointwise(x, *fold(conv, norm), conv.groups)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Grouped convolution of (B, C, N) by a kernel of one tap; library convolutions go through groups one by one."""
    if groups == 1:
        return F.conv1d(x, weight, bias)
    if groups == x.shape[1] == len(weight):
        out = x * weight[:, 0]
    else:
        out = (weight[:, :, 0].unflatten(0, (groups, -1)) @ x.unflatten(1, (groups, -1))).flatten(1, 2)
    return out if bias is None else out + bias[:, None]


class ConvNorm(nn.Module):
    """A 1 x 1 convolution without bias and its batch normalisation.

    Args:
        inputs, outputs: channels.
        first: number by which the convolution is called in a state dict; the norm has the next.
    """

    def __init__(self, inputs: int, outputs: int, first: int = 0) -> None:
        super().__init__()
        self.add_module(str(first), nn.Conv2d(inputs, outputs, 1, bias=False))
        self.add_module(str(first + 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform (B, C, H, W)."""
        conv, norm = self.children()
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm)
        return conv_norm(x, conv, norm, mask)
