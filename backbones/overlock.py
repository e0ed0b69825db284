"""OverLoCK: a convolutional network that takes an overview first and then looks closely, guided by it.

Lou and Yu: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels, CVPR 2025 (oral),
arXiv:2502.20087. The authors' code is under the Apache 2.0 licence, and so are the weights that come with it.

Three base stages of large static kernels lead to stride 16. An overview stage goes on to stride 32 and ends in a
context of a quarter of its channels. Two focus stages then start again from stride 16: the context, enlarged, is joined
to the map, and every token makes its own kernels from its affinity with regions of the context. The last map carries
tokens and context, of which the classifier makes its answer; an auxiliary head on the overview helps in training.

| name | blocks, focus blocks | widths | parameters | FLOPs | top-1 (%) | drop path |
|---|---|---|---|---|---|---|
| overlock_xtiny | 2, 2, 3, 2 and 6, 2 | 56, 112, 256, 336 | 16.5 M | 2.6 G | 82.7 | 0.1 |
| overlock_tiny | 4, 4, 6, 2 and 12, 2 | 64, 128, 256, 512 | 33.5 M | 5.5 G | 84.2 | 0.15 |
| overlock_small | 6, 6, 8, 3 and 16, 3 | 64, 128, 320, 512 | 56.2 M | 9.7 G | 84.8 | 0.4 |
| overlock_base | 8, 8, 10, 4 and 20, 4 | 80, 160, 384, 576 | 94.9 M | 16.7 G | 85.1 | 0.5 |

FLOPs, ImageNet accuracy and the drop path of training are the authors'; parameters are those of the merged form (see
:meth:`OverLoCK.merge`) without the auxiliary head, which the paper rounds to 16, 33, 56 and 95 M.

Knowing deviations: in training the auxiliary answer is given only by a model built with ``aux_head=True`` (published:
always), so that any training loop takes the network as it is; there is no drop path unless ``drop_path_rate`` is given.
Weights are never fitted to kernels of another size than they were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attention.dilated_reparam import merge_reparam
from attention.resizing import resize
from backbones.four_stages import Classifying, as_indices, build, describe, drop_path_rates, only_nchw
from backbones.overlock_names import checkpoint_filter_fn
from backbones.overlock_stages import (
    AuxiliaryHead,
    DenseLevels,
    Head,
    Stage,
    base_stages,
    check_lengths,
    focus_mixers,
    focus_stages,
    initialise,
    stem,
)
from kernels.errors import InputError, unknown_name

__all__ = ["OverLoCK", "auxiliary_loss", "checkpoint_filter_fn"]

DENSE = ("segmentation", "detection")


class OverLoCK(Classifying):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes).

    ``forward_features`` gives the last map (B, num_features, H/32, W/32), tokens and context. Levels 0 and 1 of the
    pyramid are the first two base stages, 2 and 3 the focus stages, each with the context's channels behind its own.

    Args:
        attention: the mixer of the focus blocks: a name, a mapping of ``name`` and parameters, a dotted path, or a list
            of two of these, one per focus stage, where None stands for the paper's dynamic kernels.
        depths, dims: blocks and channels of the base stages and of the overview stage; a focus stage is as wide as the
            base stage, or the overview stage, of its stride.
        focus_depths: blocks of the two focus stages.
        kernel_sizes: sides of the large kernels, in the order of ``depths``; focus stages have the last two.
        num_heads: of the focus stages; dynamic kernels have twice as many groups.
        mlp_ratios, focus_mlp_ratios: hidden channels of the MLPs over the stage's.
        smk_size: side of the small dynamic kernel.
        layer_scale: starts of the scales on identity paths, in the order of ``depths``, None for none; focus stages
            have the last two.
        head_width: channels between the last map and the classifier.
        img_size: image size, one number or (height, width), for which tables of chosen mixers are built that depend on
            it; other sizes can be given all the same.
        aux_head: classify the overview too: while training, the output is then (logits, logits of the overview); see
            :func:`auxiliary_loss`.
        dense: ``"segmentation"`` puts a layer norm behind each level of the pyramid, from whose second map the network
            goes on, ``"detection"`` also adds the overview to the last level; both as the authors do for these tasks.
            None for the classifier's plain maps.
        merged: build the form that :meth:`merge` leaves.
        global_pool: as timm's; empty for none, which needs ``num_classes=0``.

    Raises:
        InputError: a choice, a list's length or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        attention: Any = None,
        depths: Sequence[int] = (2, 2, 3, 2),
        focus_depths: Sequence[int] = (6, 2),
        dims: Sequence[int] = (56, 112, 256, 336),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        num_heads: Sequence[int] = (4, 6),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        focus_mlp_ratios: Sequence[float] = (3, 3),
        smk_size: int = 5,
        layer_scale: Sequence[float | None] = (None, None, 1, 1),
        head_width: int = 1024,
        img_size: int | Sequence[int] = 224,
        aux_head: bool = False,
        dense: str | None = None,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_lengths(4, depths=depths, dims=dims, kernel_sizes=kernel_sizes, mlp_ratios=mlp_ratios)
        check_lengths(2, focus_depths=focus_depths, num_heads=num_heads, focus_mlp_ratios=focus_mlp_ratios)
        if len(layer_scale) != 4:
            raise InputError(f"overlock: layer_scale={list(layer_scale)} needs 4 entries, one per stage.")
        if dense is not None and dense not in DENSE:
            raise unknown_name("overlock: dense form", dense, DENSE)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.overview_dim, self.context_dim = dims[3], dims[3] // 4
        channels = (*dims[:2], *(dim + self.context_dim for dim in dims[2:]))
        self.num_features, self.head_hidden_size = channels[3], head_width
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": name}
            for i, (width, name) in enumerate(zip(channels, ("base.0", "base.1", "focus.0", "focus.1"), strict=True))
        ]
        (rates,) = drop_path_rates(drop_path_rate, [sum(depths) + sum(focus_depths)])
        self.stem = stem(in_chans, dims[0])
        stages = base_stages(depths, dims, kernel_sizes, mlp_ratios, layer_scale, rates, merged)
        self.base: list[Stage] = nn.ModuleList(stages[:3])  # type: ignore[assignment]
        self.overview: Stage | None = stages[3]
        self.context: nn.Module = nn.Conv2d(dims[3], self.context_dim, 1)
        mixers = focus_mixers(
            attention, focus_depths, dims[2:], self.context_dim, num_heads, kernel_sizes[2:], smk_size, img_size
        )
        self.focus: list[Stage] = nn.ModuleList(  # type: ignore[assignment]
            focus_stages(
                mixers,
                dims[2:],
                self.context_dim,
                kernel_sizes[2:],
                focus_mlp_ratios,
                layer_scale[2:],
                rates[sum(depths) :],
                merged,
            )
        )
        self.head = Head(channels[3], head_width, num_classes, global_pool, drop_rate)
        self.with_aux_head = aux_head
        self.aux_head = AuxiliaryHead(dims[3], num_classes) if aux_head and num_classes else None
        self.dense: DenseLevels | None = None
        if dense is not None:
            self.dense = DenseLevels(channels, dims[3] if dense == "detection" else None)
        initialise(self)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, which decay would pull towards no position at all."""
        return {name for name, _ in self.named_parameters() if name.endswith((".rpb1", ".rpb2", "bias_table"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        if coarse:
            return {
                "stem": r"^stem",
                "base": r"^base\.(\d+)",
                "overview": r"^overview|^context",
                "focus": r"^focus\.(\d+)",
            }
        return {
            "stem": r"^stem",
            "base": [(r"^base\.(\d+)\.blocks\.(\d+)", None), (r"^base\.(\d+)", (0,))],
            "overview": [(r"^overview\.blocks\.(\d+)", None), (r"^overview", (0,)), (r"^context", (99999,))],
            "focus": [(r"^focus\.(\d+)\.blocks\.(\d+)", None), (r"^focus\.(\d+)", (0,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers; 0 classes for none, an empty ``global_pool`` for the unpooled last map."""
        like = next(self.stem.parameters())
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.aux_head = AuxiliaryHead(self.overview_dim, num_classes) if self.with_aux_head and num_classes else None
        for part in (self.head, self.aux_head):
            if part is not None:
                part.to(device=like.device, dtype=like.dtype).train(self.training)
        initialise(self.head.fc)
        if self.aux_head is not None:
            initialise(self.aux_head)

    @torch.no_grad()
    def merge(self) -> OverLoCK:
        """Make one convolution of each large kernel and its branches, in place, for faster inference of the same maps.

        Training is then over: what the branches had learned separately is gone. Returns the model.
        """
        merge_reparam(self)
        return self

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the levels ``indices`` (the last n for a number).

        Args:
            norm: of no account; a dense form always normalises its levels, the plain form has no norms.
            stop_early: leave out the stages behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, last = feature_take_indices(len(self.feature_info), as_indices(indices))
        maps, _ = self._maps(x, last + 1 if stop_early else len(self.feature_info))
        found = [maps[i].contiguous() for i in take]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages and norms that the levels ``indices`` do not need, in place, and return the levels' numbers.

        Norms of a dense form that these levels need stay, whatever ``prune_norm``.
        """
        levels = len(self.feature_info)
        take, last = feature_take_indices(levels, as_indices(indices))
        if last < 2:
            self.base = self.base[: last + 1]
            self.overview, self.context = None, nn.Identity()
        self.focus = self.focus[: max(last - 1, 0)]
        if self.dense is not None:
            self.dense.prune(sorted({*take, 1}) if last >= 2 else take)
        if prune_head or last < levels - 1:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.with_aux_head = False
            self.head.strip(self.num_features)
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self._maps(x)[0][-1]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, num_classes); while training with an auxiliary head, also those of the overview."""
        maps, overview = self._maps(x)
        logits = self.forward_head(maps[-1])
        if self.training and self.aux_head is not None:
            return logits, self.aux_head(overview)
        return logits

    def _maps(self, x: Tensor, levels: int = 4) -> tuple[list[Tensor], Tensor | None]:
        """The maps of the first ``levels`` levels, and the overview's map where it was needed for them."""
        x = self.stem(x)
        maps = []
        for level, stage in enumerate(self.base[: min(levels, 2)]):
            x = stage(x)
            maps.append(self._level(level, x))
        if levels < 3 or self.overview is None:
            return maps, None
        # The dense forms go on from the second level with its norm, and from no other: so they were published.
        x = self.base[2](maps[1])
        overview = self.overview(x)
        context = self.context(overview)
        enlarged = resize(context, x.shape[2:])
        joint = torch.cat((x, enlarged), dim=1)
        guides = (enlarged, context)
        for level, stage in enumerate(self.focus[: levels - 2]):
            joint = stage(joint, guides[level])
            maps.append(self._level(2 + level, joint, overview))
        return maps, overview

    def _level(self, level: int, x: Tensor, overview: Tensor | None = None) -> Tensor:
        return x if self.dense is None else self.dense(level, x, overview)


def auxiliary_loss(output: Tensor | tuple[Tensor, Tensor], target: Tensor, weight: float = 0.4) -> Tensor:
    """Cross entropy of the logits (N, K), plus ``weight`` times that of the overview's where the output has them.

    Args:
        output: of :class:`OverLoCK`, in training or evaluation.
        target: (N,) int64 classes, or (N, K) probabilities.
    """
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    logits, overview = output
    return F.cross_entropy(logits, target) + weight * F.cross_entropy(overview, target)


# ------------------------------------------------------------------------------------------------------ entry points


_SOURCE = {"paper_ids": "arXiv:2502.20087", "origin_url": "https://github.com/LMMMEng/OverLoCK"}
_CROPS = {"overlock_xtiny": 0.925, "overlock_tiny": 0.95, "overlock_small": 0.95, "overlock_base": 0.975}
default_cfgs = generate_default_cfgs(
    {name: describe("stem.0", "apache-2.0", crop_pct=crop, **_SOURCE) for name, crop in _CROPS.items()}
)


def _build(variant: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build(OverLoCK, variant, pretrained, checkpoint_filter_fn, own, given)


@register_model
def overlock_xtiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 16 M parameters."""
    return _build("overlock_xtiny", pretrained, {"attention": attention}, kwargs)


@register_model
def overlock_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 33 M parameters."""
    own = {"depths": (4, 4, 6, 2), "focus_depths": (12, 2), "dims": (64, 128, 256, 512), "num_heads": (4, 8)}
    return _build("overlock_tiny", pretrained, {"attention": attention, **own}, kwargs)


@register_model
def overlock_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 56 M parameters."""
    own = {"depths": (6, 6, 8, 3), "focus_depths": (16, 3), "dims": (64, 128, 320, 512), "num_heads": (8, 16)}
    return _build("overlock_small", pretrained, {"attention": attention, **own}, kwargs)


@register_model
def overlock_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 95 M parameters."""
    own = {"depths": (8, 8, 10, 4), "focus_depths": (20, 4), "dims": (80, 160, 384, 576), "num_heads": (6, 9)}
    return _build("overlock_base", pretrained, {"attention": attention, **own}, kwargs)
