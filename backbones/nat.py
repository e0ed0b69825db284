"""NAT, DiNAT and DiNAT_s: pyramids whose tokens attend to the window of tokens around each of them.

Hassani, Walton, Li, Li, Shi: Neighborhood Attention Transformer, CVPR 2023, arXiv:2204.07143; Hassani, Shi: Dilated
Neighborhood Attention Transformer, 2022, arXiv:2209.15001. The authors' code is under the MIT licence; it names no
other for its weights.

Blocks of DiNAT alternate between near and far neighbours. DiNAT_s has the layout of Swin: 4 x 4 patches, merging of
2 x 2 tokens, wider MLPs. Maps have ceil(size / stride) rows and columns at strides 4, 8, 16 and 32.

| name | depths | channels | MLP | layer scale | drop path | parameters | FLOPs | ImageNet top-1 (%) |
|---|---|---|---|---|---|---|---|---|
| nat_mini | 3, 4, 6, 5 | 64 | 3 | | 0.2 | 19.98 M | 2.7 G | 81.8 |
| nat_tiny | 3, 4, 18, 5 | 64 | 3 | | 0.2 | 27.90 M | 4.3 G | 83.2 |
| nat_small | 3, 4, 18, 5 | 96 | 2 | 1e-5 | 0.3 | 50.74 M | 7.8 G | 83.7 |
| nat_base | 3, 4, 18, 5 | 128 | 2 | 1e-5 | 0.5 | 89.77 M | 13.7 G | 84.3 |
| dinat_mini | 3, 4, 6, 5 | 64 | 3 | | 0.2 | 19.98 M | 2.7 G | 81.8 |
| dinat_tiny | 3, 4, 18, 5 | 64 | 3 | | 0.2 | 27.90 M | 4.3 G | 82.7 |
| dinat_small | 3, 4, 18, 5 | 96 | 2 | | 0.3 | 50.72 M | 7.8 G | 83.8 |
| dinat_base | 3, 4, 18, 5 | 128 | 2 | 1e-5 | 0.5 | 89.77 M | 13.7 G | 84.4 |
| dinat_large | 3, 4, 18, 5 | 192 | 2 | | 0.35 | 200.94 M | 30.6 G | 86.6 (384: 87.4, 384 with kernel 11: 87.5) |
| dinat_s_tiny | 2, 2, 6, 2 | 96 | 4 | | | 28.29 M | 4.5 G | 81.8 |
| dinat_s_small | 2, 2, 18, 2 | 96 | 4 | | | 49.61 M | 8.7 G | 83.5 |
| dinat_s_base | 2, 2, 18, 2 | 128 | 4 | | | 87.77 M | 15.4 G | 83.8 |
| dinat_s_large | 2, 2, 18, 2 | 192 | 4 | | | 196.53 M | 34.5 G | 86.5 (384: 87.4) |

Accuracies are the authors'; those of the large ones are after pretraining on ImageNet-21k.

Knowing deviations: ``drop_path_rate`` is 0 unless given, the table has what was published; dropout of the attention
weights, which no published model uses, is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.choices import choose
from backbones.four_stages import build, drop_path_rates, stage_grids
from backbones.nat_dilations import Dilations, dilations_of_blocks
from backbones.nat_layers import Block, ConvDownsample, ConvStem, PatchMerging, PatchStem
from backbones.nat_names import checkpoint_filter_fn
from backbones.nat_network import NeighborhoodNetwork, build_mixer, described, mixers_of_stages
from backbones.stages import Stage
from kernels.errors import InputError

__all__ = ["NAT", "checkpoint_filter_fn"]


class NAT(NeighborhoodNetwork):
    """Neighbourhood attention transformer, with and without dilation.

    Args:
        attention: another mixer: a name, a mapping of ``name`` and parameters, a dotted path, or a list of these with
            one entry per stage, where None stands for neighbourhood attention. ``{"name": "neighborhood",
            "small_maps": "clamp"}`` makes windows smaller where the map is, which is otherwise extended with zeros.
        depths: blocks of each stage.
        embed_dim: channels of the first stage, doubled from stage to stage.
        num_heads: heads of each stage.
        kernel_size: tokens of a window on each axis.
        dilations: a preset of :mod:`backbones.nat_dilations` that goes with the task and the size of its images, or
            numbers for each stage; None for 1 everywhere. It changes no weight and is not in a checkpoint.
        merging: whether stem and downsampling are those of Swin (DiNAT_s) and not strided convolutions.
        mlp_ratio: hidden channels of the MLPs, over channels.
        layer_scale: initial value of the branches' scales, None for none.
        img_size: image size, one number or (height, width), for which tables of other mixers are built that depend on
            it; other sizes can be given all the same.
        level_norms: whether each map of ``forward_intermediates`` has a norm of its own, as in the authors' networks
            for detection and segmentation; ImageNet weights load without.
        global_pool: ``"avg"``, ``"max"``, or empty for none.
        proj_drop_rate: dropout in the MLPs and behind the attention.

    Raises:
        InputError: a choice, a list's length or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        attention: Any = None,
        depths: Sequence[int] = (3, 4, 6, 5),
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Dilations | None = None,
        merging: bool = False,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        img_size: int | Sequence[int] = 224,
        level_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        depths, num_heads = tuple(depths), tuple(num_heads)
        if not depths or len(depths) != len(num_heads) or min(*depths, *num_heads, embed_dim) < 1:
            raise InputError(
                f"nat: depths={list(depths)}, num_heads={list(num_heads)} and embed_dim={embed_dim} must be positive, "
                "and the lists as long as each other, one entry for each stage."
            )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        strides = [4 * 2**i for i in range(len(depths))]
        grids = stage_grids(img_size, strides)
        mixers = mixers_of_stages(attention, choose("neighborhood", ("mixer",)), len(depths))
        rates = drop_path_rates(drop_path_rate, depths)
        spread = dilations_of_blocks(dilations, depths)
        downsample = PatchMerging if merging else ConvDownsample
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = [
                Block(
                    dim,
                    build_mixer(
                        mixers[i],
                        dim,
                        num_heads[i],
                        index,
                        kernel_size=kernel_size,
                        dilation=spread[i][index],
                        input_size=grids[i],
                        proj_drop=proj_drop_rate,
                    ),
                    mlp_ratio,
                    layer_scale,
                    drop=proj_drop_rate,
                    drop_path=rates[i][index],
                )
                for index in range(depth)
            ]
            stages.append(Stage(downsample(dims[i - 1]) if i else nn.Identity(), blocks, None))
        super().__init__(
            PatchStem(in_chans, embed_dim, 4) if merging else ConvStem(in_chans, embed_dim),
            stages,
            dims,
            strides,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            level_norms=level_norms,
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ entry points

_MINI: dict[str, Any] = {"depths": (3, 4, 6, 5), "embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_TINY = _MINI | {"depths": (3, 4, 18, 5)}
_SMALL = _TINY | {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_BASE = _TINY | {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5}
_LARGE = _TINY | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}
_DILATED = {"dilations": "imagenet_224"}
_MERGED = _DILATED | {"merging": True, "mlp_ratio": 4.0, "layer_scale": None, "depths": (2, 2, 18, 2)}

_VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": _MINI,
    "nat_tiny": _TINY,
    "nat_small": _SMALL | {"layer_scale": 1e-5},
    "nat_base": _BASE,
    "dinat_mini": _MINI | _DILATED,
    "dinat_tiny": _TINY | _DILATED,
    "dinat_small": _SMALL | _DILATED,  # unlike NAT's without layer scale
    "dinat_base": _BASE | _DILATED,
    "dinat_large": _LARGE | _DILATED,
    "dinat_s_tiny": _SMALL | _MERGED | {"depths": (2, 2, 6, 2)},
    "dinat_s_small": _SMALL | _MERGED,
    "dinat_s_base": _BASE | _MERGED,
    "dinat_s_large": _LARGE | _MERGED,
}

default_cfgs = generate_default_cfgs(
    {
        name: described(
            "stem.proj" if name.startswith("dinat_s_") else "stem.proj.0",
            "2209.15001" if name.startswith("dinat") else "2204.07143",
        )
        for name in _VARIANTS
    }
)


def _build(variant: str, pretrained: bool, attention: Any, given: dict[str, Any]) -> nn.Module:
    own = _VARIANTS[variant] | {"attention": attention}
    return build(NAT, variant, pretrained, checkpoint_filter_fn, own, given)


@register_model
def nat_mini(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """NAT of 20 M parameters."""
    return _build("nat_mini", pretrained, attention, kwargs)


@register_model
def nat_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """NAT of 28 M parameters."""
    return _build("nat_tiny", pretrained, attention, kwargs)


@register_model
def nat_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """NAT of 51 M parameters."""
    return _build("nat_small", pretrained, attention, kwargs)


@register_model
def nat_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """NAT of 90 M parameters."""
    return _build("nat_base", pretrained, attention, kwargs)


@register_model
def dinat_mini(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT of 20 M parameters."""
    return _build("dinat_mini", pretrained, attention, kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT of 28 M parameters."""
    return _build("dinat_tiny", pretrained, attention, kwargs)


@register_model
def dinat_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT of 51 M parameters."""
    return _build("dinat_small", pretrained, attention, kwargs)


@register_model
def dinat_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT of 90 M parameters."""
    return _build("dinat_base", pretrained, attention, kwargs)


@register_model
def dinat_large(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT of 201 M parameters."""
    return _build("dinat_large", pretrained, attention, kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT in the layout of Swin-T."""
    return _build("dinat_s_tiny", pretrained, attention, kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT in the layout of Swin-S."""
    return _build("dinat_s_small", pretrained, attention, kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT in the layout of Swin-B."""
    return _build("dinat_s_base", pretrained, attention, kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DiNAT in the layout of Swin-L."""
    return _build("dinat_s_large", pretrained, attention, kwargs)
