"""OverLoCK around its blocks: stem, stages, heads, and the levels that dense tasks take.

Source: Lou and Yu, CVPR 2025, arXiv:2502.20087. Maps are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import checkpoint
from torch import Tensor, nn

from attention.contmix import init_convolution
from attention.contmix_block import ChannelNorm, LayerScale
from backbones.choices import per_stage
from backbones.four_stages import stage_grids
from backbones.overlock_blocks import BaseBlock, ChosenMixer, ContextMixer, FocusBlock
from kernels.errors import InputError


class Stage(nn.Module):
    """Blocks behind a downsampling; whatever they are given beside the map goes to each block."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, *guide: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, *guide) if self.grad_checkpointing else block(x, *guide)
        return x


class FocusDownsample(nn.Module):
    """Tokens and context downsampled by convolutions of their own: (B, C + c, H, W) to (B, C' + c, H', W')."""

    def __init__(self, inputs: int, outputs: int, context_dim: int) -> None:
        super().__init__()
        self.split = (inputs, context_dim)
        self.x_proj = downsampling(inputs, outputs)
        self.h_proj = downsampling(context_dim, context_dim)

    def forward(self, joint: Tensor) -> Tensor:
        """Halve both sides, rounded up."""
        x, context = joint.split(self.split, dim=1)
        return torch.cat((self.x_proj(x), self.h_proj(context)), dim=1)


def stem(inputs: int, outputs: int) -> nn.Sequential:
    """Four convolutions to stride 4."""
    half = outputs // 2
    return nn.Sequential(
        *downsampling(inputs, half),
        nn.GELU(),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.GELU(),
        *downsampling(half, outputs),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


def downsampling(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution of stride 2 and batch normalisation; sizes are halved and rounded up."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs))


class Head(nn.Module):
    """1 x 1 convolution to ``width`` channels, pooling, classifier; without a pooling the map goes through unchanged.

    Args:
        inputs: channels of the map.
        pool_type: as timm's; empty for none, which needs ``num_classes=0``.
    """

    def __init__(self, inputs: int, width: int, num_classes: int, pool_type: str, drop_rate: float) -> None:
        super().__init__()
        self.width = width
        self.conv: nn.Module = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(width)
        self.act: nn.Module = nn.SiLU()
        self.drop = nn.Dropout(drop_rate)
        self.pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """A new classifier, and another pooling if one is given."""
        pool_type = self.pool.pool_type if pool_type is None else pool_type
        if num_classes and not pool_type:
            raise InputError("overlock: global_pool='' leaves nothing to classify; take num_classes=0.")
        self.pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.fc = nn.Linear(self.width * self.pool.feat_mult(), num_classes) if num_classes else nn.Identity()

    def strip(self, width: int) -> None:
        """Leave nothing but the identity, for maps of ``width`` channels."""
        self.width = width
        self.conv = self.norm = self.act = nn.Identity()
        self.reset(0, "")

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, inputs, H, W) to (B, num_classes), or (B, width) before the classifier."""
        if self.pool.is_identity():
            return x
        x = self.drop(self.pool(self.act(self.norm(self.conv(x)))))
        return x if pre_logits else self.fc(x)


class AuxiliaryHead(nn.Module):
    """Logits (B, num_classes) of the overview's map (B, C, H, W)."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, overview: Tensor) -> Tensor:
        """Classify."""
        return self.fc(self.norm(overview).mean((2, 3)))


class DenseLevels(nn.Module):
    """Layer norms behind the levels of the pyramid, for detection also the overview added to the last level.

    No ImageNet checkpoint has these; they are trained with the task.
    """

    def __init__(self, channels: Sequence[int], overview_dim: int | None) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({str(level): ChannelNorm(width) for level, width in enumerate(channels)})
        self.overview: nn.Module | None = None
        if overview_dim is not None:
            self.overview = nn.Sequential(
                ChannelNorm(overview_dim), nn.Conv2d(overview_dim, channels[-1], 1), LayerScale(channels[-1], 1e-5)
            )

    def prune(self, levels: Sequence[int]) -> None:
        """Drop what levels other than ``levels`` need."""
        self.norms = nn.ModuleDict({str(level): self.norms[str(level)] for level in levels})
        if 3 not in levels:
            self.overview = None

    def forward(self, level: int, x: Tensor, overview: Tensor | None) -> Tensor:
        """The map of a level as a dense task takes it; that of a level which was pruned away as it is."""
        if str(level) not in self.norms:
            return x
        x = self.norms[str(level)](x)
        if level == 3 and self.overview is not None:
            x = x + self.overview(overview)
        return x


# ------------------------------------------------------------------------------------------------- the stages, built


def base_stages(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int],
    mlp_ratios: Sequence[float],
    layer_scale: Sequence[float | None],
    rates: Sequence[float],
    merged: bool,
) -> list[Stage]:
    """The base stages and the overview stage, whose blocks have the first of the drop path ``rates``."""
    rest = iter(rates)
    return [
        Stage(
            downsampling(dims[i - 1], dim) if i else nn.Identity(),
            [
                BaseBlock(dim, kernel_sizes[i], mlp_ratios[i], layer_scale[i], next(rest), merged)
                for _ in range(depths[i])
            ],
        )
        for i, dim in enumerate(dims)
    ]


def focus_mixers(
    attention: Any,
    depths: Sequence[int],
    dims: Sequence[int],
    context_dim: int,
    num_heads: Sequence[int],
    kernel_sizes: Sequence[int],
    smk_size: int,
    img_size: int | Sequence[int],
) -> list[list[nn.Module]]:
    """The mixer of each block of the two focus stages.

    Raises:
        InputError: the choice is not one of mixers, or a size is not possible.
    """
    chosen = [None, None] if attention is None else per_stage(attention, 2, "mixer", "the focus of this backbone")

    grids = stage_grids(img_size, (16, 32))

    def build(stage: int, index: int) -> nn.Module:
        choice, dim, heads = chosen[stage], dims[stage], num_heads[stage]
        if choice is None:
            return ContextMixer(dim, context_dim, heads, kernel_sizes[stage], smk_size)
        return ChosenMixer(dim, choice.build(dim, index, num_heads=heads, input_size=grids[stage]))

    return [[build(stage, index) for index in range(depth)] for stage, depth in enumerate(depths)]


def focus_stages(
    mixers: Sequence[Sequence[nn.Module]],
    dims: Sequence[int],
    context_dim: int,
    kernel_sizes: Sequence[int],
    mlp_ratios: Sequence[float],
    layer_scale: Sequence[float | None],
    rates: Sequence[float],
    merged: bool,
) -> list[Stage]:
    """The focus stages around the ``mixers`` of their blocks."""
    rest = iter(rates)
    return [
        Stage(
            FocusDownsample(dims[i - 1], dim, context_dim) if i else nn.Identity(),
            [
                FocusBlock(
                    dim,
                    context_dim,
                    mixer,
                    kernel_sizes[i],
                    mlp_ratios[i],
                    layer_scale[i],
                    next(rest),
                    first=i == index == 0,
                    merged=merged,
                )
                for index, mixer in enumerate(mixers[i])
            ],
        )
        for i, dim in enumerate(dims)
    ]


def initialise(model: nn.Module) -> None:
    """Weights of deviation 0.02 in convolutions and classifiers; chosen mixers bring their own."""
    if isinstance(model, ChosenMixer):
        return
    init_convolution(model)
    if isinstance(model, nn.Linear):
        nn.init.trunc_normal_(model.weight, std=0.02)
        nn.init.zeros_(model.bias)
    for part in model.children():
        initialise(part)


def check_lengths(length: int, **lists: Sequence[float]) -> None:
    """Raise an InputError for a list of another length, or with an entry that is not positive."""
    for name, values in lists.items():
        if len(values) != length or min(values) <= 0:
            raise InputError(f"overlock: {name}={list(values)} needs {length} positive entries, one per stage.")
