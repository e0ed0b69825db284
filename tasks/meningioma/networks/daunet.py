"""DAUNet: a U-Net for whole volumes with position and channel attention at its bottleneck; DAGUNet is its guided form.

Source: Bouget et al., Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms,
Frontiers in Radiology 2021, arXiv 2101.07715, and the released code where it says more. With the published filters
DAUNet has 25.80 M parameters and DAGUNet 31.04 M. In the released code the projections of the position attention are
drawn anew whenever the network is built, neither trained nor saved; here they are parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.dual_position_channel import ChannelAttention, PositionAttention
from attention.parameters import Positive, Probability
from tasks.meningioma.networks import names
from tasks.meningioma.networks.agunet import FILTERS, mixed, mixer_block, skip_gates
from tasks.meningioma.networks.blocks import ConvBlock, UpConv, batch_norm, channel_dropout, conv_norm, convolution
from tasks.meningioma.networks.choices import coarse_grid
from tasks.meningioma.networks.decoder import Decoder, gated
from tasks.meningioma.networks.encoder import Encoder, smallest_side
from tasks.meningioma.networks.volume import DEFAULT_SIZE, VolumeNetwork


class DAUNet(VolumeNetwork):
    """Dual-attention U-Net: volumes (B, C, D, H, W) to logits (B, K, D, H, W).

    Every axis needs more than 2 to the power of (levels + 1) voxels, of which the default network has five.

    Args:
        in_channels: channels C of the volume.
        classes: K, background included.
        filters: channels of each level, the bottleneck's last.
        input_pyramid: whether the volume joins the encoder at every scale.
        deep_supervision: whether every level of the decoder has logits, which :meth:`forward_levels` gives.
        position, channel: whether the bottleneck has position and channel attention; without both it stays as it is.
        guided: whether every level of the decoder is given the bottleneck too (DAGUNet).
        attention_dropout: of whole channels, in the two branches and on their sum.
        dropout: of whole channels, after each ReLU of encoder and decoder.
        mixer: a token mixer in front of the dual attention; gate: one on the skips. None is the paper's. See
            :class:`tasks.meningioma.networks.agunet.AGUNet`, also for ``head_dim`` and ``size``.

    Raises:
        InputError: a parameter is not possible, or a module does not fit.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        filters: Sequence[Positive] = FILTERS,
        input_pyramid: bool = True,
        deep_supervision: bool = True,
        position: bool = True,
        channel: bool = True,
        guided: bool = False,
        attention_dropout: Probability = 0.5,
        dropout: Probability = 0.0,
        gate: Any = None,
        mixer: Any = None,
        head_dim: Positive = 32,
        size: Sequence[int] = DEFAULT_SIZE,
        name: str = "daunet",
    ) -> None:
        smallest, halvings = smallest_side(filters), len(filters) - 1
        super().__init__(name, in_channels, classes, 2**halvings, smallest)
        self.encoder = Encoder(in_channels, filters, input_pyramid, dropout)
        self.mixer = mixer_block(mixer, filters[-1], head_dim, coarse_grid(size, 2**halvings))
        self.dual = DualBottleneck(filters[-1], position, channel, attention_dropout) if position or channel else None
        above = list(filters[-2::-1])
        inputs = list(filters[:0:-1])
        gates = skip_gates(gate, above)
        levels = [
            DualDecoderLevel(inputs[i], above[i], gates[i], dropout, (filters[-1], 2 ** (i + 1)) if guided else None)
            for i in range(halvings)
        ]
        self.decoder = Decoder(levels, above, classes, deep_supervision)

    def levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        bottleneck, skips = self.encoder(x)
        bottleneck = mixed(self.mixer, bottleneck)
        if self.dual is not None:
            bottleneck = self.dual(bottleneck)
        return self.decoder(bottleneck, skips, finest_only)

    @staticmethod
    def checkpoint_filter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The released network's state by its neutral names."""
        return names.of_daunet(state)


class DualBottleneck(nn.Module):
    """Position and channel attention side by side, each with convolutions behind it; their sum, mixed by voxel.

    Args:
        dim: channels C.
        position, channel: which of the two there are, at least one.
        dropout: of whole channels, in both branches and on the sum.
    """

    def __init__(self, dim: int, position: bool = True, channel: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        self.position = AttentionBranch(dim, PositionAttention(dim, form="daunet"), dropout) if position else None
        self.channel = AttentionBranch(dim, ChannelAttention("daunet"), dropout) if channel else None
        self.dropout = channel_dropout(dropout)
        self.fuse = convolution(dim, dim, kernel=1)
        self.norm = batch_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, D, H, W)."""
        branches = [branch(x) for branch in (self.position, self.channel) if branch is not None]
        return conv_norm(self.dropout(sum(branches[1:], branches[0])), self.fuse, self.norm)


class AttentionBranch(nn.Module):
    """Attention, convolution, batch normalisation, ReLU, dropout, convolution."""

    def __init__(self, dim: int, attention: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.conv1, self.norm = convolution(dim, dim), batch_norm(dim)
        self.dropout = channel_dropout(dropout)
        self.conv2 = convolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, D, H, W)."""
        x = F.relu(conv_norm(self.attention(x), self.conv1, self.norm), inplace=True)
        return self.conv2(self.dropout(x))


class DualDecoderLevel(nn.Module):
    """DAUNet's: batch normalisation and ReLU of the skip and the up-convolved map together, then a block.

    Args:
        inputs: channels of the level below.
        filters: channels of this level and of its skip.
        gate: what the skip goes through; None for none.
        dropout: see :class:`tasks.meningioma.networks.blocks.ConvBlock`.
        guide: channels of the bottleneck, and how many times its voxels are as long as this level's; None where the
            level is not given it. At high strides a kernel of 3 reaches few voxels of the guide: at 16 it is 0.7 %.
    """

    def __init__(
        self,
        inputs: int,
        filters: int,
        gate: nn.Module | None = None,
        dropout: float = 0.0,
        guide: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.up = UpConv(inputs, filters)
        self.guide = None if guide is None else UpConv(guide[0], filters, stride=guide[1])
        joined = filters * (2 if guide is None else 3)
        self.gate = gate
        self.norm = batch_norm(joined)
        self.block = ConvBlock(joined, filters, dropout)

    def forward(self, x: Tensor, skips: list[Tensor], bottleneck: Tensor) -> Tensor:
        """Map (B, filters, 2 * D, 2 * H, 2 * W) from the level below (B, inputs, D, H, W).

        The last of ``skips`` is this level's and is taken away, so that it is freed before the convolutions.
        """
        x = self.up(x)
        parts = [] if self.guide is None else [self.guide(bottleneck)]
        x = torch.cat([*parts, gated(self.gate, skips.pop(), x), x], dim=1)
        del parts
        return self.block(F.relu(self.norm(x), inplace=True))
