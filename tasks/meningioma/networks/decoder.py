"""The expanding half of the U-shaped networks: levels that join skips, and a head for each level that is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.meningioma.networks.blocks import ConvBlock, UpConv, batch_norm, convolution, up_norm


class DecoderLevel(nn.Module):
    """AGUNet's: up-convolution, batch normalisation, ReLU; then a :class:`ConvBlock` on that and the gated skip.

    Args:
        inputs: channels of the level below.
        filters: channels of this level and of its skip.
        gate: what the skip goes through, decided by the up-convolved map where the gate takes a signal; None for none.
        dropout: see :class:`ConvBlock`.
    """

    def __init__(self, inputs: int, filters: int, gate: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = UpConv(inputs, filters)
        self.norm = batch_norm(filters)
        self.gate = gate
        self.block = ConvBlock(2 * filters, filters, dropout)

    def forward(self, x: Tensor, skips: list[Tensor], bottleneck: Tensor) -> Tensor:
        """Map (B, filters, 2 * D, 2 * H, 2 * W) from the level below (B, inputs, D, H, W).

        The last of ``skips`` is this level's and is taken away, so that it is freed before the convolutions.
        """
        x = F.relu(up_norm(x, self.up, self.norm))
        x = torch.cat([x, gated(self.gate, skips.pop(), x)], dim=1)
        return self.block(x)


class Decoder(nn.Module):
    """Levels from the coarsest to the finest, and 1 x 1 x 1 convolutions to the classes.

    Args:
        levels: called with the map below, the skips that are left and the bottleneck.
        filters: channels of each level.
        classes: K.
        deep_supervision: whether every level has a head, or the finest alone.
    """

    def __init__(
        self, levels: Sequence[nn.Module], filters: Sequence[int], classes: int, deep_supervision: bool
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        trained = filters if deep_supervision else filters[-1:]
        self.heads = nn.ModuleList(convolution(channels, classes, kernel=1) for channels in trained)

    def forward(self, bottleneck: Tensor, skips: list[Tensor], finest_only: bool) -> list[Tensor]:
        """Logits, finest first. ``skips``, finest first, is emptied, so that each map is freed after its use."""
        x = bottleneck
        logits: list[Tensor] = []
        first_head = len(self.levels) - len(self.heads)
        for index, level in enumerate(self.levels):
            x = level(x, skips, bottleneck)
            if index == len(self.levels) - 1 or (index >= first_head and not finest_only):
                logits.insert(0, self.heads[index - first_head](x))
        return logits


def gated(gate: nn.Module | None, skip: Tensor, signal: Tensor) -> Tensor:
    """``skip`` through ``gate``, which sees ``signal`` where it takes one."""
    if gate is None:
        return skip
    return gate(skip, signal) if getattr(gate, "takes_signal", False) else gate(skip)
