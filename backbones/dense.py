"""Pyramids as dense tasks use them: images of any size for GC ViT, and a layer norm behind each level of any pyramid.

timm's GC ViT takes images of the one size it is built for. Its authors' dense version (detection and segmentation code
of NVlabs/GCVit) takes any: each block pads its normed map with zeros, right and below, to a multiple of the window, and
a stage's global query is resized to the window. That is what :class:`AnySizeGCViT` does with timm's layers; images of
the native size give timm's numbers.

Source: Hatamizadeh et al., Global Context Vision Transformers, ICML 2023, arXiv:2206.09959. The authors' weights are
under CC BY-NC-SA 4.0. Variants, and ImageNet top-1 (%) of timm's weights: ``gcvit_any_xxtiny`` 79.8, ``xtiny`` 82.0,
``tiny`` 83.4, ``small`` 83.9, ``base`` 84.5; parameters 12.0, 20.0, 28.2, 51.1, 90.3 M.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.norm import LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.gcvit import FeatureBlock, GlobalContextVit
from torch import Tensor, nn

from backbones import any_size, official_names
from backbones.four_stages import only_nchw
from kernels.errors import InputError

__all__ = ["AnySizeGCViT", "LevelNorms", "checkpoint_filter_fn"]


class LevelNorms(nn.Module):
    """A pyramid with a layer norm over channels behind each level, as published dense versions have it.

    Images (B, C, H, W) to one map (B, C, ceil(H / stride), ceil(W / stride)) per level. The norms are in no ImageNet
    checkpoint: they start as 1 and 0 and are trained with the task.

    Args:
        model: a timm model with ``forward_intermediates``; what the levels do not need is taken off it.
        out_indices: its levels.
        normed: those of them that the model itself normalises and that get no other norm, 3 for GC ViT.
    """

    def __init__(
        self, model: nn.Module, out_indices: Sequence[int] = (0, 1, 2, 3), normed: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.out_indices = list(out_indices)
        info: Any = model.feature_info
        self.channels = [int(info[i]["num_chs"]) for i in out_indices]
        self.strides = [int(info[i]["reduction"]) for i in out_indices]
        prune: Any = model.prune_intermediate_layers
        prune(self.out_indices)
        self.level_norms = nn.ModuleDict(
            {
                str(i): LayerNorm2d(width, eps=1e-5)
                for i, width in zip(out_indices, self.channels, strict=True)
                if i not in normed
            }
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        run: Any = self.model.forward_intermediates
        maps = run(x, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True)
        found = []
        for i, y in zip(self.out_indices, maps, strict=True):
            found.append((self.level_norms[str(i)](y) if str(i) in self.level_norms else y).contiguous())
        return found


class AnySizeGCViT(GlobalContextVit):
    """timm's GC ViT for images of any size: (B, in_chans, H, W) to logits, or a pyramid of strides 4, 8, 16, 32.

    Args:
        query_pools: how often the map is halved on the way to the global query of each stage. None is for what fits
            ``img_size``, and once more in stage 3 where its window is not the whole map, as the authors' dense version.
        arguments: timm's.
    """

    def __init__(self, query_pools: Sequence[int] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        any_size.adapt(self)
        if query_pools is None:
            return
        if len(query_pools) != len(self.stages):
            raise InputError(f"gcvit: query_pools={list(query_pools)} needs one number for each of 4 stages.")
        for stage, pools in zip(self.stages, query_pools, strict=True):
            stage.global_block = FeatureBlock(stage.dim, pools)  # type: ignore[arg-type]
            stage.halves_query = False  # type: ignore[assignment]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the stages ``indices``; see timm's."""
        only_nchw(output_fmt)
        return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Released weights under timm's names (see :mod:`backbones.official_names`), for a network or its dense version.

    Norms behind levels that a file lacks are taken as they are made.
    """
    state = official_names.to_timm(state_dict)
    if not isinstance(model, LevelNorms):
        return state
    own = model.state_dict()
    renamed = {key: value for key, value in own.items() if key.startswith("level_norms.")}
    for key, value in state.items():
        name = key if key.startswith(("level_norms.", "model.")) else f"model.{key}"
        if name in own or not name.startswith(("model.head.", "level_norms.")):
            renamed[name] = value
    return renamed


_VARIANTS: dict[str, dict[str, Any]] = {
    "xxtiny": {"depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16)},
    "xtiny": {"depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)},
    "tiny": {"depths": (3, 4, 19, 5), "num_heads": (2, 4, 8, 16)},
    "small": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2, "layer_scale": 1e-5},
    "base": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2, "layer_scale": 1e-5},
}


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "cc-by-nc-sa-4.0",
        "paper_ids": "arXiv:2206.09959",
    }


default_cfgs = generate_default_cfgs({f"gcvit_any_{name}": _cfg() for name in _VARIANTS})


def _build(name: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        AnySizeGCViT,
        f"gcvit_any_{name}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **_VARIANTS[name] | given,
    )


@register_model
def gcvit_any_xxtiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-XXT for any image size."""
    return _build("xxtiny", pretrained, kwargs)


@register_model
def gcvit_any_xtiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-XT for any image size."""
    return _build("xtiny", pretrained, kwargs)


@register_model
def gcvit_any_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-T for any image size."""
    return _build("tiny", pretrained, kwargs)


@register_model
def gcvit_any_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-S for any image size."""
    return _build("small", pretrained, kwargs)


@register_model
def gcvit_any_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-B for any image size."""
    return _build("base", pretrained, kwargs)
