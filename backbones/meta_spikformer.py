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
running variance then counts the image once); ``drop_path_rate`` rises linearly over the transformer blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

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


class MetaSpikeFormer(nn.Module):
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
        super().__init__()
        mixers = _check(dims, depths, num_heads, attention)
        widths = (dims[0] // 2, *dims)
        grid = tuple(-(-side // 16) for side in ((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.in_chans, self.num_classes, self.time_steps, self.distilled = in_chans, num_classes, time_steps, distilled
        self.stem = ConvNorm(in_chans, widths[0], 7, stride=2)
        stages = []
        for i, (width, count) in enumerate(zip(widths, depths, strict=True)):
            first: nn.Module = nn.Identity()
            if i:
                first = Downsample(widths[i - 1], width, stride=1 if i == 4 else 2, time_steps=time_steps)
            blocks: list[nn.Module]
            if i < 3:
                blocks = [ConvBlock(width, time_steps) for _ in range(count)]
            else:
                offset = 0 if i == 3 else depths[3]
                rates = [drop_path_rate * (offset + j) / (depths[3] + depths[4] - 1) for j in range(count)]
                blocks = [
                    TransformerBlock(width, num_heads, mlp_ratio, time_steps, mixers[i - 3], j, grid, rates[j])
                    for j in range(count)
                ]
            stages.append(Stage(first, blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": widths[i], "reduction": 2 << level, "module": f"stages.{i}"} for level, i in enumerate(LEVELS)
        ]
        self.head_hidden_size = dims[-1]
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
        return {name for name, _ in self.named_parameters() if "bias_table" in name or "rpb" in name.split(".")[-1]}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^head", (99999,))]
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^head", (99999,))] if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

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
        like = self.stem.conv.weight
        classifier = nn.Linear(self.head_hidden_size, self.num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(classifier.weight, std=0.02)
        nn.init.zeros_(classifier.bias)
        return classifier

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
            norm: of no account, there is no norm behind the stages.
            stop_early: leave out the stages behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt={output_fmt} is not possible; these maps are NCHW.")
        wanted = indices if indices is None or isinstance(indices, int) else list(indices)
        take, last = feature_take_indices(len(LEVELS), wanted)
        asked = [LEVELS[i] for i in take]
        x = self._start(x)
        maps = []
        for i, stage in enumerate(self.stages):
            if stop_early and intermediates_only and i > LEVELS[last]:
                break
            x = stage(x)
            if i in asked:
                maps.append(x.unflatten(0, (self.time_steps, -1)).mean(0))
        return maps if intermediates_only else (self._steps_in_channels(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the levels ``indices`` do not need, in place, and return the levels' numbers."""
        take, last = feature_take_indices(len(LEVELS), indices if isinstance(indices, int) else list(indices))
        shortened = LEVELS[last] < len(self.stages) - 1
        self.stages = self.stages[: LEVELS[last] + 1]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self._steps_in_channels(self.stages(self._start(x)))

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

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    def _start(self, x: Tensor) -> Tensor:
        return self.stem(x).repeat(self.time_steps, 1, 1, 1)

    def _steps_in_channels(self, x: Tensor) -> Tensor:
        """(T * B, C, H, W) as (B, T * C, H, W)."""
        return x.unflatten(0, (self.time_steps, -1)).transpose(0, 1).flatten(1, 2)


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


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head",
        "license": "unknown",
        "paper_ids": "arXiv:2404.03663",
        "origin_url": "https://github.com/BICLab/Spike-Driven-Transformer-V2",
    }


default_cfgs = generate_default_cfgs({f"metaspikformer_8_{width}": _cfg() for width in (256, 384, 512)})


def _build(variant: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        MetaSpikeFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **own | given,
    )


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
