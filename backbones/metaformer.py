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
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import nn

from backbones.blocks import MixerBlock
from backbones.choices import Choice, choose, is_list, per_stage
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
from backbones.stages import ConvNorm, Stage, Stem
from backbones.weights import State, unwrapped
from kernels.errors import InputError

__all__ = ["MetaFormer"]

DEFAULT_MIXERS = ("window", "window", "softmax", "softmax")


class MetaFormer(StagedNetwork):
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
        depths, dims = tuple(depths), tuple(dims)
        _check(depths, dims)
        mixers = _mixers(attention, len(dims))
        gates = [None] * len(dims) if gate is None else per_stage(gate, len(dims), "gate", "this backbone")
        grids = stage_grids(img_size, [4 * 2**i for i in range(len(dims))])
        rates = drop_path_rates(drop_path_rate, depths)
        stem = Stem(in_chans, dims[0])
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            heads = heads_of("metaformer", dim, head_dim, mixers[i])
            blocks = [
                MixerBlock(
                    dim,
                    mixers[i].build(dim, index, num_heads=heads, input_size=grids[i]),
                    mlp_ratio=mlp_ratio,
                    position=position,
                    layer_scale=layer_scale,
                    drop_path=rates[i][index],
                    drop=proj_drop_rate,
                )
                for index in range(depth)
            ]
            after = gates[i]
            downsample = nn.Identity() if i == 0 else ConvNorm(dims[i - 1], dim)
            stages.append(Stage(downsample, blocks, None if after is None else after.build(dim, i)))
        super().__init__(
            stem,
            stages,
            LayerNorm2d(dims[-1], eps=1e-6),
            dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def initialise(self) -> None:
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
        """Tables of relative positions."""
        return position_tables(self)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> State:
    """The weights themselves, out of a training checkpoint and without the prefix of data-parallel training."""
    return unwrapped(state)


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


default_cfgs = generate_default_cfgs(
    {name: describe("stem.conv1", "apache-2.0") for name in ("metaformer_tiny", "metaformer_small", "metaformer_base")}
)


@register_model
def metaformer_tiny(pretrained: bool = False, attention: Any = None, gate: Any = None, **kwargs: Any) -> nn.Module:
    """The pyramid of 17 M parameters."""
    return build(
        MetaFormer, "metaformer_tiny", pretrained, checkpoint_filter_fn, {"attention": attention, "gate": gate}, kwargs
    )


@register_model
def metaformer_small(pretrained: bool = False, attention: Any = None, gate: Any = None, **kwargs: Any) -> nn.Module:
    """The pyramid of 35 M parameters."""
    own = {"attention": attention, "gate": gate, "depths": (3, 4, 18, 3)}
    return build(MetaFormer, "metaformer_small", pretrained, checkpoint_filter_fn, own, kwargs)


@register_model
def metaformer_base(pretrained: bool = False, attention: Any = None, gate: Any = None, **kwargs: Any) -> nn.Module:
    """The pyramid of 60 M parameters."""
    own = {"attention": attention, "gate": gate, "depths": (3, 4, 18, 3), "dims": (96, 192, 384, 768)}
    return build(MetaFormer, "metaformer_base", pretrained, checkpoint_filter_fn, own, kwargs)
