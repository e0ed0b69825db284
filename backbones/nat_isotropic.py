"""NAT and DiNAT without a pyramid, and the ViT they are compared with: one map of 16 x 16 patches, 12 blocks.

Hassani, Shi: Dilated Neighborhood Attention Transformer, 2022, arXiv:2209.15001, section on isotropic models. The
authors' code is under the MIT licence; it names no other for its weights.

| name | channels | heads | attention | parameters | ImageNet top-1 (%) |
|---|---|---|---|---|---|
| nat_iso_small | 384 | 12 | window of 7 x 7 | 22.0 M | 80.0 |
| dinat_iso_small | 384 | 12 | window of 7 x 7, dilation 1 and 2 in turn | 22.0 M | 80.8 |
| vitrpb_small | 384 | 12 | all tokens, bias by offset | 22.1 M | 81.2 |
| nat_iso_base | 768 | 24 | window of 7 x 7 | 86.5 M | 81.6 |
| dinat_iso_base | 768 | 24 | window of 7 x 7, dilation 1 and 2 in turn | 86.5 M | 82.1 |
| vitrpb_base | 768 | 24 | all tokens, bias by offset | 86.6 M | 82.5 |

Accuracies are the authors', parameters are counted here. The maps of ``features_only`` are those of the last four
blocks, all of stride 16; ``out_indices`` asks for others.

Knowing deviations: images of any size are taken, with zeros up to whole patches, and with the ViT's table of biases
resized to the map; ``drop_path_rate`` is 0 unless given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.about import About
from attention.layout import heads_first
from attention.masking import key_mask
from attention.mixer import Mixer
from attention.softmax import SoftmaxAttention
from backbones.choices import Choice, choose
from backbones.four_stages import drop_path_rates, stage_grids
from backbones.nat_dilations import dilations_of_blocks
from backbones.nat_layers import Block, PatchStem
from backbones.nat_names import checkpoint_filter_fn, resize_table
from backbones.nat_network import NeighborhoodNetwork, build_mixer, described, mixers_of_stages
from backbones.stages import Stage
from kernels.errors import InputError
from kernels.window_attention import relative_position_bias

__all__ = ["NATIsotropic", "checkpoint_filter_fn"]


class BiasedSoftmaxAttention(SoftmaxAttention):
    """Softmax attention over all tokens of a map with a learned bias by offset.

    Args:
        dim: channels C.
        num_heads: heads.
        input_size: rows and columns of the map for which the table is built; it is resized bicubically for others.
        proj_drop: dropout on the output while training.
    """

    about = About("Hassani and Shi (DiNAT), 2022, 2209.15001", "O(N^2)", "sdpa", "MIT")
    grids = (2,)  # type: ignore[assignment]

    def __init__(self, dim: int, num_heads: int, input_size: tuple[int, int], proj_drop: float = 0.0) -> None:
        super().__init__(dim, num_heads, proj_drop=proj_drop)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * input_size[0] - 1, 2 * input_size[1] - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    packed = Mixer.packed

    def _core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, N, E)."""
        rows, columns = q.shape[1:3]
        size = (2 * rows - 1, 2 * columns - 1)
        table = self.rpb if self.rpb.shape[1:] == size else resize_table(self.rpb, size)
        bias = relative_position_bias(table, (rows, columns), layout="maxvit_tf").to(q.dtype)[None]
        seen = key_mask(mask)
        if seen is not None:
            bias = bias.masked_fill(~seen, -torch.inf)
        q, k, v = heads_first(q), heads_first(k), heads_first(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class NATIsotropic(NeighborhoodNetwork):
    """Blocks of neighbourhood attention on one map: images (B, in_chans, H, W) of any size to logits (B, num_classes).

    Each block is a level of ``forward_intermediates``.

    Args:
        attention: another mixer for all blocks: a name, a mapping of ``name`` and parameters, or a dotted path.
        depth: blocks.
        embed_dim: channels.
        num_heads: heads.
        patch_size: side of a patch, pixels.
        kernel_size: tokens of a window on each axis; None for attention to all tokens with a bias by offset.
        dilations: dilations that the blocks take in turn.
        layer_scale, img_size, level_norms, global_pool, mlp_ratio, proj_drop_rate: see :class:`backbones.nat.NAT`.

    Raises:
        InputError: a choice or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        attention: Any = None,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 12,
        patch_size: int = 16,
        kernel_size: int | None = 7,
        dilations: Sequence[int] = (1,),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        img_size: int | Sequence[int] = 224,
        level_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if min(depth, embed_dim, num_heads, patch_size) < 1:
            raise InputError(
                f"nat_iso: depth={depth}, embed_dim={embed_dim}, num_heads={num_heads} and patch_size={patch_size} "
                "must be positive."
            )
        default = Choice("softmax with bias", BiasedSoftmaxAttention)
        if kernel_size is not None:
            default = choose("neighborhood", ("mixer",))
        mixer = mixers_of_stages(attention, default, 1)[0]
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        (spread,) = dilations_of_blocks([dilations], [depth])
        (grid,) = stage_grids(img_size, [patch_size])
        blocks = [
            Block(
                embed_dim,
                build_mixer(
                    mixer,
                    embed_dim,
                    num_heads,
                    index,
                    kernel_size=kernel_size or 7,
                    dilation=spread[index],
                    input_size=grid,
                    proj_drop=proj_drop_rate,
                ),
                mlp_ratio,
                layer_scale,
                drop=proj_drop_rate,
                drop_path=rates[index],
            )
            for index in range(depth)
        ]
        super().__init__(
            PatchStem(in_chans, embed_dim, patch_size),
            [Stage(nn.Identity(), [block], None) for block in blocks],
            [embed_dim] * depth,
            [patch_size] * depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            level_norms=level_norms,
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ entry points

_SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 12}
_BASE: dict[str, Any] = {"embed_dim": 768, "num_heads": 24}

_VARIANTS: dict[str, dict[str, Any]] = {
    "nat_iso_small": _SMALL,
    "nat_iso_base": _BASE,
    "dinat_iso_small": _SMALL | {"dilations": (1, 2)},
    "dinat_iso_base": _BASE | {"dilations": (1, 2)},
    "vitrpb_small": _SMALL | {"kernel_size": None},
    "vitrpb_base": _BASE | {"kernel_size": None},
}

default_cfgs = generate_default_cfgs({name: described("stem.proj", "2209.15001", 14) for name in _VARIANTS})


def _build(variant: str, pretrained: bool, attention: Any, given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        NATIsotropic,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (-4, -3, -2, -1), "feature_cls": "getter"},
        **_VARIANTS[variant] | {"attention": attention} | given,
    )


@register_model
def nat_iso_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Isotropic NAT with the channels of ViT-S."""
    return _build("nat_iso_small", pretrained, attention, kwargs)


@register_model
def nat_iso_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Isotropic NAT with the channels of ViT-B."""
    return _build("nat_iso_base", pretrained, attention, kwargs)


@register_model
def dinat_iso_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Isotropic DiNAT with the channels of ViT-S."""
    return _build("dinat_iso_small", pretrained, attention, kwargs)


@register_model
def dinat_iso_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Isotropic DiNAT with the channels of ViT-B."""
    return _build("dinat_iso_base", pretrained, attention, kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """ViT-S with biases by offset and without a class token."""
    return _build("vitrpb_small", pretrained, attention, kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """ViT-B with biases by offset and without a class token."""
    return _build("vitrpb_base", pretrained, attention, kwargs)
