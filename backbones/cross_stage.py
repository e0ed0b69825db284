"""Parts of one-stage detectors' encoders: normalised convolutions, cross-stage blocks, pooling of several reaches.

Cross-stage blocks keep half of their channels as they are and let the other half through a chain of bottlenecks, every
link of which goes into the output: Wang et al., CSPNet, CVPR Workshops 2020, arXiv:1911.11929. The pooling pyramid in
front of a neck is He et al., Spatial Pyramid Pooling, ECCV 2014, arXiv:1406.4729, its pools chained. While evaluating,
batch normalisation is part of the convolution in front of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.conv_norm import conv_norm, fold

__all__ = ["ConvUnit", "CrossStage", "PooledPyramid", "UpConvUnit"]


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation, SiLU: (B, inputs, H, W) to (B, outputs, H', W').

    Args:
        kernel, stride: of the convolution; H' and W' are ceil(H / stride) and ceil(W / stride).
        padding: zeros at each border; half the kernel when left out.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return activated(conv_norm(x, self.conv, self.norm))


class UpConvUnit(nn.Module):
    """Transposed convolution whose kernel is its stride, without bias, then batch normalisation and SiLU.

    (B, inputs, H, W) to (B, outputs, scale * H, scale * W).
    """

    def __init__(self, inputs: int, outputs: int, scale: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, scale, scale, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm.training:
            return activated(self.norm(self.conv(x)))
        # The output channels of a transposed convolution are its weight's second axis.
        scale, shift = _affine(self.norm)
        weight = self.conv.weight * scale.to(self.conv.weight.dtype)[:, None, None]
        shift = shift.to(weight.dtype)
        return activated(F.conv_transpose2d(x, weight, shift, self.conv.stride))


class CrossStage(nn.Module):
    """Half of the channels through a chain of bottlenecks, every link kept: (B, inputs, H, W) to (B, outputs, H, W).

    Args:
        depth: bottlenecks, of two 3 x 3 convolutions each.
        shortcut: whether each bottleneck is added to what it was given.
    """

    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = shortcut
        self.enter = ConvUnit(inputs, 2 * half)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvUnit(half, half, 3), ConvUnit(half, half, 3)) for _ in range(depth)
        )
        self.leave = ConvUnit((2 + depth) * half, outputs)

    def forward(self, x: Tensor, coarse: Tensor | None = None) -> Tensor:
        """The block on ``x``, or on ``[coarse, x]`` where ``coarse`` has half the resolution and is repeated."""
        x = self.enter(x) if coarse is None else self._joined(coarse, x)
        pieces = list(x.chunk(2, dim=1))
        for block in self.blocks:
            y = block(pieces[-1])
            pieces.append(pieces[-1] + y if self.shortcut else y)
        return self.leave(torch.cat(pieces, dim=1))

    def _joined(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The first convolution on ``[coarse, fine]``.

        A 1 x 1 convolution commutes with repetition, so that its part for ``coarse`` is computed at that resolution,
        and neither the repeated map nor the concatenation is ever made.
        """
        conv, norm = self.enter.conv, self.enter.norm
        weight, shift = (conv.weight, None) if norm.training else fold(conv, norm)
        of_coarse, of_fine = weight.split([coarse.shape[1], fine.shape[1]], dim=1)
        below = F.interpolate(F.conv2d(coarse, of_coarse), scale_factor=2.0, mode="nearest")
        x = F.conv2d(fine, of_fine, shift) + below[..., : fine.shape[2], : fine.shape[3]]
        return activated(norm(x) if norm.training else x)


class PooledPyramid(nn.Module):
    """The map beside its maxima within 5, 9 and 13 cells, projected: (B, inputs, H, W) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = ConvUnit(inputs, inputs // 2)
        self.leave = ConvUnit(4 * (inputs // 2), outputs)

    def forward(self, x: Tensor) -> Tensor:
        pieces = [self.enter(x)]
        for _ in range(3):
            # The maximum of a square is that of its rows' maxima.
            by_rows = F.max_pool2d(pieces[-1], (1, 5), stride=1, padding=(0, 2))
            pieces.append(F.max_pool2d(by_rows, (5, 1), stride=1, padding=(2, 0)))
        return self.leave(torch.cat(pieces, dim=1))


def activated(x: Tensor) -> Tensor:
    """SiLU, in place where no gradient needs what was there."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) that ``norm`` is while evaluating."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale
