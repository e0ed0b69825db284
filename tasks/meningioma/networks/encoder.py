"""The contracting half of AGUNet and DAUNet, which is given the volume again at every scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.conv_norm import wide
from kernels.errors import InputError
from tasks.meningioma.networks.blocks import ConvBlock, convolution


class EncoderLevel(nn.Module):
    """One scale: the volume, convolved, joins the features of the scale above; then a :class:`ConvBlock`.

    Args:
        inputs: channels of the features.
        outputs: channels of the level.
        pyramid: channels of the volume that joins; None for none.
        dropout: see :class:`ConvBlock`.
    """

    def __init__(self, inputs: int, outputs: int, pyramid: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.pyramid = None if pyramid is None else convolution(pyramid, outputs)
        self.block = ConvBlock(inputs + (0 if pyramid is None else outputs), outputs, dropout)

    def forward(self, x: Tensor, volume: Tensor) -> Tensor:
        """Features (B, outputs, D, H, W) from those of the scale above, pooled, and the volume at this scale."""
        if self.pyramid is not None:
            x = torch.cat([F.relu(self.pyramid(volume), inplace=True), x], dim=1)
        return self.block(x)


class Encoder(nn.Module):
    """Levels with a maximum over 2 x 2 x 2 voxels between them; the volume is averaged over as many.

    The published figure gives the volume to the bottleneck too; the released code, which is followed, does not.

    Args:
        in_channels: channels of the volume.
        filters: channels of each level, the bottleneck's last.
        input_pyramid: whether the volume joins from the second level on.
        dropout: see :class:`ConvBlock`.

    """

    def __init__(
        self, in_channels: int, filters: Sequence[int], input_pyramid: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.filters = tuple(filters)
        self.levels = nn.ModuleList()
        inputs = in_channels
        for level, outputs in enumerate(filters[:-1]):
            self.levels.append(EncoderLevel(inputs, outputs, in_channels if input_pyramid and level else None, dropout))
            inputs = outputs
        self.bottleneck = ConvBlock(inputs, filters[-1], dropout)

    def forward(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The bottleneck (B, filters[-1], D / 2^n, ...) of (B, C, D, H, W), and the levels' maps, finest first."""
        skips: list[Tensor] = []
        x = volume
        for level in self.levels:
            if skips:
                volume = F.avg_pool3d(wide(volume), 2).to(volume.dtype)  # no average in half precision on a CPU
            skips.append(level(x, volume))
            x = F.max_pool3d(skips[-1], 2)
        return self.bottleneck(x), skips


def smallest_side(filters: Sequence[int]) -> int:
    """Fewest voxels of an axis for an encoder with these ``filters``.

    The released encoder stops to halve an axis of 4 voxels or fewer, which its decoder doubles all the same, so that
    such an axis cannot be built: before every halving there must be more than 4.

    Raises:
        InputError: there are fewer than two levels, or one has no channels.
    """
    if len(filters) < 2 or min(filters) < 1:
        raise InputError(f"filters={list(filters)} must be positive numbers, one for each of at least two levels.")
    return 4 * 2 ** (len(filters) - 2) + 1
