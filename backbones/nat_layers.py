"""What NAT, DiNAT and their isotropic forms are made of: block, stems, downsampling.

Parameter names within each are those of the released weights, so far as they have a place there. Maps are
(B, C, H, W) between stages and (B, H, W, C) within them.
"""

from __future__ import annotations

from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from attention.layout import to_channels_first, to_channels_last
from backbones.four_stages import padded

EPS = 1e-5


class Block(nn.Module):
    """``x + scale * attention(norm(x))``, then ``x + scale * mlp(norm(x))``, on maps (B, H, W, C).

    Args:
        dim: channels C.
        attention: any mixer of such maps.
        mlp_ratio: hidden channels of the MLP, over C.
        layer_scale: initial value of the scales, None for none.
        drop: dropout in the MLP.
        drop_path: probability that a sample skips a branch while training.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attention
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, round(mlp_ratio * dim), drop=drop)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with nothing between them: (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = max(dim // 2, 1)
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, stride=2, padding=1), nn.Conv2d(half, dim, 3, stride=2, padding=1)
        )
        self.norm = LayerNorm2d(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class PatchStem(nn.Module):
    """One token for each patch: (B, C, ceil(H / patch), ceil(W / patch)), zeros at the bottom and the right."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = LayerNorm2d(dim, eps=EPS)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(padded(x, self.patch)))


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution of stride 2: (B, C, H, W) to (B, 2 C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm2d(2 * dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class PatchMerging(nn.Module):
    """2 x 2 tokens made one, zeros below and right: (B, C, H, W) to (B, 2 C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(padded(x, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # (B, H / 2, row, W / 2, column, C): the tokens of a column come one after the other.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return to_channels_first(self.reduction(self.norm(x)))
