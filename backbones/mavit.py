"""MAViT: a pyramid of magnitude-aware linear attention in its early stages and softmax attention in its late ones.

Fan, Huang, Ai, He: Rectifying Magnitude Neglect in Linear Attention, ICCV 2025, arXiv:2507.00698. The released code
names no licence, and no licence is known for its weights: nothing of either is here.

| name | depths | widths | heads | drop path | parameters published / here | FLOPs | ImageNet top-1 (%) |
|---|---|---|---|---|---|---|---|
| mavit_tiny | 2, 2, 6, 2 | 64, 128, 256, 512 | 1, 2, 4, 8 | 0.1 | 16 M / 13.9 M | 2.5 G | |
| mavit_small | 3, 5, 9, 3 | 64, 128, 320, 512 | 1, 2, 5, 8 | 0.15 | 27 M / 24.6 M | 4.6 G | 84.7 |
| mavit_base | 4, 6, 12, 6 | 96, 192, 384, 512 | 1, 2, 6, 8 | 0.4 | 50 M / 47.3 M | 9.9 G | 85.7 |
| mavit_large | 4, 7, 19, 8 | 96, 192, 448, 640 | 1, 2, 7, 10 | 0.55 | 98 M / 94.3 M | 16.1 G | 86.0 |

Established: the block (position, attention, convolving MLP of 3.5 times the width, layer scale), widths, depths, the
heads of all but the base variant, drop path. Not established, and chosen here: the stem (four 3 x 3 convolutions with
batch norm, GELU between them, strides 2, 1, 2, 1), the downsampling (a 3 x 3 convolution of stride 2 and a layer norm),
one norm and one layer as the classifier, the heads of the base variant, linear attention in the first two stages and
softmax in the others, and layer scale from 1e-6 on. What is missing to the published parameters, 2 to 4 million, lies
outside the blocks. So weights of blocks convert, and those of stem, downsampling and head are taken only under the
names and shapes they have here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.mala import MagnitudeAwareBlock
from backbones.four_stages import (
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
from backbones.stages import ConvNorm, Stage
from backbones.weights import rename_within, unwrapped
from kernels.errors import InputError

__all__ = ["MAViT", "checkpoint_filter_fn"]

FORMS = ("linear", "linear", "softmax", "softmax")


class MAViT(StagedNetwork):
    """Magnitude-aware Vision Transformer; see :class:`backbones.four_stages.StagedNetwork`.

    Args:
        attention: a mixer for every stage, or a list with one per stage, where None leaves the paper's own.
        depths, dims, num_heads: blocks, channels and heads of each stage.
        forms: of the paper's attention in each stage, ``"linear"`` or ``"softmax"``.
        mlp_ratio: hidden channels of the MLPs, over the stage's.
        layer_scale: initial value of the branches' learned factors, None for none.
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
        depths: Sequence[int] = (3, 5, 9, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        forms: Sequence[str] = FORMS,
        mlp_ratio: float = 3.5,
        layer_scale: float | None = 1e-6,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages("mavit", depths=depths, dims=dims, num_heads=num_heads)
        if len(forms) != len(dims):
            raise InputError(f"mavit: forms={list(forms)} must have one entry for each of the {len(dims)} stages.")
        choices = chosen_mixers(attention, len(dims))
        grids = stage_grids(img_size, [4 * 2**i for i in range(len(dims))])
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            blocks = []
            for index in range(depth):
                block = MagnitudeAwareBlock(
                    dim, heads, forms[i], int(mlp_ratio * dim), layer_scale=layer_scale, drop_path=rates[i][index]
                )
                choice = choices[i]
                if choice is not None:
                    mixer = choice.build(dim, index, num_heads=heads, input_size=grids[i])
                    block.attn = taking_masks(mixer)  # type: ignore[assignment]
                blocks.append(block)
            stages.append(Stage(nn.Identity() if i == 0 else ConvNorm(dims[i - 1], dim), blocks, None))
        super().__init__(
            ConvStem(in_chans, dims[0]),
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


class ConvStem(nn.Sequential):
    """Four 3 x 3 convolutions with batch norm, GELU between them: (B, inputs, H, W) to (B, C, H/4, W/4), rounded up."""

    def __init__(self, inputs: int, dim: int) -> None:
        half = max(dim // 2, 1)
        layers: dict[str, nn.Module] = {}
        for n, (before, after, stride) in enumerate(
            [(inputs, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)], start=1
        ):
            layers[f"conv{n}"] = nn.Conv2d(before, after, 3, stride=stride, padding=1)
            layers[f"norm{n}"] = nn.BatchNorm2d(after)
            if n < 4:
                layers[f"act{n}"] = nn.GELU()
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint, those of blocks from the released names to ours.

    Blocks may lie under ``stages`` or ``layers``. Weights of ours pass through unchanged.
    """
    plain = unwrapped(state)
    if plain.keys() <= model.state_dict().keys():
        return plain
    plain = {
        f"stages.{key.removeprefix('layers.')}" if key.startswith("layers.") else key: value
        for key, value in plain.items()
    }
    for name, block in model.named_modules():
        if isinstance(block, MagnitudeAwareBlock) and f"{name}.attn.qkvo.weight" in plain:
            plain = rename_within(plain, f"{name}.", block.checkpoint_filter)
    return plain


VARIANTS: dict[str, dict[str, Any]] = {
    "mavit_tiny": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), "num_heads": (1, 2, 4, 8)},
    "mavit_small": {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8)},
    "mavit_base": {"depths": (4, 6, 12, 6), "dims": (96, 192, 384, 512), "num_heads": (1, 2, 6, 8)},
    "mavit_large": {"depths": (4, 7, 19, 8), "dims": (96, 192, 448, 640), "num_heads": (1, 2, 7, 10)},
}

default_cfgs = generate_default_cfgs(
    {
        name: describe(
            "stem.conv1", "unknown", paper_ids="arXiv:2507.00698", origin_url="https://github.com/qhfan/MALA"
        )
        for name in VARIANTS
    }
)


def _build(variant: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build(MAViT, variant, pretrained, checkpoint_filter_fn, VARIANTS[variant], given)


@register_model
def mavit_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """MAViT-T; published with a drop path rate of 0.1."""
    return _build("mavit_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def mavit_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """MAViT-S; published with a drop path rate of 0.15."""
    return _build("mavit_small", pretrained, {"attention": attention, **kwargs})


@register_model
def mavit_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """MAViT-B; published with a drop path rate of 0.4."""
    return _build("mavit_base", pretrained, {"attention": attention, **kwargs})


@register_model
def mavit_large(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """MAViT-L; published with a drop path rate of 0.55."""
    return _build("mavit_large", pretrained, {"attention": attention, **kwargs})
