"""BiFormer: every region of the map attends to the few regions that are most like it, in a pyramid of four stages.

Zhu, Wang, Ke, Zhang, Lau: BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv:2303.08810.
The authors' code and weights are under the MIT licence.

| name | depths | widths | parameters | FLOPs | ImageNet-1k top-1 (%) |
|---|---|---|---|---|---|
| biformer_tiny | 2, 2, 8, 2 | 64, 128, 256, 512 | 13.14 M | 2.2 G | 81.4 |
| biformer_small | 4, 4, 18, 4 | 64, 128, 256, 512 | 25.54 M | 4.5 G | 83.8 |
| biformer_base | 4, 4, 18, 4 | 96, 192, 384, 768 | 56.80 M | 9.8 G | 84.3 |
| biformer_stl, biformer_stl_nchw | 2, 2, 6, 2 | 96, 192, 384, 768 | 28.37 M | 4.6 G | 82.7 |

STL is the layout of Swin-T: patches instead of overlapping convolutions, no convolution before the attention. Its
``nchw`` model has the attention's refactored form (see :mod:`attention.bi_level_routing`); the others the legacy one.

No parameter depends on ``regions`` and ``topk``. The authors' detectors take weights trained with 7 regions a side with
16 of them, their segmenters with 8, put a norm behind each level, and let zeros beyond the map be seen:

>>> backbones.create("biformer_small", features_only=True, regions=16, level_norms=True, padding="released")

Knowing deviations: maps that the regions do not divide are taken, and what sticks out is not seen, where the released
classifiers refuse them and the released dense networks see zeros (``padding="released"``). Images that the patches of
STL do not divide get zeros below and to the right. Norms after the branches (an option of the released code that no
released model takes) are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from attention.bi_level_routing import BiLevelRoutingAttention
from backbones.biformer_layers import (
    ConvDownsample,
    ConvMlp,
    ConvStem,
    PatchDownsample,
    PatchStem,
    stage_mixers,
)
from backbones.biformer_names import checkpoint_filter_fn
from backbones.blocks import MixerBlock
from backbones.four_stages import (
    Size,
    StagedNetwork,
    build,
    describe,
    drop_path_rates,
    heads_of,
    position_tables,
    stage_grids,
)
from backbones.stages import Stage
from kernels.errors import InputError, unknown_name

__all__ = ["BiFormer", "checkpoint_filter_fn"]

LAYOUTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "convolutions": (ConvStem, ConvDownsample),
    "patches": (PatchStem, PatchDownsample),
}


class BiFormer(StagedNetwork):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes).

    ``forward_features`` gives the last map (B, C, ceil(H / 32), ceil(W / 32)), normalised.

    Args:
        depths, dims: blocks and channels of each stage.
        regions: regions along each axis that a map is divided into, one number or one per stage.
        topk: regions that each is routed to, one entry per stage; None for full attention.
        form, padding: of the attention; see :class:`attention.bi_level_routing.BiLevelRoutingAttention`.
        attention: another mixer: a name, a mapping of ``name`` and parameters, a dotted path, or a list of these with
            one entry per stage, where None stands for the stage's own. Parameters of a mapping with the name
            ``bi_level_routing`` are added to those of the stage's own.
        head_dim: channels per head; the paper's full attention has 8 heads instead.
        layout: ``"convolutions"`` or ``"patches"``, which stem and downsampling consist of.
        mlp_ratio: hidden channels of the MLPs, over those of the stage, one number or one per stage.
        position, layer_scale: see :class:`backbones.blocks.MixerBlock`.
        mlp_conv: put a 3 x 3 depthwise convolution into the MLPs, before the activation.
        level_norms: put a layer norm behind each feature map, in no way to the next stage or the classifier.
        img_size: image size, one number or (height, width), for which tables of other mixers are built that depend on
            it; other sizes can be given all the same.
        global_pool: ``"avg"``, ``"max"``, or empty for none.

    Raises:
        InputError: a choice, a list's length or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        regions: int | Sequence[Any] = 7,
        topk: Sequence[int | None] = (1, 4, 16, None),
        form: str = "legacy",
        padding: str = "hide",
        attention: Any = None,
        head_dim: int = 32,
        mlp_ratio: float | Sequence[float] = 3.0,
        layout: str = "convolutions",
        position: bool = True,
        mlp_conv: bool = False,
        layer_scale: float | None = None,
        level_norms: bool = False,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        depths, dims = tuple(depths), tuple(dims)
        _check(depths, dims, topk, layout)
        mixers = stage_mixers(attention, _each("regions", regions, len(dims)), topk, form, padding)
        ratios = _each("mlp_ratio", mlp_ratio, len(dims))
        grids = stage_grids(img_size, [4 * 2**i for i in range(len(dims))])
        rates = drop_path_rates(drop_path_rate, depths)
        make_stem, downsample = LAYOUTS[layout]
        stem = make_stem(in_chans, dims[0])
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            heads = heads_of("biformer", dim, head_dim, mixers[i])
            blocks = []
            for index in range(depth):
                block = MixerBlock(
                    dim,
                    mixers[i].build(dim, index, num_heads=heads, input_size=grids[i]),
                    mlp_ratio=ratios[i],
                    position=position,
                    layer_scale=layer_scale,
                    drop_path=rates[i][index],
                    drop=proj_drop_rate,
                )
                if mlp_conv:
                    block.mlp = ConvMlp(dim, round(ratios[i] * dim), proj_drop_rate)
                blocks.append(block)
            stages.append(Stage(downsample(dims[i - 1], dim) if i else nn.Identity(), blocks, None))
        super().__init__(
            stem,
            stages,
            nn.BatchNorm2d(dims[-1]),
            dims,
            level_norms=[LayerNorm2d(dim, eps=1e-6) for dim in dims] if level_norms else (),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def initialise(self) -> None:
        """Truncated normal weights of deviation 0.02 in linear layers; other mixers bring their own."""
        owners: list[nn.Module] = [self.head]
        for module in self.modules():
            if isinstance(module, MixerBlock):
                owners += (
                    [module.mlp, module.mixer] if isinstance(module.mixer, BiLevelRoutingAttention) else [module.mlp]
                )
        for layer in (child for owner in owners for child in owner.children() if isinstance(child, nn.Linear)):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, which other mixers may have."""
        return position_tables(self)


def _check(depths: Sequence[int], dims: Sequence[int], topk: Sequence[int | None], layout: str) -> None:
    if not dims or not len(depths) == len(dims) == len(topk) or min(*depths, *dims) < 1:
        raise InputError(
            f"biformer: depths={list(depths)} and dims={list(dims)} must be positive, and topk={list(topk)} as many as "
            "they are, one for each stage."
        )
    if layout not in LAYOUTS:
        raise unknown_name("biformer: layout", layout, LAYOUTS)


def _each(name: str, value: Any, stages: int) -> list[Any]:
    """One value per stage of what may be one number for all."""
    values = [value] * stages if isinstance(value, int | float) else list(value)
    if len(values) != stages:
        raise InputError(f"biformer: {name}={values} must be one number, or one for each of {stages} stages.")
    return values


# ------------------------------------------------------------------------------------------------------ entry points


_SOURCE = {"paper_ids": "arXiv:2303.08810", "origin_url": "https://github.com/rayleizhu/BiFormer"}
_FIRST = dict.fromkeys(("biformer_tiny", "biformer_small", "biformer_base"), "stem.conv1")
_FIRST |= dict.fromkeys(("biformer_stl", "biformer_stl_nchw"), "stem.conv")
default_cfgs = generate_default_cfgs(
    {name: describe(first, "mit", crop_pct=0.875, **_SOURCE) for name, first in _FIRST.items()}
)
_STL: dict[str, Any] = {
    "depths": (2, 2, 6, 2),
    "dims": (96, 192, 384, 768),
    "mlp_ratio": 4.0,
    "layout": "patches",
    "position": False,
}


def _build(variant: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build(BiFormer, variant, pretrained, checkpoint_filter_fn, own, given)


@register_model
def biformer_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """BiFormer-T."""
    return _build("biformer_tiny", pretrained, {"attention": attention}, kwargs)


@register_model
def biformer_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """BiFormer-S."""
    return _build("biformer_small", pretrained, {"attention": attention, "depths": (4, 4, 18, 4)}, kwargs)


@register_model
def biformer_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """BiFormer-B."""
    own = {"attention": attention, "depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768)}
    return _build("biformer_base", pretrained, own, kwargs)


@register_model
def biformer_stl(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The attention of BiFormer in the layout of Swin-T."""
    return _build("biformer_stl", pretrained, _STL | {"attention": attention}, kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The refactored attention of BiFormer in the layout of Swin-T."""
    return _build("biformer_stl_nchw", pretrained, _STL | {"attention": attention, "form": "refactored"}, kwargs)
