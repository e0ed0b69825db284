"""What blocks and local terms are made of: convolutions on maps with channels last, MLP, stochastic depth."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attention.masking import blank
from kernels.errors import InputError

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel of ``x`` (B, *grid, C) over the last axes of the grid, zeros around it.

    Args:
        weight: (C, 1, *taps) with odd taps on as many axes as are convolved; axes before them are items of a batch.
        bias: (C,).
    """
    axes = weight.dim() - 2
    maps = x.flatten(0, x.dim() - axes - 2).movedim(-1, 1)
    padding = [taps // 2 for taps in weight.shape[2:]]
    return _CONVOLUTIONS[axes](maps, weight, bias, padding=padding, groups=len(weight)).movedim(1, -1).view(x.shape)


def depthwise_each(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel of each item of ``x`` (B, *grid, C) with a kernel of its own, zeros around the map.

    Args:
        kernels: (B, C, *taps) with odd taps, over the last axes of the grid.
    """
    if x.shape[0] == 0:  # convolutions have at least one group
        return x * kernels.sum()
    axes = x.dim() - 2
    taps = (1,) * (axes + 2 - kernels.dim()) + kernels.shape[2:]
    maps = x.movedim(-1, 1).flatten(0, 1)[None]
    out = _CONVOLUTIONS[axes](
        maps, kernels.reshape(-1, 1, *taps), padding=[count // 2 for count in taps], groups=maps.shape[1]
    )
    return out[0].unflatten(0, (x.shape[0], -1)).movedim(1, -1)


class ConditionalPosition(nn.Module):
    """``x`` plus its 3 x 3 depthwise convolution (Chu et al. 2021, arXiv 2102.10882), of maps (B, *grid, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Masked tokens come out as 0."""
        x = blank(x, mask)
        return blank(x + depthwise(x, self.proj.weight, self.proj.bias), mask)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on the last axis."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """While training, an item's branch is left out with probability ``rate``; those that stay are scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise InputError(f"drop_path={rate} must be from 0 to 1.")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        return x * F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), self.rate)
