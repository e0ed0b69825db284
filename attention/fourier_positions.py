"""Positions of a grid's cells as random Fourier features, as mask decoders add them to maps.

Source: Tancik et al., Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains, NeurIPS
2020, arXiv 2006.10739, in the form of Kirillov et al., Segment Anything, ICCV 2023, arXiv 2304.02643. Everything is
computed where the frequencies are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.errors import InputError


class FourierPositions(nn.Module):
    """Sines, then cosines, of random projections of the places (x, y) in [-1, 1].

    Args:
        dim: features, an even number.
        scale: standard deviation of the frequencies.

    Raises:
        InputError: the number of features is odd or not positive.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise InputError(f"fourier positions: dim={dim} must be an even number of at least 2.")
        self.register_buffer("frequencies", scale * torch.randn(2, dim // 2))

    def forward(self, height: int, width: int) -> Tensor:
        """(height, width, dim) in the frequencies' precision, of the centres of the cells."""
        rows, columns = (
            (torch.arange(n, device=self.frequencies.device, dtype=self.frequencies.dtype) + 0.5) * (2 / n) - 1
            for n in (height, width)
        )
        # A projection of (x, y) is a sum of one angle for each axis: sines are taken of H + W angles, not of H W.
        of_x, of_y = 2 * math.pi * self.frequencies
        down, right = rows[:, None, None] * of_y, columns[:, None] * of_x
        sines = down.sin() * right.cos() + down.cos() * right.sin()
        cosines = down.cos() * right.cos() - down.sin() * right.sin()
        return torch.cat([sines, cosines], dim=-1)
