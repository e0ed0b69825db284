"""Meta-SpikeFormer: a convolutional and transformer pyramid whose layers pass each other spikes.

Yao, Hu, Hu, Xu, Zhou, Tian, Xu, Li: Spike-driven Transformer V2: Meta Spiking Neural Network Architecture Inspiring the
Design of Next-generation Neuromorphic Chips, ICLR 2024, openreview.net/forum?id=1SIBN5Xyw7, arXiv:2404.03663. The
authors' code has no licence file, and no weights came with it; what follows is from the paper's equations.

Every convolution but the first is given spikes, 0 or 1, so that its products are sums. Residual branches add to the
membranes, which are real numbers. The image is shown ``time_steps`` times. Attention is ``q (k^T v) / 8`` of spikes,
without softmax, linear in the number of tokens.

| name | widths behind the stages | parameters | ImageNet top-1 (%) |
|---|---|---|---|
| metaspikformer_8_256 | 32, 64, 128, 256, 360 | 15.1 M | |
| metaspikformer_8_384 | 48, 96, 192, 384, 480 | 31.3 M | |
| metaspikformer_8_512 | 64, 128, 256, 512, 640 | 55.4 M | 80.0 with 4 time steps and distillation |

The last stage does not halve the map: features have strides 2, 4, 8 and 16, and there is none of stride 32.

Knowing deviations: the first convolution is computed once for all time steps, for it sees the same image in each (the
running variance then counts the image once); ``drop_path_rate`` rises linearly over the transformer blocks; in training
a layer that no spike reaches passes back an ordinary gradient instead of one 316 times as large per normalisation
(:func:`backbones.spiking.normalise`). Attention of an untrained network is silent below about 192 px: the scale of its
sums over pixels is fixed, so that few pixels do not reach the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.weight_init import trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.four_stages import StagedNetwork, build, describe, drop_path_rates, position_tables, stage_grids
from backbones.meta_spikformer_blocks import ConvBlock, ConvNorm, Downsample, RepConv, TransformerBlock
from backbones.meta_spikformer_names import checkpoint_filter_fn
from backbones.spiking import LIF
from kernels.errors import InputError

__all__ = ["MetaSpikeFormer", "checkpoint_filter_fn", "fuse"]

Attention = str | Mapping[str, Any] | None
LEVELS = (0, 1, 2, 4)
"""The stages that end a stride; stage 3 has the stride of stage 4."""


class Stage(nn.Module):
    """Downsampling and blocks: membranes (T * B, C, H, W) to (T * B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class MetaSpikeFormer(StagedNetwork):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes), the mean over time steps.

    ``forward_features`` gives the membranes of the last stage at every time step, (B, T * C, H/16, W/16) with the time
    steps one after the other; ``num_features`` is T * C. The pooled features are the firing rates (B, C) of the neurons
    in front of the classifier. The maps of the pyramid are membranes averaged over time.

    Args:
        dims: channels behind stages 2 to 5 of the paper's figure; the first stage has half of the first.
        depths: blocks of the five stages, the same in every published variant: convolutional in the first three,
            transformer blocks in the last two.
        time_steps: T, how often the image is shown.
        num_heads, mlp_ratio: of the transformer blocks.
        attention: another token mixer for the transformer blocks, which is given spikes and followed by batch
            normalisation: a name, a mapping of ``name`` and parameters, or a list of these for stages 4 and 5, where
            None stands for the paper's own.
        img_size: for mixers with tables of positions: the image size, one number or (height, width).
        distilled: a second classifier, to be taught by another network: in training both answers are returned, in
            evaluation their mean.
        global_pool: as timm's; empty for none, which needs ``num_classes=0``.

    Raises:
        InputError: sizes do not divide, or the mixer is not known.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        dims: Sequence[int] = (128, 256, 512, 640),
        depths: Sequence[int] = (1, 1, 2, 6, 2),
        time_steps: int = 1,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        attention: Attention | Sequence[Attention] = None,
        img_size: int | Sequence[int] = 224,
        distilled: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mixers = _check(dims, depths, num_heads, attention)
        widths = (dims[0] // 2, *dims)
        (grid,) = stage_grids(img_size, [16])
        rates = drop_path_rates(drop_path_rate, depths[3:])
        stem = ConvNorm(in_chans, widths[0], 7, stride=2)
        stages = []
        for i, (width, count) in enumerate(zip(widths, depths, strict=True)):
            first: nn.Module = nn.Identity()
            if i:
                first = Downsample(widths[i - 1], width, stride=1 if i == 4 else 2, time_steps=time_steps)
            blocks: list[nn.Module]
            if i < 3:
                blocks = [ConvBlock(width, time_steps) for _ in range(count)]
            else:
                blocks = [
                    TransformerBlock(width, num_heads, mlp_ratio, time_steps, mixers[i - 3], j, grid, rates[i - 3][j])
                    for j in range(count)
                ]
            stages.append(Stage(first, blocks))
        super().__init__(
            stem,
            stages,
            nn.Identity(),
            widths,
            strides=(2, 4, 8, 16, 16),
            levels=LEVELS,
            in_chans=in_chans,
            num_classes=0,
            drop_rate=drop_rate,
        )
        self.time_steps, self.distilled = time_steps, distilled
        self.num_features = time_steps * dims[-1]
        self.lif = LIF(time_steps)
        self.drop = nn.Dropout(drop_rate)
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        self.reset_classifier(num_classes)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, where the mixer chosen has them."""
        return position_tables(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^head", (99999,))]
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^head", (99999,))] if coarse else fine}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, two when distilled; 0 classes for none, an empty ``global_pool`` for an unpooled map."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        if num_classes and not global_pool:
            raise InputError("metaspikformer: global_pool='' leaves nothing to classify; take num_classes=0.")
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head = self._classifier()
        self.head_dist = self._classifier() if self.distilled else nn.Identity()

    def _classifier(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        like = next(self.stem.parameters())
        classifier = nn.Linear(self.head_hidden_size, self.num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(classifier.weight, std=0.02)
        nn.init.zeros_(classifier.bias)
        return classifier

    def start(self, x: Tensor) -> Tensor:
        return self.stem(x).repeat(self.time_steps, 1, 1, 1)

    def level(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """The mean over time; there is no norm behind the stages."""
        return x.unflatten(0, (self.time_steps, -1)).mean(0)

    def finish(self, x: Tensor) -> Tensor:
        """(T * B, C, H, W) as (B, T * C, H, W)."""
        return x.unflatten(0, (self.time_steps, -1)).transpose(0, 1).flatten(1, 2)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of the levels ``indices`` do not need, in place, and return the levels' numbers."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.num_features = self.time_steps * self.head_hidden_size
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Firing rates (B, C), or logits (B, num_classes) of them; two of these in training when distilled."""
        if self.global_pool.is_identity():
            return x
        pooled = self.global_pool(x)
        # The classifier is affine, so the mean over time can be taken in front of it.
        steps = pooled.unflatten(1, (self.time_steps, -1)).transpose(0, 1).flatten(0, 1)
        rates = self.drop(self.lif(steps).unflatten(0, (self.time_steps, -1)).mean(0))
        if pre_logits or not self.num_classes:
            return rates
        if not self.distilled:
            return self.head(rates)
        both = self.head(rates), self.head_dist(rates)
        return both if self.training else (both[0] + both[1]) / 2


@torch.no_grad()
def fuse(model: MetaSpikeFormer) -> None:
    """Make each re-parameterised convolution of a trained ``model`` one 3 x 3 convolution, in place, for inference.

    What is computed in evaluation mode stays the same up to rounding, so that a membrane that is at its threshold to
    the last digits may fire where it did not.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RepConv):
                setattr(module, name, child.fused())


def _check(dims: Sequence[int], depths: Sequence[int], num_heads: int, attention: Any) -> list[Attention]:
    """The mixers of the two stages that have them."""
    if len(dims) != 4 or min(dims) < 2 or dims[0] % 2:
        raise InputError(f"metaspikformer: dims={list(dims)} must be four widths, the first of them even.")
    if len(depths) != 5 or min(depths) < 1:
        raise InputError(f"metaspikformer: depths={list(depths)} must be five positive numbers, one per stage.")
    if num_heads < 1 or any(width % num_heads for width in dims[2:]):
        raise InputError(f"metaspikformer: num_heads={num_heads} must divide dims[2:]={list(dims[2:])}.")
    if attention is None or isinstance(attention, str | Mapping):
        return [attention] * 2
    if not isinstance(attention, Sequence) or len(attention) != 2:
        raise InputError(
            f"metaspikformer: attention={attention!r} must be a name, a mapping with 'name', or a list of these for "
            "the two stages that have token mixers."
        )
    return list(attention)


_SOURCE = {"paper_ids": "arXiv:2404.03663", "origin_url": "https://github.com/BICLab/Spike-Driven-Transformer-V2"}
_CFG = describe("stem.conv", "unknown", pool_size=(14, 14), crop_pct=0.875, classifier="head", **_SOURCE)
default_cfgs = generate_default_cfgs({f"metaspikformer_8_{width}": _CFG for width in (256, 384, 512)})


def _build(variant: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build(MetaSpikeFormer, variant, pretrained, checkpoint_filter_fn, own, given)


@register_model
def metaspikformer_8_256(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 15 M parameters."""
    own = {"attention": attention, "dims": (64, 128, 256, 360)}
    return _build("metaspikformer_8_256", pretrained, own, kwargs)


@register_model
def metaspikformer_8_384(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 31 M parameters."""
    own = {"attention": attention, "dims": (96, 192, 384, 480)}
    return _build("metaspikformer_8_384", pretrained, own, kwargs)


@register_model
def metaspikformer_8_512(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of 55 M parameters."""
    own = {"attention": attention, "dims": (128, 256, 512, 640)}
    return _build("metaspikformer_8_512", pretrained, own, kwargs)
