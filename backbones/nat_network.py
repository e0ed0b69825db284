"""What NAT, DiNAT and their isotropic forms have in common: the way through the network, and timm's methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attention.neighborhood import NeighborhoodAttention
from backbones.choices import Choice, is_list, per_stage
from backbones.nat_layers import EPS
from backbones.stages import Stage
from kernels.errors import InputError


class NeighborhoodNetwork(nn.Module):
    """Stem, stages, norm and classifier: images (B, in_chans, H, W) of any size to logits (B, num_classes).

    ``forward_features`` gives the last map (B, C, ceil(H / stride), ceil(W / stride)), normalised.

    Args:
        stem: images to maps (B, C, H, W).
        stages: one after the other, from map to map.
        dims: channels of the stages' maps.
        strides: pixels between tokens of the stages' maps.
        level_norms: whether the map of each level has a norm of its own, as detectors and segmenters use.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        strides: Sequence[int],
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        level_norms: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.level_norms = nn.ModuleList(LayerNorm2d(dim, eps=EPS) for dim in dims) if level_norms else None
        self.norm: nn.Module = LayerNorm2d(dims[-1], eps=EPS)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normal weights of deviation 0.02 in linear layers; mixers of another kind bring their own."""
        mixers = [block.attn for stage in self.stages for block in stage.blocks]  # type: ignore[union-attr]
        brought = {part for mixer in mixers if not isinstance(mixer, NeighborhoodAttention) for part in mixer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in brought:
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, which decay would pull towards no position at all."""
        return {name for name, _ in self.named_parameters() if "bias_table" in name or "rpb" in name.split(".")[-1]}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,))]
        return {"stem": r"^stem", "blocks": blocks if coarse else [*blocks, (r"^norm|^level_norms", (99999,))]}

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

        Each goes through its level's norm where there is one.

        Args:
            norm: normalise the last stage's map as ``forward_features`` does, where levels have no norms.
            stop_early: leave out the stages behind the last one asked for, where only the list is returned.
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
            if stop_early and intermediates_only and i > last:
                break
            x = stage(x)
            if i in take:
                maps.append(self._level(x, i, norm and i == len(self.stages) - 1))
        return maps if intermediates_only else (self.norm(x), maps)

    def _level(self, x: Tensor, level: int, norm: bool) -> Tensor:
        if self.level_norms is not None:
            return self.level_norms[level](x).contiguous()
        return self.norm(x).contiguous() if norm else x

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps ``indices`` do not need, in place, and return their numbers."""
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int) else list(indices))
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if self.level_norms is not None:
            self.level_norms = nn.ModuleList(
                self.level_norms[i] if i in take else nn.Identity() for i in range(last + 1)
            )
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


def mixers_of_stages(attention: Any, default: Choice, stages: int) -> list[Choice]:
    """The mixer of each stage: those of ``attention``, one or a list, and ``default`` where it has none."""
    if attention is None:
        return [default] * stages
    entries = attention if is_list(attention) else [attention] * stages
    chosen = per_stage(entries, stages, "mixer", "this backbone")
    return [default if choice is None else choice for choice in chosen]


def build_mixer(
    choice: Choice, dim: int, num_heads: int, index: int, *, kernel_size: int, dilation: int, **offers: Any
) -> nn.Module:
    """The mixer of block ``index``; windows of neighbours are the network's where the choice does not say."""
    if issubclass(choice.cls, NeighborhoodAttention):
        offers |= {"kernel_size": kernel_size, "dilation": dilation}
    return choice.build(dim, index, num_heads=num_heads, **offers)


def describe(first_conv: str, paper: str, pool_size: int = 7) -> dict[str, Any]:
    """timm's description of a network that was trained with images of 224."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (pool_size, pool_size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": f"arXiv:{paper}",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }
