"""DuoFormer: a convolutional pyramid whose scales attend to each other within patches, then patches to each other.

Tang et al.: DuoFormer: Leveraging Hierarchical Visual Representations by Local and Global Attention, arXiv:2407.13920,
2024, and arXiv:2506.12982, MIDL 2025. The authors' code names no licence, and no weights are known to be published:
nothing of either is here.

| name | trunk | scales | tokens per patch | parameters here |
|---|---|---|---|---|
| duoformer_resnet50_s2 | ResNet-50 | 2, strides 16 and 32 | 6 | 186.1 M |
| duoformer_resnet50_s3 | ResNet-50 | 3, strides 8 to 32 | 22 | 186.5 M |
| duoformer_resnet50_s4 | ResNet-50 | 4, strides 4 to 32 | 86 | 186.8 M |
| duoformer_resnet18_s4 | ResNet-18 | 4, strides 4 to 32 | 86 | 149.0 M |

Every cell of the coarsest map is a patch and owns the tokens of the finer maps over it. One token more, the scale
token, is made from all four maps by convolutions or is learned once for all patches; it stands for the patch after the
blocks between scales. Between patches there is nothing but attention. The class token goes to the classifier.

As in the released code: tokens are in its order, and the classifier sees the class token without a norm (the norm that
is computed and thrown away there is left out). Its second form, derived from a vision transformer, is
``form="vit"``. Chosen here: that the scale token is made from all four maps also where fewer are used; images and
positions of any size, images being extended with zeros to multiples of 32; and the pyramid, which is the tokens of the
used scales behind the blocks between scales, put back to their places. Weights of the transformer convert from the
released names; the trunk's are those of timm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.duoformer_parts import DEVIATION, ScaleSummary, TwoAttentions, group, ungroup
from backbones.four_stages import (
    Size,
    as_indices,
    build,
    chosen_mixers,
    describe,
    drop_path_rates,
    only_nchw,
    stage_grids,
    undecayed,
)
from backbones.isotropic import TokenHead, positions_for
from backbones.weights import unwrapped
from kernels.errors import InputError, unknown_name

__all__ = ["DuoFormer", "checkpoint_filter_fn"]

SCALE_TOKENS = ("channel", "learned")
FORMS = ("plain", "vit")


class DuoFormer(TokenHead):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes).

    ``forward_features`` gives the tokens (B, 1 + H/32 * W/32, C), the class token first. The pyramid has C channels at
    the strides of the used scales.

    Args:
        trunk: a timm model with maps at strides 4, 8, 16 and 32.
        scales: how many of these maps are used, from 2 to 4, counted from the coarsest.
        scale_token: ``"channel"``, made from the maps, or ``"learned"``.
        form: ``"plain"`` or ``"vit"``; see :class:`backbones.duoformer_parts.TwoAttentions`.
        attention: a mixer in the place of the attention between patches, or a list with this one entry. The class
            token then reads the mixed tokens by a cross attention of its own.
        embed_dim, depth, num_heads: channels C; blocks between scales, and as many between patches; heads.
        qk_norm: LayerNorms of queries and keys between patches.
        layer_scale: initial value of branches' factors between scales, None for none.
        img_size: image size, one number or (height, width), for which positions are learned.
        global_pool: ``"token"`` for the class token, ``"avg"`` for the mean of the others, empty for all tokens.

    Raises:
        InputError: a choice or a size is not possible.
    """

    trunk: Any

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        trunk: str = "resnet50",
        scales: int = 4,
        scale_token: str = "channel",
        form: str = "plain",
        attention: Any = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scales not in (2, 3, 4):
            raise InputError(f"duoformer: scales={scales} must be 2, 3 or 4, the maps used from the coarsest on.")
        if scale_token not in SCALE_TOKENS:
            raise unknown_name("duoformer: scale_token", scale_token, SCALE_TOKENS)
        if form not in FORMS:
            raise unknown_name("duoformer: form", form, FORMS)
        if depth < 1 or num_heads < 1 or embed_dim % num_heads:
            raise InputError(
                f"duoformer: depth={depth} must be positive and embed_dim={embed_dim} divisible into "
                f"num_heads={num_heads} heads."
            )
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.trunk = timm.create_model(trunk, in_chans=in_chans, features_only=True, out_indices=(-4, -3, -2, -1))
        widths, strides = self.trunk.feature_info.channels(), self.trunk.feature_info.reduction()
        if strides != [4, 8, 16, 32]:
            raise InputError(f"duoformer: trunk='{trunk}' has maps at strides {strides}; 4, 8, 16 and 32 are needed.")
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.strides = strides[4 - scales :]
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stride, "module": f"projections.{i}"}
            for i, stride in enumerate(self.strides)
        ]
        self.projections = nn.ModuleList(nn.Conv2d(width, embed_dim, 1) for width in widths[4 - scales :])
        for projection in self.projections:
            nn.init.kaiming_normal_(projection.weight)  # type: ignore[arg-type]
            nn.init.normal_(projection.bias, std=1e-6)  # type: ignore[arg-type]
        self.summary = ScaleSummary(widths, embed_dim) if scale_token == "channel" else None
        self.scale_token: nn.Parameter | None = None
        if scale_token == "learned":
            self.scale_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, 1, embed_dim), std=DEVIATION))
        self.transformer = TwoAttentions(
            embed_dim,
            depth,
            num_heads,
            1 + sum((32 // stride) ** 2 for stride in self.strides),
            stage_grids(img_size, [32])[0],
            form,
            qk_norm,
            layer_scale,
            drop_path_rates(drop_path_rate, [depth])[0],
            chosen_mixers(attention, 1)[0],
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, class token and scale token."""
        return undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        return {
            "stem": r"^trunk\.(?:conv1|bn1|stem)",
            "trunk": r"^trunk\.[a-z_]+\.?(\d+)",
            "between": r"^projections|^summary|^scale_token",
            "scales": r"^transformer\.scale_blocks\.(\d+)",
            "patches": r"^transformer\.patch_blocks\.(\d+)",
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block of the transformer again in the backward pass instead of keeping what is inside it."""
        self.transformer.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the used scales ``indices`` (the last n for a number).

        Args:
            norm: of no account, there is no norm between scales.
            stop_early: of no account, all maps are complete at the same moment.
            intermediates_only: return the list alone, without attention between patches, not (``forward_features`` of
                ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, _ = feature_take_indices(len(self.strides), as_indices(indices))
        tokens, grid = self._scales(x)
        maps = self._maps(tokens, grid)
        found = [
            maps[i][:, :, : -(-x.shape[2] // stride), : -(-x.shape[3] // stride)].contiguous()
            for i, stride in enumerate(self.strides)
            if i in take
        ]
        if intermediates_only:
            return found
        return self.transformer.between_patches(tokens[:, :, 0], grid), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the attention between patches, which no map needs, in place, and return the maps' numbers."""
        take, _ = feature_take_indices(len(self.strides), as_indices(indices))
        self.transformer.patch_blocks = nn.ModuleList()
        if prune_norm:
            self.transformer.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        tokens, grid = self._scales(x)
        return self.transformer.between_patches(tokens[:, :, 0], grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _scales(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, P, S, C) of all patches behind the blocks between scales, and the grid of the patches."""
        below, right = (-side % 32 for side in x.shape[2:])
        maps = self.trunk(F.pad(x, (0, right, 0, below)) if below or right else x)
        grid = (maps[3].shape[2], maps[3].shape[3])
        used = maps[4 - len(self.strides) :]
        groups = [group(project(map_), grid) for project, map_ in zip(self.projections, used, strict=True)]
        if self.summary is not None:
            first = self.summary(maps)
        else:
            assert self.scale_token is not None
            first = self.scale_token.expand(len(x), groups[0].shape[1], -1, -1)
        return self.transformer.between_scales(torch.cat((first, *reversed(groups)), dim=2)), grid

    def _maps(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The tokens back in their places, finest scale first."""
        sizes = [(32 // stride) ** 2 for stride in reversed(self.strides)]
        return [ungroup(part, grid) for part in tokens[:, :, 1:].split(sizes, dim=2)][::-1]


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint; those of the transformer from the released names to ours.

    The transformer is found by its table of positions of scales, under whatever prefix. Positions of another image size
    are resized.
    """
    assert isinstance(model, DuoFormer)
    plain = unwrapped(state)
    marker = next((key for key in plain if key.endswith("pos_embed_for_scale")), "")
    prefix = marker.removesuffix("pos_embed_for_scale")
    if marker and prefix != "transformer.":
        inside = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
        others = {key: value for key, value in plain.items() if not key.startswith(prefix)}
        heads = {key: value for key, value in inside.items() if key.startswith("head.")}
        own = {key: value for key, value in inside.items() if key in model.state_dict() and key not in heads}
        released = {key: value for key, value in inside.items() if key not in own and key not in heads}
        renamed = model.transformer.checkpoint_filter(released)
        plain = others | own | heads | {f"transformer.{key}": value for key, value in renamed.items()}
    table = plain.get("transformer.pos_embed")
    if table is not None and table.shape != model.transformer.pos_embed.shape:
        side = round((table.shape[1] - 1) ** 0.5)
        plain["transformer.pos_embed"] = positions_for(table, (side, side), model.transformer.grid, 1)
    return plain


_SHAPES: dict[str, dict[str, Any]] = {
    "duoformer_resnet50_s2": {"scales": 2},
    "duoformer_resnet50_s3": {"scales": 3},
    "duoformer_resnet50_s4": {"scales": 4},
    "duoformer_resnet18_s4": {"scales": 4, "trunk": "resnet18"},
}
default_cfgs = generate_default_cfgs(
    {
        name: describe(
            "trunk.conv1",
            "unknown",
            classifier="head",
            pool_size=None,
            paper_ids=("arXiv:2407.13920", "arXiv:2506.12982"),
            origin_url="https://github.com/xiaoyatang/duoformer_TCGA",
        )
        for name in _SHAPES
    }
)


def _build(variant: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build(DuoFormer, variant, pretrained, checkpoint_filter_fn, _SHAPES[variant], given)


@register_model
def duoformer_resnet50_s2(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DuoFormer on the two coarsest maps of a ResNet-50."""
    return _build("duoformer_resnet50_s2", pretrained, {"attention": attention, **kwargs})


@register_model
def duoformer_resnet50_s3(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DuoFormer on three maps of a ResNet-50."""
    return _build("duoformer_resnet50_s3", pretrained, {"attention": attention, **kwargs})


@register_model
def duoformer_resnet50_s4(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DuoFormer on all four maps of a ResNet-50."""
    return _build("duoformer_resnet50_s4", pretrained, {"attention": attention, **kwargs})


@register_model
def duoformer_resnet18_s4(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DuoFormer on all four maps of a ResNet-18."""
    return _build("duoformer_resnet18_s4", pretrained, {"attention": attention, **kwargs})
