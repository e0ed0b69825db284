"""The blocks of Meta-SpikeFormer: convolutions and attention of spikes, residual in the membranes.

All maps are (T * B, C, H, W), time before batch.

Sources: Yao et al., Spike-driven Transformer V2, ICLR 2024, arXiv:2404.03663; re-parameterised convolutions after Ding
et al., Diverse Branch Block, CVPR 2021, arXiv:2103.13425.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.choices import choose
from backbones.spiking import LIF, normalise

ATTENTION_SCALE = 0.125
"""Of spike-driven attention, whatever the number of channels per head."""
ATTENTION_THRESHOLD = 0.5
"""Of the neurons behind the attention; all others have 1."""


class ConvNorm(nn.Module):
    """A convolution with bias, padded to keep ceil(n / stride), and batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.bn, self.conv(x))


class Downsample(ConvNorm):
    """A 3 x 3 :class:`ConvNorm` of spikes."""

    def __init__(self, inputs: int, outputs: int, stride: int, time_steps: int) -> None:
        super().__init__(inputs, outputs, 3, stride)
        self.lif = LIF(time_steps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lif(x))


class SepConv(nn.Module):
    """Spikes widened twofold by 1 x 1, their spikes convolved depthwise by 7 x 7 and narrowed by 1 x 1."""

    def __init__(self, dim: int, time_steps: int) -> None:
        super().__init__()
        self.lif1 = LIF(time_steps)
        self.pwconv1 = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * dim)
        self.lif2 = LIF(time_steps)
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
        self.pwconv2 = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(self.bn1, self.pwconv1(self.lif1(x)))
        return normalise(self.bn2, self.pwconv2(self.dwconv(self.lif2(x))))


class ConvBlock(nn.Module):
    """A separable convolution to mix pixels and two 3 x 3 ones to mix channels, each residual."""

    def __init__(self, dim: int, time_steps: int) -> None:
        super().__init__()
        self.sep = SepConv(dim, time_steps)
        self.lif1 = LIF(time_steps)
        self.conv1 = nn.Conv2d(dim, 4 * dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * dim)
        self.lif2 = LIF(time_steps)
        self.conv2 = nn.Conv2d(4 * dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sep(x)
        hidden = normalise(self.bn1, self.conv1(self.lif1(x)))
        return x + normalise(self.bn2, self.conv2(self.lif2(hidden)))


class RepConv(nn.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1 convolutions with normalisations, which are one 3 x 3 convolution at inference.

    So that they are, the map is padded for the depthwise convolution with what the 1 x 1 convolution and its
    normalisation, in evaluation mode, make of zeros; no gradient passes through the padding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.dw = nn.Conv2d(dim, dim, 3, groups=dim, bias=False)
        self.conv2 = nn.Conv2d(dim, dim, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(self.bn1, self.conv1(x))
        _, shift = _scale_and_shift(self.bn1)
        border = F.pad(torch.zeros_like(x[:1, :1]), (1, 1, 1, 1), value=1.0)
        x = F.pad(x, (1, 1, 1, 1)) + border * shift.detach()[:, None, None].to(x.dtype)
        return normalise(self.bn, normalise(self.bn2, self.conv2(self.dw(x))))

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """One zero-padded 3 x 3 convolution that computes what this module does in evaluation mode."""
        scale1, shift1 = _scale_and_shift(self.bn1)
        scale2, shift2 = _scale_and_shift(self.bn2)
        scale, shift = _scale_and_shift(self.bn)
        first = scale1[:, None] * self.conv1.weight[:, :, 0, 0]
        depthwise, second = self.dw.weight[:, 0], self.conv2.weight[:, :, 0, 0]
        kernel = torch.einsum("om,mhw,mi->oihw", second, depthwise, first)
        bias = second @ (depthwise.sum((1, 2)) * shift1)
        like = self.conv1.weight
        conv = nn.Conv2d(like.shape[1], like.shape[0], 3, padding=1, device=like.device, dtype=like.dtype)
        conv.weight.copy_((scale * scale2)[:, None, None, None] * kernel)
        assert conv.bias is not None
        conv.bias.copy_(scale * (scale2 * bias + shift2) + shift)
        return conv.train(self.training)


class SpikeAttention(nn.Module):
    """Attention ``q (k^T v)`` of spikes, linear in the number of pixels, between re-parameterised convolutions."""

    def __init__(self, dim: int, num_heads: int, time_steps: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.lif = LIF(time_steps)
        self.q, self.k, self.v, self.proj = (RepConv(dim) for _ in range(4))
        self.lif_q, self.lif_k, self.lif_v = (LIF(time_steps) for _ in range(3))
        self.lif_out = LIF(time_steps, threshold=ATTENTION_THRESHOLD)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = self.lif(x)
        q, k, v = (
            neuron(conv(x)).flatten(2).unflatten(1, (self.num_heads, -1))  # (T * B, heads, C / heads, pixels)
            for neuron, conv in ((self.lif_q, self.q), (self.lif_k, self.k), (self.lif_v, self.v))
        )
        read = (v @ k.transpose(-2, -1)) @ q * ATTENTION_SCALE
        return self.proj(self.lif_out(read.flatten(1, 2).unflatten(2, size)))


class OtherMixer(nn.Module):
    """Spikes through a mixer of the registry and batch normalisation."""

    def __init__(self, dim: int, time_steps: int, mixer: nn.Module) -> None:
        super().__init__()
        self.lif = LIF(time_steps)
        self.mixer = mixer
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.lif(x).permute(0, 2, 3, 1).contiguous())
        return normalise(self.bn, mixed.permute(0, 3, 1, 2))


class SpikeMlp(nn.Module):
    """Two 1 x 1 convolutions of spikes, each with batch normalisation."""

    def __init__(self, dim: int, hidden: int, time_steps: int) -> None:
        super().__init__()
        self.lif1 = LIF(time_steps)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.lif2 = LIF(time_steps)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(self.bn1, self.fc1(self.lif1(x)))
        return normalise(self.bn2, self.fc2(self.lif2(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each residual.

    Args:
        attention: another mixer than spike-driven attention, as :class:`backbones.meta_spikformer.MetaSpikeFormer`
            takes it.
        index: of the block in its stage; grid: (height, width) for which tables of a mixer are built.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        time_steps: int,
        attention: str | Mapping[str, Any] | None,
        index: int,
        grid: Sequence[int],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attn: nn.Module
        if attention is None:
            self.attn = SpikeAttention(dim, num_heads, time_steps)
        else:
            self.attn = OtherMixer(dim, time_steps, _mixer(attention, dim, num_heads, index, grid))
        self.mlp = SpikeMlp(dim, int(dim * mlp_ratio), time_steps)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


def _mixer(chosen: str | Mapping[str, Any], dim: int, num_heads: int, index: int, grid: Sequence[int]) -> nn.Module:
    """The registry's mixer for block ``index`` of a stage, offered what it may need of heads and grid."""
    return choose(chosen, ("mixer",)).build(dim, index, num_heads=num_heads, input_size=tuple(grid))


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``norm`` in evaluation mode as a factor and a summand per channel."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
