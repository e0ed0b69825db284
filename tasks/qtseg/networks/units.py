"""Convolution, batch normalisation, activation: what U-Nets and self-guided attention are made of."""

from __future__ import annotations

from torch import Tensor, nn

from attention.conv_norm import conv_norm


class Unit(nn.Module):
    """Convolution with bias, batch normalisation, activation: (B, inputs, H, W) to (B, outputs, H, W).

    While evaluating, the normalisation is part of the convolution.

    Args:
        kernel: side of the convolution, odd.
        act: the activation; ReLU when left out.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(conv_norm(x, self.conv, self.norm))


class DoubleConv(nn.Sequential):
    """Two 3 x 3 units: (B, inputs, H, W) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(Unit(inputs, outputs), Unit(outputs, outputs))
