"""Maps of the strides and widths that a decoder wants, out of whatever an encoder gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.cross_stage import ConvUnit
from kernels.errors import InputError

Stride = int | float


def nearest_levels(strides: Sequence[Stride], wanted: Sequence[int]) -> list[int]:
    """For each stride wanted, the index of the map nearest to it, of maps of one stride the deepest.

    Where several wanted strides are nearest to the same maps, as in vision transformers whose maps all have one stride,
    they are given maps of growing depth, evenly spaced.

    Args:
        strides: of the encoder's maps, in the order of depth.
        wanted: ascending.
    """
    nearest = [min(strides, key=lambda s: (abs(math.log2(s / want)), s)) for want in wanted]
    found = []
    for i, stride in enumerate(nearest):
        same = [k for k, s in enumerate(strides) if s == stride]
        share, place = nearest.count(stride), nearest[:i].count(stride)
        found.append(same[math.ceil((place + 1) * len(same) / share) - 1])
    return found


class Levels(nn.Module):
    """Maps of an encoder at the strides and with the channels wanted.

    A map that has both already is passed on as it is. Another is projected by a normalised 1 x 1 convolution and, where
    its stride differs, resized: averaged where it has more cells, interpolated where it has fewer.

    Args:
        channels, strides: of the encoder's maps, in the order of depth.
        wanted: strides, ascending.
        widths: channels for each of them.

    Raises:
        InputError: the encoder gives no maps.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[Stride], wanted: Sequence[int], widths: Sequence[int]
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(strides):
            raise InputError(f"an encoder with maps is needed; this one has channels={channels}, strides={strides}.")
        self.wanted = tuple(wanted)
        self.sources = tuple(nearest_levels(strides, wanted))
        self.strides = tuple(strides[i] for i in self.sources)
        self.projections = nn.ModuleList(
            nn.Identity() if channels[i] == width and strides[i] == want else ConvUnit(channels[i], width)
            for i, want, width in zip(self.sources, wanted, widths, strict=True)
        )

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Maps (B, width, ceil(H / stride), ceil(W / stride)) for an image of ``size`` (H, W), finest first."""
        found = []
        for source, want, stride, projection in zip(
            self.sources, self.wanted, self.strides, self.projections, strict=True
        ):
            x = projection(maps[source])
            found.append(x if want == stride else resized(x, [-(-n // want) for n in size]))
        return found


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, H, W) at ``size``: averaged over whole cells where that divides, else interpolated bilinearly."""
    ratio = [round(n / wanted) for n, wanted in zip(x.shape[2:], size, strict=True)]
    exact = [-(-n // r) == wanted if r else False for n, r, wanted in zip(x.shape[2:], ratio, size, strict=True)]
    if all(exact) and max(ratio) > 1:
        return F.avg_pool2d(x, ratio, ceil_mode=True)
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)
