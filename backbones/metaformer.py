"""A pyramid of four stages that takes any token mixer, and any gate after a stage, by name.

The general architecture of Yu et al., MetaFormer Is Actually What You Need for Vision, CVPR 2022, arXiv 2111.11418,
with a stem and downsampling of 3 x 3 convolutions: maps of any size, odd and oblong ones too, have
ceil(size / stride) rows and columns at strides 4, 8, 16 and 32. Widths and depths are in the manner of PVT v2 and
Swin. Parameters are counted with the default mixers with 1000 classes:

| name | depths | widths | parameters |
|---|---|---|---|
| metaformer_tiny | 2, 2, 6, 2 | 64, 128, 320, 512 | 16.7 M |
| metaformer_small | 3, 4, 18, 3 | 64, 128, 320, 512 | 35.1 M |
| metaformer_base | 3, 4, 18, 3 | 96, 192, 384, 768 | 59.7 M |

No weights have been published for these networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.blocks import MixerBlock
from backbones.choices import Choice, choose, is_list, per_stage
from backbones.stages import ConvNorm, Stage, Stem
from kernels.errors import InputError

__all__ = ["MetaFormer"]

Size = int | Sequence[int]
DEFAULT_MIXERS = ("window", "window", "softmax", "softmax")


class MetaFormer(nn.Module):
    """A four-stage pyramid around token mixers and gates that are chosen by name.

    Images (B, in_chans, H, W) of any size become logits (B, num_classes); ``forward_features`` gives the last map
    (B, C, H/32, W/32), normalised.

    Args:
        attention: the mixer: a name, a mapping of ``name`` and parameters, a dotted path, or a list of these with one
            entry per stage, where None stands for the stage's default: windows in the first two stages, softmax
            attention over all tokens from the third.
        gate: in the same forms, a gate after each stage; None for none.
        depths, dims: blocks and channels of each stage.
        head_dim: channels per head, for mixers with heads.
        img_size: image size, one number or (height, width), for which tables of mixers are built that depend on it;
            other sizes can be given all the same.
        position: see :class:`backbones.blocks.MixerBlock`, as ``mlp_ratio`` and ``layer_scale``.
        global_pool: ``"avg"``, ``"max"``, or empty for none.

    Raises:
        InputError: a choice, a list's length or a size is not possible.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        attention: Any = None,
        gate: Any = None,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        position: bool = True,
        layer_scale: float | None = None,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        depths, dims = tuple(depths), tuple(dims)
        _check(depths, dims)
        mixers = _mixers(attention, len(dims))
        gates = [None] * len(dims) if gate is None else per_stage(gate, len(dims), "gate", "this backbone")
        grid = _ceil_halves(*_height_and_width(img_size))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = Stem(in_chans, dims[0])
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            grid = _ceil_halves(*grid)
            heads = _heads(dim, head_dim, mixers[i])
            blocks = [
                MixerBlock(
                    dim,
                    mixers[i].build(dim, index, num_heads=heads, input_size=grid),
                    mlp_ratio=mlp_ratio,
                    position=position,
                    layer_scale=layer_scale,
                    drop_path=drop_path_rate * (sum(depths[:i]) + index) / max(sum(depths) - 1, 1),
                    drop=proj_drop_rate,
                )
                for index in range(depth)
            ]
            after = gates[i]
            downsample = nn.Identity() if i == 0 else ConvNorm(dims[i - 1], dim)
            stages.append(Stage(downsample, blocks, None if after is None else after.build(dim, i)))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm2d(dims[-1], eps=1e-6)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self._initialise()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def _initialise(self) -> None:
        """Truncated normal weights of deviation 0.02 in MLPs and the classifier; mixers and gates bring their own."""

        def linear(module: nn.Module, name: str) -> None:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        for block in self.modules():
            if isinstance(block, MixerBlock):
                named_apply(linear, block.mlp)
        named_apply(linear, self.head)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, which decay would pull towards no position at all."""
        return {name for name, _ in self.named_parameters() if "bias_table" in name or "rpb" in name.split(".")[-1]}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,))]
        return {"stem": r"^stem", "blocks": blocks if coarse else [*blocks, (r"^norm", (99999,))]}

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
        """Maps (B, C, H, W) of the stages ``indices`` (the last n for a number, all for None).

        Args:
            norm: normalise the last stage's map as ``forward_features`` does.
            stop_early: leave out the stages behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).
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
                maps.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps ``indices`` do not need, in place, and return their numbers."""
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int) else list(indices))
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
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


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights themselves, out of a training checkpoint and without the prefix of data-parallel training."""
    for key in ("state_dict", "model", "model_ema"):
        if isinstance(state.get(key), Mapping):
            state = dict(state[key])
            break
    return {key.removeprefix("module."): value for key, value in state.items()}


def _check(depths: Sequence[int], dims: Sequence[int]) -> None:
    if not dims or len(depths) != len(dims) or min(*depths, *dims) < 1:
        raise InputError(
            f"metaformer: depths={list(depths)} and dims={list(dims)} must be positive and as many as each other, one "
            "for each stage."
        )


def _mixers(attention: Any, stages: int) -> list[Choice]:
    """The mixer of each stage."""
    defaults = [choose(DEFAULT_MIXERS[min(i, len(DEFAULT_MIXERS) - 1)], ("mixer",)) for i in range(stages)]
    if attention is None:
        return defaults
    if not is_list(attention):
        return [choose(attention, ("mixer",))] * stages
    chosen = per_stage(attention, stages, "mixer", "this backbone")
    return [default if choice is None else choice for choice, default in zip(chosen, defaults, strict=True)]


def _heads(dim: int, head_dim: int, choice: Choice) -> int:
    """Heads of a stage; a width that does not divide is of no account where the number of heads is given."""
    if dim % head_dim and "num_heads" not in choice.params:
        fitting = [width for width in range(1, dim + 1) if dim % width == 0]
        raise InputError(
            f"metaformer: {dim} channels are not divisible into heads of head_dim={head_dim}; take head_dim from "
            f"{', '.join(map(str, fitting))}."
        )
    return max(dim // head_dim, 1)


def _height_and_width(img_size: Size) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"img_size={img_size} must be one number or (height, width), in pixels.")
    return sides[0], sides[1]


def _ceil_halves(height: int, width: int) -> tuple[int, int]:
    return -(-height // 2), -(-width // 2)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ("metaformer_tiny", "metaformer_small", "metaformer_base")}
)


def _build(variant: str, pretrained: bool, defaults: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        MetaFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **defaults | given,
    )


@register_model
def metaformer_tiny(pretrained: bool = False, attention: Any = None, gate: Any = None, **kwargs: Any) -> nn.Module:
    """The pyramid of 17 M parameters."""
    return _build("metaformer_tiny", pretrained, {"attention": attention, "gate": gate}, kwargs)


@register_model
def metaformer_small(pretrained: bool = False, attention: Any = None, gate: Any = None, **kwargs: Any) -> nn.Module:
    """The pyramid of 35 M parameters."""
    own = {"attention": attention, "gate": gate, "depths": (3, 4, 18, 3)}
    return _build("metaformer_small", pretrained, own, kwargs)


@register_model
def metaformer_base(pretrained: bool = False, attention: Any = None, gate: Any = None, **kwargs: Any) -> nn.Module:
    """The pyramid of 60 M parameters."""
    own = {"attention": attention, "gate": gate, "depths": (3, 4, 18, 3), "dims": (96, 192, 384, 768)}
    return _build("metaformer_base", pretrained, own, kwargs)
