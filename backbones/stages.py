"""The convolutions between the stages of a pyramid, and a stage around its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers.norm import LayerNorm2d
from timm.models import checkpoint
from torch import Tensor, nn

from attention.layout import to_channels_first, to_channels_last


class ConvNorm(nn.Sequential):
    """A 3 x 3 convolution of stride 2 and a layer norm over channels.

    Maps (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(outputs, eps=1e-6)


class Stem(nn.Module):
    """Two :class:`ConvNorm` with a GELU between them: stride 4."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = max(outputs // 2, 1)
        self.conv1 = nn.Conv2d(inputs, half, 3, stride=2, padding=1)
        self.norm1 = LayerNorm2d(half, eps=1e-6)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, outputs, 3, stride=2, padding=1)
        self.norm2 = LayerNorm2d(outputs, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Stage(nn.Module):
    """Downsampling, blocks, gate: (B, C, H, W) to (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], gate: nn.Module | None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.gate = nn.Identity() if gate is None else gate
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(self.downsample(x))
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.gate(to_channels_first(x).contiguous())
