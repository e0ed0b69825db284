"""What AGUNet and DAUNet are built from: convolutions with batch normalisation, and up-convolutions.

Source: Bouget et al., Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms,
Frontiers in Radiology 2021, arXiv 2101.07715. The released networks are Keras's, whose defaults are kept: Glorot
uniform kernels, biases of 0, batch normalisation with an epsilon of 1e-3 and a momentum of 0.99.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from attention.conv_norm import fold, wide
from kernels.errors import InputError

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01
"""Keras's 0.99, counted from the other end."""
KERNEL = 3

_Layer = TypeVar("_Layer", nn.Conv3d, nn.ConvTranspose3d)


def batch_norm(channels: int) -> nn.BatchNorm3d:
    """Batch normalisation with Keras's constants."""
    return nn.BatchNorm3d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def convolution(inputs: int, outputs: int, kernel: int = KERNEL) -> nn.Conv3d:
    """A convolution that keeps the size, of an odd kernel, started as Keras starts it."""
    return _glorot(nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2))


def conv_norm(x: Tensor, conv: nn.Conv3d, norm: nn.BatchNorm3d) -> Tensor:
    """``norm(conv(x))``; one convolution while evaluating, which saves a pass over the map."""
    if norm.training:
        return norm(conv(x))
    weight, bias = fold(conv, norm)
    return F.conv3d(x, weight, bias, conv.stride, conv.padding)


class ConvBlock(nn.Module):
    """Twice: convolution 3 x 3 x 3, batch normalisation, ReLU, dropout of whole channels.

    Args:
        inputs, outputs: channels.
        dropout: probability that a channel is dropped, after each ReLU.
    """

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, outputs), batch_norm(outputs)
        self.conv2, self.norm2 = convolution(outputs, outputs), batch_norm(outputs)
        self.dropout = channel_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, inputs, D, H, W) to (B, outputs, D, H, W)."""
        x = self.dropout(F.relu(conv_norm(x, self.conv1, self.norm1), inplace=True))
        return self.dropout(F.relu(conv_norm(x, self.conv2, self.norm2), inplace=True))


class UpConv(nn.ConvTranspose3d):
    """Transposed convolution 3 x 3 x 3 that makes every axis exactly ``stride`` times as long, as TensorFlow does.

    TensorFlow's "SAME" drops what the full transposed convolution has too many at the *end* of each axis, and fills up
    with zeros there where it has too few. PyTorch's ``padding`` takes from both ends: with it, the weights of a Keras
    network would shift the map by a voxel.

    Args:
        inputs, outputs: channels.
        stride: at least 2.

    Raises:
        InputError: the stride is below 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 2) -> None:
        if stride < 2:
            raise InputError(f"up-convolution: stride={stride} must be at least 2.")
        super().__init__(inputs, outputs, KERNEL, stride=stride)
        _glorot(self)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """Transform (B, inputs, D, H, W) to (B, outputs, stride * D, stride * H, stride * W)."""
        assert self.bias is not None
        return up_convolve(x, self.weight, self.bias, self.stride[0])


def up_convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """What :class:`UpConv` computes, with kernels (inputs, outputs, 3, 3, 3)."""
    if stride < KERNEL:
        return F.conv_transpose3d(x, weight, bias, stride)[..., :-1, :-1, :-1]
    return F.conv_transpose3d(x, weight, bias, stride, output_padding=stride - KERNEL)


def up_norm(x: Tensor, up: UpConv, norm: nn.BatchNorm3d) -> Tensor:
    """``norm(up(x))``; one up-convolution while evaluating."""
    if norm.training:
        return norm(up(x))
    assert norm.running_mean is not None and norm.running_var is not None and up.bias is not None
    scale = wide(norm.weight) * (wide(norm.running_var) + norm.eps).rsqrt()
    weight = wide(up.weight) * scale[:, None, None, None]
    bias = wide(norm.bias) + (wide(up.bias) - wide(norm.running_mean)) * scale
    return up_convolve(x, weight.to(up.weight.dtype), bias.to(up.weight.dtype), up.stride[0])


def channel_dropout(probability: float) -> nn.Module:
    """Dropout of whole channels, or nothing for a probability of 0.

    Raises:
        InputError: it is no probability.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"dropout={probability} must be from 0 to 1.")
    return nn.Dropout3d(probability) if probability else nn.Identity()


def _glorot(layer: _Layer) -> _Layer:
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
