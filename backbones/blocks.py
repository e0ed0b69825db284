"""The block of the hosts: any mixer of tokens, then an MLP, each in a residual branch."""

from __future__ import annotations

from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from attention.layout import to_channels_first, to_channels_last


class MixerBlock(nn.Module):
    """Pre-norm block around a token mixer: maps (B, H, W, C) to (B, H, W, C), any size.

    ``x + position(x)``, then ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``, the last two with layer scale and drop
    path on the branch.

    Args:
        dim: channels C.
        mixer: (B, H, W, C) to (B, H, W, C).
        mlp_ratio: hidden channels of the MLP, over C.
        position: a 3 x 3 depthwise convolution in front, which tells mixers without positions where a token is.
        layer_scale: initial value of the branches' scales, or None for none.
        drop_path: probability that a sample skips a branch while training.
        drop: dropout in the MLP.

    Source: Yu et al., MetaFormer Is Actually What You Need for Vision, CVPR 2022, arXiv 2111.11418; the positions
    follow Chu et al., Conditional Positional Encodings, ICLR 2023, arXiv 2102.10882.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        position: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if position else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(mlp_ratio * dim), drop=drop)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:
            x = x + to_channels_last(self.position(to_channels_first(x)))
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
