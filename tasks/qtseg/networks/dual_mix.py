"""QTSeg's dual-mix attention: class tokens read a map weighted by place and one weighted by channel, and write back.

Source: Tran et al., QTSeg, arXiv 2412.17241. Its attention between tokens and maps is that of Segment Anything
(:mod:`attention.query_readout`), its channel attention that of DANet (:mod:`attention.dual_position_channel`), its
weights by place those of Woo et al., CBAM, ECCV 2018, arXiv 1807.06521, beside the map itself. No attention between
tokens exists anywhere. Maps are kept with channels last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention
from attention.dual_position_channel import ChannelAttention


class SpatialWeights(nn.Module):
    """A map plus itself weighted by place: the mean and the maximum over channels decide, through one convolution.

    Args:
        kernel: side of the convolution, odd.
    """

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, H, W, C)."""
        statistics = torch.stack([x.mean(-1), x.amax(-1)], dim=1)
        return x * (1 + self.conv(statistics).sigmoid())[:, 0, :, :, None]


class DualMixLayer(nn.Module):
    """One layer: tokens read both weighted maps and go through an MLP, then the map reads the tokens.

    Args:
        dim: channels.
        num_heads: heads of each attention, of half the channels in all.
        mlp_dim: inner width of the tokens' MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.by_place = SpatialWeights()
        self.by_channel = ChannelAttention()
        self.read_places = readout(dim, num_heads)
        self.read_channels = readout(dim, num_heads)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, mlp_dim)
        self.reduce = nn.Linear(mlp_dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.write = readout(dim, num_heads)

    def forward(self, tokens: Tensor, features: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, C) and features (B, H, W, C), both changed; ``position`` is (B or 1, H, W, C)."""
        grid = features.shape[1:3]
        x = features + position
        of_places = self.by_place(x).flatten(1, 2)
        x = x.flatten(1, 2)
        weights = self.by_channel.weights(x.mT)
        of_channels = x + self.by_channel.gamma * (x @ weights.mT)
        read = self.read_places(tokens, of_places) + self.read_channels(tokens, of_channels)
        mixed = self.norm(read + tokens)
        tokens = self.mlp_norm(self.reduce(F.gelu(self.expand(mixed)))) + tokens
        asking = of_places + of_channels + position.flatten(1, 2)
        return tokens, features + self.write(asking, mixed).unflatten(1, grid)


class DualMixBlock(nn.Module):
    """Several layers, after which the tokens read the map once more.

    Args:
        dim: channels.
        depth: layers.
        num_heads, mlp_dim: of each layer.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DualMixLayer(dim, num_heads, mlp_dim) for _ in range(depth))
        self.read = readout(dim, num_heads, norm="post", residual=True)

    def forward(self, tokens: Tensor, features: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, C) and features (B, H, W, C), both changed; ``position`` is (B or 1, H, W, C)."""
        first = tokens
        for layer in self.layers:
            tokens, features = layer(tokens, features, position)
        return self.read(tokens, features.flatten(1, 2), q_pos=first, kv_pos=position.flatten(1, 2)), features


def readout(dim: int, num_heads: int, norm: str | None = None, residual: bool = False) -> nn.Module:
    """Attention between tokens and a map."""
    return attention.create("query_readout", dim=dim, num_heads=num_heads, norm=norm, residual=residual)
