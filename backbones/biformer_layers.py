"""What BiFormer is built of: stems, downsampling, the MLP with a convolution, and the mixer of each stage.

Stems and downsampling normalise by batch. Maps (B, C, H, W) become ceil(H / stride) x ceil(W / stride), whatever their
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers.mlp import Mlp
from torch import Tensor, nn

from attention.bi_level_routing import BiLevelRoutingAttention
from attention.layout import to_channels_first, to_channels_last
from backbones.choices import Choice, per_stage
from backbones.four_stages import padded

DENSE_HEADS = 8  # of full attention, whatever its width


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each normalised, with a GELU between them: stride 4."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = max(outputs // 2, 1)
        self.conv1 = nn.Conv2d(inputs, half, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(half)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, outputs, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution, normalised: stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PatchStem(nn.Module):
    """A linear projection of patches of 4 x 4 pixels, normalised: stride 4."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, stride=4)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(padded(x, 4)))


class PatchDownsample(nn.Module):
    """A norm, and a linear projection of patches of 2 x 2 tokens: stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(padded(self.norm(x), 2))


class ConvMlp(Mlp):
    """timm's MLP on maps (B, H, W, C) with a 3 x 3 depthwise convolution of the hidden channels before the GELU."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__(dim, hidden_dim, drop=drop)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = to_channels_last(self.conv(to_channels_first(self.fc1(x))))
        return self.drop2(self.fc2(self.drop1(self.act(hidden))))


def stage_mixers(
    attention: Any, regions: Sequence[Any], topk: Sequence[int | None], form: str, padding: str
) -> list[Choice]:
    """The mixer of each stage; see :class:`backbones.biformer.BiFormer` for the arguments.

    Raises:
        InputError: the choice is not possible, or a list has another length than ``topk``.
    """
    chosen = [None] * len(topk) if attention is None else per_stage(attention, len(topk), "mixer", "this backbone")
    found = []
    for side, count, choice in zip(regions, topk, chosen, strict=True):
        if choice is not None and choice.cls is not BiLevelRoutingAttention:
            found.append(choice)
            continue
        params: dict[str, Any] = {"regions": side, "form": form, "padding": padding, "dense": count is None}
        params |= {"topk": 1 if count is None else count} | ({} if choice is None else choice.params)
        if params["dense"]:
            params = {"num_heads": DENSE_HEADS, "qkv_bias": False} | params
        found.append(Choice("bi_level_routing", BiLevelRoutingAttention, params))
    return found
