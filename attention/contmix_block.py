"""The ContMix block: local convolution, context mixing, local convolution, feed-forward with response normalisation.

Source: Lou and Yu, OverLoCK, CVPR 2025 (oral), arXiv 2502.20087; global response normalisation: Woo et al., ConvNeXt
V2, CVPR 2023, arXiv 2301.00808. Parameters outside the mixer are named as in the released code. How the depth of a
network drops paths is the network's affair: ``drop_path`` is this block's own rate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.contmix import ContMix, init_convolution
from attention.conv_norm import wide
from attention.layout import to_channels_first, to_channels_last
from kernels.errors import InputError


class ContMixBlock(nn.Module):
    """ContMix block on maps (B, C, H, W) of any size.

    Args:
        dim: channels C.
        num_heads: of the mixer.
        mlp_ratio: hidden width of the feed-forward part over C.
        res_scale: whether layer scales apply to the identity paths, and not to the branches.
        ls_init_value: start of the layer scales; there are none when left out.
        drop_path: chance with which an item's branch is left out while training.
        mixer_params: further parameters of :class:`attention.contmix.ContMix`.

    Raises:
        InputError: a parameter is not possible.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        **mixer_params: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise InputError(f"ContMix block: mlp_ratio={mlp_ratio} leaves no hidden channel of dim={dim}.")
        if not 0 <= drop_path < 1:
            raise InputError(f"ContMix block: drop_path={drop_path} must be at least 0 and less than 1.")
        self.res_scale = res_scale
        self.drop_path = drop_path
        self.dwconv1 = ResidualDepthwise(dim)
        self.norm1 = ChannelNorm(dim)
        self.mixer = ContMix(dim, num_heads, **mixer_params)
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.dwconv2 = ResidualDepthwise(dim)
        self.norm2 = ChannelNorm(dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            ResidualDepthwise(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, dim, 1),
        )
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.apply(init_convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, H, W)."""
        x = self.dwconv1(x)
        x = self._add(x, to_channels_first(self.mixer(to_channels_last(self.norm1(x)))), self.ls1)
        x = self.dwconv2(x)
        return self._add(x, self.mlp(self.norm2(x)), self.ls2)

    def _add(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        if self.res_scale:
            return scale(x) + self._dropped(branch)
        return x + self._dropped(scale(branch))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state with the mixer's part under its name."""
        inside = ContMix.checkpoint_filter(state).keys()
        return {f"mixer.{key}" if key in inside else key: value for key, value in state.items()}


class ResidualDepthwise(nn.Conv2d):
    """Depthwise 3 x 3 convolution with bias, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, H, W)."""
        return x + super().forward(x)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every token."""
        return to_channels_first(super().forward(to_channels_last(x)))


class GlobalResponseNorm(nn.Module):
    """Channels of (B, C, H, W) weighted by their norm over the map relative to the other channels'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        norms = torch.linalg.vector_norm(wide(x), dim=(2, 3), keepdim=True)
        relative = norms / (norms.mean(1, keepdim=True) + 1e-6)
        return (self.gamma * relative.to(x.dtype) + 1) * x + self.beta


class LayerScale(nn.Module):
    """A factor and a shift for each channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(start)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, H, W)."""
        return F.conv2d(x, self.weight, self.bias, groups=x.shape[1])
