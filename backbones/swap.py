"""Other attention in networks that are already built, in place: all other weights stay what they are.

Mixers replace the token mixers of transformers (:func:`replace_attention`), gates follow the stages of convolutional
pyramids (:func:`add_gates`). What replaces what, family by family: :mod:`backbones.families`.

- Vision transformers: the mixer sees the patch tokens on their grid, whatever the image's size. Class and register
  tokens read all tokens by the registry's ``cross`` and are not seen by the patch tokens. Rotary and shared relative
  positions are not used any more; absolute position embeddings are.
- Swin, MaxViT, GC ViT, DaViT, SAM: the mixer sees the whole map, not one window or partition of it. The blocks that
  alternate in these networks are numbered within a stage, so that a mixer that alternates does so too. The channel
  attention of DaViT and the global queries of GC ViT mix in other ways: the first stays, the second goes.
- VOLO, PVT v2, Twins, MetaFormer, FocalNet, InceptionNeXt: block by block. VOLO's class attention stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import convnext, efficientnet, mobilenetv3, regnet, resnet
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import nn

from backbones import families
from backbones.choices import HostKind, per_stage
from backbones.families import FAMILIES
from backbones.pyramid import Pyramid
from kernels.errors import InputError

__all__ = ["FAMILIES", "GATED_FAMILIES", "Change", "add_gates", "gated_stages", "replace_attention", "takes"]

GATED_FAMILIES = "ResNet (ResNeXt, SE and wide ones), ConvNeXt, RegNet, EfficientNet, MobileNetV3 and metaformer_*"
_PYRAMIDS = (resnet.ResNet, convnext.ConvNeXt, regnet.RegNet, efficientnet.EfficientNet, mobilenetv3.MobileNetV3)


@dataclass(frozen=True)
class Change:
    """What has been done to a network.

    Attributes:
        modules: number of modules that were put in.
        kept: parameters, counted one by one, that are as they were.
        new: parameters of what was put in.
        removed: parameters of what was taken out.
    """

    modules: int
    kept: int
    new: int
    removed: int

    def __str__(self) -> str:
        return f"{self.modules} modules put in: {self.kept:,} parameters kept, {self.new:,} new, {self.removed:,} gone"


def replace_attention(model: nn.Module, attention: Any, *, img_size: int | Sequence[int] | None = None) -> Change:
    """Put mixers in the place of the token mixers of a timm model, in place.

    Args:
        model: of one of the families of :data:`backbones.families.FAMILIES`.
        attention: a choice of :mod:`backbones.choices`, or a list with one per stage (one for a vision transformer),
            where None leaves a stage as it is.
        img_size: image size, one number or (height, width), for which tables are built that depend on it; the model's
            own when left out.

    Raises:
        InputError: the model has no place for a mixer, the choice is no mixer, or the list has another length.
    """
    model = _unwrapped(model)
    stages = families.stages_of(model)
    if not stages:
        raise families.refuse(model)
    choices = per_stage(attention, len(stages), "mixer", f"this {type(model).__name__}")
    height, width = _image_size(model, img_size)

    def change() -> int:
        mixers = []
        for stage, choice in zip(stages, choices, strict=True):
            grid = (-(-height // stage.stride), -(-width // stage.stride))
            for index, place in enumerate(stage.places if choice is not None else ()):
                assert choice is not None
                mixers.append((place, choice.build(place.dim, index, num_heads=place.num_heads, input_size=grid)))
        # All are built before the first is installed, so that a choice that is refused leaves the model as it was.
        for place, mixer in mixers:
            place.install(mixer)
        families.forget_positions(model)
        return len(mixers)

    return _counted(model, change)


def add_gates(model: nn.Module, gate: Any) -> Change:
    """Put a gate after each stage of a convolutional pyramid that gives a feature map, in place.

    It becomes the last child of the stage, ``gate``, so that the names of all other parameters stay what they are.

    Args:
        model: of one of the families of :data:`GATED_FAMILIES`.
        gate: a choice of :mod:`backbones.choices`, or a list with one per stage, where None adds none.

    Raises:
        InputError: the model is no such pyramid, the choice is no gate, or the list has another length.
    """
    model = _unwrapped(model)
    stages = gated_stages(model)
    if not stages:
        raise InputError(
            f"{type(model).__name__} is no convolutional pyramid that takes gates after its stages; these do: "
            f"{GATED_FAMILIES}."
        )
    choices = per_stage(gate, len(stages), "gate", f"this {type(model).__name__}")

    def change() -> int:
        gates = [
            None if choice is None else choice.build(dim, index)
            for index, (choice, (_, dim)) in enumerate(zip(choices, stages, strict=True))
        ]
        for (stage, _), module in zip(stages, gates, strict=True):
            if module is not None:
                stage.add_module("gate", module)
        return sum(module is not None for module in gates)

    return _counted(model, change)


def takes(model: nn.Module) -> list[HostKind]:
    """What can be put into ``model``: mixers, gates, or nothing."""
    if families.stages_of(model):
        return ["mixer"]
    return ["gate"] if gated_stages(model) else []


def gated_stages(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The stages after which gates can be put, each a module that runs its children in turn, with their channels."""
    if not isinstance(model, _PYRAMIDS):
        return []
    stages = []
    infos: Any = model.feature_info
    for info in infos if isinstance(infos, list) else infos.get_dicts():
        module = model.get_submodule(info["module"])
        module = module.blocks if isinstance(module, convnext.ConvNeXtStage) else module
        if isinstance(module, nn.Sequential | regnet.RegStage) and any(True for _ in module.children()):
            stages.append((module, info["num_chs"]))
    return [(module, dim) for module, dim in stages if module is not getattr(model, "stem", None)]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a pyramid or timm's wrapper for feature maps, of the kind that keeps it whole."""
    if isinstance(model, Pyramid | FeatureGetterNet):
        return model.model
    if isinstance(model, FeatureDictNet | FeatureHookNet):
        raise InputError(
            "this network has been taken apart for its feature maps; change it before that, which "
            "backbones.create(NAME, features_only=True, attention=...) does."
        )
    return model


def _counted(model: nn.Module, change: Callable[[], int]) -> Change:
    """Run ``change``, put what is new where the model is, and count."""
    before = {id(parameter): parameter for parameter in model.parameters()}
    sample = next(iter(before.values()))
    modules = set(model.modules())
    with torch.device(sample.device):
        count = change()
    for module in model.modules():
        if module not in modules:
            module.train(model.training)
            if sample.dtype != torch.get_default_dtype():
                module.to(sample.dtype)
    kept = new = 0
    for parameter in model.parameters():
        if id(parameter) in before:
            kept += parameter.numel()
        else:
            new += parameter.numel()
    return Change(count, kept, new, sum(parameter.numel() for parameter in before.values()) - kept)


def _image_size(model: nn.Module, img_size: int | Sequence[int] | None) -> tuple[int, int]:
    if img_size is None:
        embed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        cfg = getattr(model, "pretrained_cfg", None) or {}
        img_size = embed_size or cfg.get("input_size", (3, 224, 224))[1:]
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"img_size={img_size} must be one number or (height, width), in pixels.")
    return int(sides[0]), int(sides[1])
