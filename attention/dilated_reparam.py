"""A large depthwise kernel with small dilated ones beside it, which are one kernel once training is over.

Source: Ding et al., UniRepLKNet, CVPR 2024, arXiv 2311.15599; with the branches of OverLoCK (Lou and Yu, CVPR 2025,
arXiv 2502.20087). Parameters are named as in the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attention.conv_norm import conv_norm, fold
from kernels.errors import InputError

BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Kernel side and dilation of the branches beside each large kernel."""


class DilatedReparam(nn.Module):
    """Depthwise convolution K x K plus dilated ones, each with its own batch normalisation, summed.

    While evaluating it is computed as the one convolution that it then is; :meth:`merge` makes that permanent.

    Args:
        channels: of the map.
        kernel_size: K, one of :data:`BRANCHES`.
        merged: build the form that :meth:`merge` leaves, to load its weights.

    Raises:
        InputError: there are no branches for the kernel.
    """

    def __init__(self, channels: int, kernel_size: int, merged: bool = False) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise InputError(
                f"a dilated reparameterised kernel has a side of {', '.join(map(str, BRANCHES))}; got {kernel_size}."
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.merged = merged
        self.lk_origin = self._depthwise(kernel_size, 1, bias=merged)
        if merged:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for side, dilation in BRANCHES[kernel_size]:
            self.add_module(f"dil_conv_k{side}_{dilation}", self._depthwise(side, dilation))
            self.add_module(f"dil_bn_k{side}_{dilation}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve (B, C, H, W); ``mask`` (B, H, W) keeps masked tokens, which must be 0, out of batch statistics."""
        if self.merged:
            return self.lk_origin(x)
        if not self.training:
            weight, bias = self.kernel()
            return F.conv2d(x, weight, bias, padding=self.kernel_size // 2, groups=self.channels)
        out = conv_norm(x, self.lk_origin, self.origin_bn, mask)
        for side, dilation in BRANCHES[self.kernel_size]:
            out = out + conv_norm(x, *self._branch(side, dilation), mask)
        return out

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 1, K, K) and bias (C,) of the one convolution, with the running statistics."""
        if self.merged:
            assert self.lk_origin.bias is not None
            return self.lk_origin.weight, self.lk_origin.bias
        weight, bias = fold(self.lk_origin, self.origin_bn)
        for side, dilation in BRANCHES[self.kernel_size]:
            small, shift = fold(*self._branch(side, dilation))
            reach = dilation * (side - 1) // 2
            first, end = self.kernel_size // 2 - reach, self.kernel_size // 2 + reach + 1
            spread = torch.zeros_like(weight)
            spread[:, :, first:end:dilation, first:end:dilation] = small
            weight, bias = weight + spread, bias + shift
        return weight, bias

    @torch.no_grad()
    def merge(self) -> DilatedReparam:
        """Replace the branches by the one convolution, in place, and return the module; training is then over."""
        if self.merged:
            return self
        weight, bias = self.kernel()
        conv = self._depthwise(self.kernel_size, 1, bias=True).to(weight)
        assert conv.bias is not None
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        self.lk_origin = conv
        del self.origin_bn
        for side, dilation in BRANCHES[self.kernel_size]:
            delattr(self, f"dil_conv_k{side}_{dilation}")
            delattr(self, f"dil_bn_k{side}_{dilation}")
        self.merged = True
        return self

    def _branch(self, side: int, dilation: int) -> tuple[nn.Conv2d, _BatchNorm]:
        conv = self.get_submodule(f"dil_conv_k{side}_{dilation}")
        norm = self.get_submodule(f"dil_bn_k{side}_{dilation}")
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm)
        return conv, norm

    def _depthwise(self, side: int, dilation: int, bias: bool = False) -> nn.Conv2d:
        return nn.Conv2d(
            self.channels,
            self.channels,
            side,
            padding=dilation * (side - 1) // 2,
            dilation=dilation,
            groups=self.channels,
            bias=bias,
        )


def merge_reparam(model: nn.Module) -> nn.Module:
    """Merge every :class:`DilatedReparam` of ``model``, in place, and return it."""
    for module in model.modules():
        if isinstance(module, DilatedReparam):
            module.merge()
    return model
