"""L2ViT: windows and enhanced linear attention in turn, in the layout of Swin.

Zheng: The Linear Attention Resurrection in Vision Transformer, arXiv:2501.16182, 2025. The authors' code is under the
MIT licence; it names none for its weights.

| name | depths | widths | heads | parameters | FLOPs | ImageNet top-1 (%) |
|---|---|---|---|---|---|---|
| l2vit_tiny | 2, 2, 6, 2 | 96, 192, 384, 768 | 3, 6, 12, 24 | 29 M | 4.7 G | 83.1 |
| l2vit_small | 2, 2, 18, 2 | 96, 192, 384, 768 | 3, 6, 12, 24 | 50 M | 9.0 G | 84.1 |
| l2vit_base | 2, 2, 18, 2 | 128, 256, 512, 1024 | 4, 8, 16, 32 | 89 M | 15.9 G | 84.4; from 22k classes 86.0 |
| l2vit_base_384 | 2, 2, 18, 2 | 128, 256, 512, 1024 | 4, 8, 16, 32 | 89 M | 47.5 G | 87.0, from 22k classes |

The numbers are the authors', at 224 pixels but for the last, whose windows have a side of 12 instead of 7.

Even blocks of a stage attend within windows, unshifted and without position bias, between two convolutional position
encodings; odd ones attend linearly to the whole map and then gather from the neighbourhood by the local concentration
module. Where windows stick out of a map they see zeros there, as in the released code, unmasked. Stem: two 3 x 3
convolutions of stride 2, each with batch norm, ReLU between them, and a layer norm. Downsampling: a layer norm and a
2 x 2 convolution of stride 2, maps extended with zeros where they are odd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.dual_window_channel import DualBlock
from attention.linear_l2 import GlobalBlock
from backbones.four_stages import (
    PadToMultiple,
    Size,
    StagedNetwork,
    build,
    check_stages,
    chosen_mixers,
    describe,
    drop_path_rates,
    stage_grids,
    taking_masks,
)
from backbones.stages import Stage
from backbones.weights import rename_within, unwrapped

__all__ = ["L2ViT", "checkpoint_filter_fn"]


class L2ViT(StagedNetwork):
    """Linear global and local window attention; see :class:`backbones.four_stages.StagedNetwork`.

    Args:
        attention: a mixer in the place of windows and linear attention of every stage, or a list with one per stage,
            where None leaves the paper's own. Position encodings and local concentration stay.
        depths, dims, num_heads: blocks, channels and heads of each stage.
        window_size: side of the windows.
        floor: what the linear attention's normaliser is kept above.
        mlp_ratio: hidden channels of the MLPs, over the stage's.
        img_size: image size, one number or (height, width), for which tables of chosen mixers are built.

    Raises:
        InputError: a choice, a list's length or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        attention: Any = None,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        floor: float = 100.0,
        mlp_ratio: float = 4.0,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages("l2vit", depths=depths, dims=dims, num_heads=num_heads)
        choices = chosen_mixers(attention, len(dims))
        grids = stage_grids(img_size, [4 * 2**i for i in range(len(dims))])
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            blocks = []
            for index in range(depth):
                rate = rates[i][index]
                block: DualBlock | GlobalBlock
                if index % 2:
                    block = GlobalBlock(dim, heads, mlp_ratio, floor=floor, drop_path=rate)
                else:
                    block = DualBlock(dim, heads, "window", window_size, mlp_ratio=mlp_ratio, drop_path=rate)
                block.apply(_initialise)
                choice = choices[i]
                if choice is not None:
                    mixer = choice.build(dim, index, num_heads=heads, input_size=grids[i])
                    block.attn = taking_masks(mixer)  # type: ignore[assignment]
                blocks.append(block)
            stages.append(Stage(nn.Identity() if i == 0 else Downsample(dims[i - 1], dim), blocks, None))
        super().__init__(
            ConvStem(in_chans, dims[0]),
            stages,
            LayerNorm2d(dims[-1], eps=1e-5),
            dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.stem.apply(_initialise)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)


class ConvStem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2 with batch norm, and a layer norm: (B, inputs, H, W) to (B, C, H/4, W/4).

    Images are extended with zeros to multiples of 4.
    """

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        half = max(dim // 2, 1)
        self.pad = PadToMultiple(4)
        self.conv1 = nn.Conv2d(inputs, half, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(half)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(half, dim, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm = LayerNorm2d(dim, eps=1e-5)


class Downsample(nn.Sequential):
    """A layer norm and a 2 x 2 convolution of stride 2: (B, C, H, W) to (B, C', H/2, W/2), rounded up."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(inputs, eps=1e-5)
        self.pad = PadToMultiple(2)
        self.conv = nn.Conv2d(inputs, outputs, 2, stride=2)
        _initialise(self.conv)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Released names of layers outside the blocks, and ours.
_RENAMED = (
    (r"^downsample_layers\.0\.proj\.proj\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.proj\.proj\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.proj\.proj\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.proj\.proj\.4\.", "stem.norm2."),
    (r"^downsample_layers\.0\.norm\.", "stem.norm."),
    (r"^downsample_layers\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint, from the released names to ours; ours pass through unchanged.

    The norms ``norm0`` to ``norm3`` that the released code for dense prediction puts behind each stage are left out.
    """
    plain = unwrapped(state)
    if not any(key.startswith("downsample_layers.") for key in plain):
        return plain
    renamed = {}
    for key, value in plain.items():
        if re.match(r"norm\d\.", key):
            continue
        for official, ours in _RENAMED:
            key = re.sub(official, ours, key)
        renamed[key] = value
    for name, block in model.named_modules():
        if isinstance(block, DualBlock):
            renamed = rename_within(renamed, f"{name}.", block.checkpoint_filter)
    return renamed


_SMALL = {"depths": (2, 2, 18, 2)}
_BASE = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
VARIANTS: dict[str, dict[str, Any]] = {
    "l2vit_tiny": {},
    "l2vit_small": _SMALL,
    "l2vit_base": _BASE,
    "l2vit_base_384": _BASE | {"window_size": 12, "img_size": 384},
}

_SOURCE = {"paper_ids": "arXiv:2501.16182", "origin_url": "https://github.com/ChuanyangZheng/L2ViT"}
_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {name: describe("stem.conv1", "mit", **_SOURCE, **(_AT_384 if name.endswith("384") else {})) for name in VARIANTS}
)


def _build(variant: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build(L2ViT, variant, pretrained, checkpoint_filter_fn, VARIANTS[variant], given)


@register_model
def l2vit_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """L2ViT-T."""
    return _build("l2vit_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def l2vit_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """L2ViT-S."""
    return _build("l2vit_small", pretrained, {"attention": attention, **kwargs})


@register_model
def l2vit_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """L2ViT-B; published with a drop path rate of 0.3."""
    return _build("l2vit_base", pretrained, {"attention": attention, **kwargs})


@register_model
def l2vit_base_384(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """L2ViT-B for 384 pixels, with windows of 12; published with a drop path rate of 0.2."""
    return _build("l2vit_base_384", pretrained, {"attention": attention, **kwargs})
