"""What NAT, DiNAT and their isotropic forms have in common: norms, weights to start from, mixers, descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import nn

from attention.neighborhood import NeighborhoodAttention
from backbones.choices import Choice, is_list, per_stage
from backbones.four_stages import StagedNetwork, describe, position_tables
from backbones.nat_layers import EPS
from backbones.stages import Stage


class NeighborhoodNetwork(StagedNetwork):
    """Blocks with neighbourhood attention; see :class:`backbones.four_stages.StagedNetwork`.

    Args:
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
        super().__init__(
            stem,
            stages,
            LayerNorm2d(dims[-1], eps=EPS),
            dims,
            strides=strides,
            level_norms=[LayerNorm2d(dim, eps=EPS) for dim in dims] if level_norms else (),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    def initialise(self) -> None:
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
        """Tables of relative positions."""
        return position_tables(self)


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


def described(first_conv: str, paper: str, pool_size: int = 7) -> dict[str, Any]:
    """timm's description of a network that was trained with images of 224."""
    origin = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
    sizes: dict[str, Any] = {"pool_size": (pool_size, pool_size), "crop_pct": 0.875}
    return describe(first_conv, "mit", paper_ids=f"arXiv:{paper}", origin_url=origin, **sizes)
