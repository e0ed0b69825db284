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
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attention.bi_level_routing import BiLevelRoutingAttention
from backbones.biformer_layers import (
    ConvDownsample,
    ConvMlp,
    ConvStem,
    PatchDownsample,
    PatchStem,
    heads_of,
    stage_mixers,
)
from backbones.biformer_names import checkpoint_filter_fn
from backbones.blocks import MixerBlock
from backbones.stages import Stage
from kernels.errors import InputError, unknown_name

__all__ = ["BiFormer", "checkpoint_filter_fn"]

LAYOUTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "convolutions": (ConvStem, ConvDownsample),
    "patches": (PatchStem, PatchDownsample),
}


class BiFormer(nn.Module):
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
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        depths, dims = tuple(depths), tuple(dims)
        _check(depths, dims, topk, layout)
        mixers = stage_mixers(attention, _each("regions", regions, len(dims)), topk, form, padding)
        ratios = _each("mlp_ratio", mlp_ratio, len(dims))
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        stem, downsample = LAYOUTS[layout]
        self.stem = stem(in_chans, dims[0])
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            stride = 4 * 2**i
            grid = (-(-height // stride), -(-width // stride))
            heads = heads_of(dim, head_dim, mixers[i])
            blocks = []
            for index in range(depth):
                block = MixerBlock(
                    dim,
                    mixers[i].build(dim, index, num_heads=heads, input_size=grid),
                    mlp_ratio=ratios[i],
                    position=position,
                    layer_scale=layer_scale,
                    drop_path=drop_path_rate * (sum(depths[:i]) + index) / max(sum(depths) - 1, 1),
                    drop=proj_drop_rate,
                )
                if mlp_conv:
                    block.mlp = ConvMlp(dim, round(ratios[i] * dim), proj_drop_rate)
                blocks.append(block)
            stages.append(Stage(downsample(dims[i - 1], dim) if i else nn.Identity(), blocks, None))
        self.stages = nn.Sequential(*stages)
        normed = dims if level_norms else ()
        self.level_norms = nn.ModuleDict({str(i): LayerNorm2d(dim, eps=1e-6) for i, dim in enumerate(normed)})
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self._initialise()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def _initialise(self) -> None:
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
        return {name for name, _ in self.named_parameters() if "bias_table" in name or "rpb" in name.split(".")[-1]}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)", (0,)),
                (r"^norm|^level_norms", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none, an empty ``global_pool`` for an unpooled map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the stages ``indices`` (the last n for a number).

        Args:
            norm: normalise the last stage's map as ``forward_features`` does; norms of the levels, where there are any,
                are always and alone what the maps go through.
            stop_early: leave out the stages behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt={output_fmt} is not possible; these maps are NCHW.")
        wanted = indices if indices is None or isinstance(indices, int) else list(indices)
        take, last = feature_take_indices(len(self.stages), wanted)
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in take:
                maps.append(self._level(x, i, norm))
        return maps if intermediates_only else (self.norm(x), maps)

    def _level(self, x: Tensor, index: int, norm: bool) -> Tensor:
        if str(index) in self.level_norms:
            return self.level_norms[str(index)](x).contiguous()
        return self.norm(x) if norm and index == len(self.stages) - 1 else x

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps ``indices`` do not need, in place, and return their numbers."""
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int) else list(indices))
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        for index in set(self.level_norms) - {str(i) for i in take}:
            del self.level_norms[index]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


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


def _cfg(first_conv: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2303.08810",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
    }


_FIRST = dict.fromkeys(("biformer_tiny", "biformer_small", "biformer_base"), "stem.conv1")
_FIRST |= dict.fromkeys(("biformer_stl", "biformer_stl_nchw"), "stem.conv")
default_cfgs = generate_default_cfgs({name: _cfg(first) for name, first in _FIRST.items()})
_STL: dict[str, Any] = {
    "depths": (2, 2, 6, 2),
    "dims": (96, 192, 384, 768),
    "mlp_ratio": 4.0,
    "layout": "patches",
    "position": False,
}


def _build(variant: str, pretrained: bool, defaults: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **defaults | given,
    )


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
