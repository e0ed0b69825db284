"""Swin with global attention of linear cost in its early stages: Agent-Swin and InLine-Swin.

Han, Ye, Han, Xia, Pan, Wan, Song, Huang: Agent Attention: On the Integration of Softmax and Linear Attention, ECCV
2024, arXiv:2312.08874. Han, Pu, Xia, Han, Pan, Li, Lu, Song, Huang: Bridging the Divide: Reconsidering Softmax and
Linear Attention (InLine), NeurIPS 2024, arXiv:2412.06590. The layout is that of Liu et al., Swin Transformer, ICCV
2021, arXiv:2103.14030. The authors' codes name no licence, and none for the weights: nothing of either is here.

| name | depths | width | global blocks per stage | parameters | FLOPs | ImageNet top-1 (%) |
|---|---|---|---|---|---|---|
| agent_swin_tiny | 2, 2, 6, 2 | 96 | 2, 2, 6, 0 | 29 M | 4.5 G | 82.6 |
| agent_swin_small | 2, 2, 18, 2 | 96 | 2, 2, 0, 0 | 50 M | 8.7 G | 83.7 |
| agent_swin_base | 2, 2, 18, 2 | 128 | 2, 2, 2, 0 | 88 M | 15.4 G | 84.0 |
| inline_swin_tiny | 2, 2, 6, 2 | 96 | 2, 2, 6, 0 | 30 M | 4.5 G | 82.4 |
| inline_swin_small | 2, 2, 18, 2 | 96 | 2, 2, 0, 0 | 50 M | 8.7 G | 83.6 |
| inline_swin_base | 2, 2, 18, 2 | 128 | 2, 2, 2, 0 | 88 M | 15.4 G | 84.1 |

Numbers are the authors', at 224 pixels; of inline_swin_tiny 29.2 million parameters are counted here. Global blocks
attend over the whole map, with 9, 16, 49 and 49 agents in the four stages; the others are Swin's, with windows of 7,
shifted in every other block. Which stages are global is published; that a stage of the base variants is so in its first
two blocks is published for agents and taken over for InLine. Maps of any size are taken where the published code needs
a square of the trained size: agents' bias tables are resized, images and odd maps are extended with zeros at the bottom
and the right, and what windows stick out of a map is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.agent import AgentAttention
from attention.inline import InLineAttention
from attention.layout import to_channels_first, to_channels_last
from backbones.choices import choose
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
)
from backbones.stages import Stage
from backbones.weights import rename_within, unwrapped, with_tables_resized
from kernels.errors import InputError, unknown_name

__all__ = ["GlobalSwin", "checkpoint_filter_fn"]

MIXERS = ("agent", "inline")


class GlobalSwin(StagedNetwork):
    """Swin with agent or InLine attention; see :class:`backbones.four_stages.StagedNetwork`.

    Args:
        mixer: of the global blocks, ``"agent"`` or ``"inline"``.
        global_blocks: how many of the first blocks of each stage are global.
        attention: a mixer in the place of both kinds of every stage, or a list with one per stage, where None leaves
            the paper's own.
        depths, dims, num_heads: blocks, channels and heads of each stage.
        agents: their number in each stage, square numbers; of no account for InLine.
        window_size: side of the windows of the blocks that are not global.
        mlp_ratio: hidden channels of the MLPs, over the stage's.
        img_size: image size, one number or (height, width), for which bias tables are built.

    Raises:
        InputError: a choice, a list's length or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        mixer: str = "agent",
        global_blocks: Sequence[int] = (2, 2, 6, 0),
        attention: Any = None,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agents: Sequence[int] = (9, 16, 49, 49),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages("swin", depths=depths, dims=dims, num_heads=num_heads, agents=agents)
        if mixer not in MIXERS:
            raise unknown_name("swin: mixer", mixer, MIXERS)
        if len(global_blocks) != len(dims):
            raise InputError(f"swin: global_blocks={list(global_blocks)} must have one entry for each stage.")
        choices = chosen_mixers(attention, len(dims))
        grids = stage_grids(img_size, [4 * 2**i for i in range(len(dims))])
        rates = drop_path_rates(drop_path_rate, depths)
        window = choose({"name": "window", "window_size": window_size})
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            over_all = choose({"name": "agent", "agents": agents[i]} if mixer == "agent" else "inline")
            blocks = []
            for index in range(depth):
                choice = choices[i] or (over_all if index < global_blocks[i] else window)
                attn = choice.build(dim, index, num_heads=heads, input_size=grids[i])
                blocks.append(Block(dim, attn, mlp_ratio, rates[i][index]))
            stages.append(Stage(nn.Identity() if i == 0 else Merge(dims[i - 1], dim), blocks, None))
        super().__init__(
            Patches(in_chans, dims[0]),
            stages,
            LayerNorm2d(dims[-1], eps=1e-5),
            dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)


class Block(nn.Module):
    """Pre-norm block of maps (B, H, W, C): ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Patches(nn.Sequential):
    """Patches of 4 x 4 pixels, projected and normalised: (B, inputs, H, W) to (B, C, H/4, W/4), rounded up."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.pad = PadToMultiple(4)
        self.proj = nn.Conv2d(inputs, dim, 4, stride=4)
        self.norm = LayerNorm2d(dim, eps=1e-5)


class Merge(nn.Module):
    """The four tokens of each 2 x 2 cell, normalised and projected: (B, C, H, W) to (B, C', H/2, W/2), rounded up."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pad = PadToMultiple(2)
        self.norm = nn.LayerNorm(4 * inputs)
        self.reduction = nn.Linear(4 * inputs, outputs, bias=False)
        _initialise(self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        cells = to_channels_last(self.pad(x)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # (B, H/2, rows, W/2, columns, C): Swin lists a cell column by column.
        cells = cells.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return to_channels_first(self.reduction(self.norm(cells)))


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# Names of Swin's layers outside the blocks, and ours; downsampling ends a stage there and begins the next here.
_RENAMED = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint, from the released names to ours; ours pass through unchanged.

    Bias tables of another size of image or window are resized. What follows from sizes alone is left out, and so are
    the norms ``norm0`` to ``norm3`` of networks for dense prediction.
    """
    plain = unwrapped(state)
    if not any(key.startswith("patch_embed.") for key in plain):
        return with_tables_resized(plain, model)
    renamed = {}
    for key, value in plain.items():
        if re.match(r"norm\d\.", key) or key.endswith(("relative_position_index", "attn_mask")):
            continue
        for official, ours in _RENAMED:
            key = re.sub(official, ours, key)
        below = re.match(r"layers\.(\d+)\.(downsample\..*)", key)
        if below is not None:
            key = f"stages.{int(below[1]) + 1}.{below[2]}"
        renamed[key] = value
    for name, module in model.named_modules():
        if isinstance(module, (AgentAttention, InLineAttention)):
            renamed = rename_within(renamed, f"{name}.", module.checkpoint_filter)
    return with_tables_resized(renamed, model)


_DEEP: dict[str, Any] = {"depths": (2, 2, 18, 2), "global_blocks": (2, 2, 0, 0)}
_WIDE: dict[str, Any] = {
    "depths": (2, 2, 18, 2),
    "global_blocks": (2, 2, 2, 0),
    "dims": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{mixer}_swin_{size}": {"mixer": mixer, **shape}
    for mixer in MIXERS
    for size, shape in (("tiny", {}), ("small", _DEEP), ("base", _WIDE))
}

_SOURCES = {
    "agent": {"paper_ids": "arXiv:2312.08874", "origin_url": "https://github.com/LeapLabTHU/Agent-Attention"},
    "inline": {"paper_ids": "arXiv:2412.06590", "origin_url": "https://github.com/LeapLabTHU/InLine"},
}
default_cfgs = generate_default_cfgs(
    {name: describe("stem.proj", "unknown", **_SOURCES[name.partition("_")[0]]) for name in VARIANTS}
)


def _build(variant: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build(GlobalSwin, variant, pretrained, checkpoint_filter_fn, VARIANTS[variant], given)


@register_model
def agent_swin_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Agent-Swin-T; published with a drop path rate of 0.2."""
    return _build("agent_swin_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def agent_swin_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Agent-Swin-S; published with a drop path rate of 0.3."""
    return _build("agent_swin_small", pretrained, {"attention": attention, **kwargs})


@register_model
def agent_swin_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Agent-Swin-B; published with a drop path rate of 0.5."""
    return _build("agent_swin_base", pretrained, {"attention": attention, **kwargs})


@register_model
def inline_swin_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """InLine-Swin-T."""
    return _build("inline_swin_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def inline_swin_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """InLine-Swin-S."""
    return _build("inline_swin_small", pretrained, {"attention": attention, **kwargs})


@register_model
def inline_swin_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """InLine-Swin-B."""
    return _build("inline_swin_base", pretrained, {"attention": attention, **kwargs})
