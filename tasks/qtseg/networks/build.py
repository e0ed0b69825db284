"""Networks by name: a decoder, a backbone as its encoder, an attention module where one is asked for."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernels.errors import InputError, nearest_name, unknown_name
from tasks.qtseg.networks import peers
from tasks.qtseg.networks.choices import Chosen, chosen
from tasks.qtseg.networks.encoders import Backbone
from tasks.qtseg.networks.levels import nearest_levels
from tasks.qtseg.networks.qtseg import STRIDES as QTSEG_STRIDES
from tasks.qtseg.networks.qtseg import QTSeg
from tasks.qtseg.networks.self_guided import STRIDES as SELF_GUIDED_STRIDES
from tasks.qtseg.networks.self_guided import SelfGuided
from tasks.qtseg.networks.unet import STRIDES as UNET_STRIDES
from tasks.qtseg.networks.unet import DoubleConvEncoder, UNet

Size = int | Sequence[int] | None


def build_network(settings: Mapping[str, Any]) -> nn.Module:
    """A network that gives logits (B, classes, H, W) for images (B, in_channels, H, W) of any size.

    Args:
        settings: ``decoder`` (a name, or ``name`` and parameters, as in ``conf/decoder``); ``backbone`` (``name``,
            ``params``, ``pretrained``, ``checkpoint``, as in ``conf/backbone``; null for the decoder's own);
            ``attention`` (``name`` and parameters, as in ``conf/attention``, or null); ``in_channels`` (3), ``classes``
            (2, with the background) and ``size`` (side in pixels, (height, width), or null where it is not known).

    Raises:
        InputError: a name or parameter is unknown or impossible, the attention has no place, or weights do not fit.
    """
    known = {"decoder", "backbone", "attention", "in_channels", "classes", "size"}
    for key in settings.keys() - known:
        raise unknown_name("setting", key, known)
    decoder = settings.get("decoder") or "qtseg"
    params = {"name": decoder} if isinstance(decoder, str) else dict(decoder)
    name = params.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"decoder={dict(params)} has no name; take one of {', '.join(available_decoders())}.")
    in_channels, classes = settings.get("in_channels", 3), settings.get("classes", 2)
    if min(in_channels, classes) < 1:
        raise InputError(f"in_channels={in_channels} and classes={classes} must be at least 1.")
    size = settings.get("size")
    backbone = settings.get("backbone")
    made = None if backbone is None else Backbone(backbone, in_channels, size)
    parts = _Parts(made, settings.get("attention"), in_channels, classes, size)
    if ":" in name:
        return _own(name, parts, params)
    builder = _BUILDERS.get(name.lower())
    if builder is None:
        raise unknown_name(
            "decoder", name, _BUILDERS, "A class of your own is named by its path, package.module:Class."
        )
    _check_params(name, builder, params)
    return builder(parts, **params)


def available_decoders() -> list[str]:
    """Names of the decoders, in alphabetical order."""
    return sorted(_BUILDERS)


@torch.no_grad()
def check_network(network: nn.Module, in_channels: int, classes: int, size: int | Sequence[int]) -> None:
    """Run one image through the network.

    Raises:
        InputError: it does not take images of this size, or does not give logits of theirs.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    training = network.training
    sample = next(network.parameters())
    try:
        found = network.eval()(torch.zeros(1, in_channels, *sides, device=sample.device, dtype=sample.dtype))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise InputError(f"the network does not take images of {sides[0]} x {sides[1]} pixels ({reason}).") from error
    finally:
        network.train(training)
    shape = tuple(getattr(found, "shape", ()))
    if shape != (1, classes, *sides):
        raise InputError(f"the network gives {shape or type(found).__name__} for an image, not {(1, classes, *sides)}.")


class _Parts:
    """What every builder is given.

    Attributes:
        backbone: that was chosen, or None for the decoder's own.
        entry: of ``attention``.
    """

    def __init__(
        self, backbone: Backbone | None, entry: Mapping[str, Any] | None, in_channels: int, classes: int, size: Size
    ) -> None:
        self.backbone, self.entry = backbone, entry
        self.in_channels, self.classes, self.size = in_channels, classes, size

    def backbone_or(self, name: str) -> Backbone:
        """The backbone chosen, or the decoder's own."""
        return self.backbone or Backbone(name, self.in_channels, self.size)

    def attention(self, backbone: Backbone | None, takes_gates: bool = True) -> Chosen:
        """Where the attention goes."""
        return chosen(self.entry, lambda: backbone is not None and backbone.takes_mixers(), takes_gates)

    def without_backbone(self, decoder: str) -> None:
        """Refuse a backbone, and any attention, for a network that has no place for either."""
        if self.backbone is not None:
            raise InputError(
                f"decoder '{decoder}' has an encoder of its own, so backbone='{self.backbone.name}' does not apply; "
                "leave it out (backbone=null), or take decoder=unet or qtseg."
            )
        self.attention(None, takes_gates=False)


def _qtseg(
    parts: _Parts,
    width: int = 16,
    depths: Sequence[int] = (1, 2, 3),
    num_heads: int = 8,
    mlp_dim: int = 2048,
    fine: bool = True,
) -> nn.Module:
    backbone = parts.backbone_or("qtseg_encoder")
    if backbone.name == "qtseg_encoder":
        backbone.params.setdefault("width", width)
    attention = parts.attention(backbone)

    def wanted(strides: Sequence[float]) -> list[int]:
        return nearest_levels(strides, (4, *QTSEG_STRIDES) if fine and 4 in strides else QTSEG_STRIDES)

    return QTSeg(
        backbone.build(wanted, attention.mixer),
        parts.classes,
        width=width,
        depths=tuple(depths),
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        gates=attention.gates([(stride * width // 2,) * 2 for stride in QTSEG_STRIDES]),
        fine=fine,
    )


def _unet(parts: _Parts, width: int | None = None, depth: int = 5, deep_supervision: bool = False) -> nn.Module:
    attention = parts.attention(parts.backbone)
    encoder: nn.Module
    if parts.backbone is None:
        width = 64 if width is None else width
        encoder = DoubleConvEncoder(parts.in_channels, width, depth)
    else:
        width = 16 if width is None else width
        encoder = parts.backbone.build(_pyramid_levels, attention.mixer)
    return UNet(
        encoder,
        parts.classes,
        width=width,
        gates=attention.gates(UNet.gate_dims(encoder, width)) if attention.gate is not None else None,
        deep_supervision=deep_supervision,
    )


def _pyramid_levels(strides: Sequence[float]) -> list[int]:
    """The deepest map of every stride of a pyramid; of other networks maps of growing depth."""
    distinct = sorted(set(strides))
    return nearest_levels(strides, [int(s) for s in distinct] if len(distinct) > 2 else UNET_STRIDES)


def _self_guided(parts: _Parts, width: int = 64, guided_weight: float = 0.25, rebuilt_weight: float = 0.1) -> nn.Module:
    if width < 1:
        raise InputError(f"decoder self_guided: width={width} must be at least 1.")
    backbone = parts.backbone_or("resnext101_32x8d")
    attention = parts.attention(backbone)
    return SelfGuided(
        backbone.build(lambda strides: nearest_levels(strides, SELF_GUIDED_STRIDES), attention.mixer),
        parts.classes,
        width=width,
        gates=attention.gates([(width, width)] * len(SELF_GUIDED_STRIDES)),
        guided_weight=guided_weight,
        rebuilt_weight=rebuilt_weight,
    )


def _flexible_unet(parts: _Parts, decoder_channels: Sequence[int] = (256, 128, 64, 32, 16)) -> nn.Module:
    backbone = parts.backbone_or("resnet18")
    attention = parts.attention(backbone, takes_gates=False)
    arguments = backbone.arguments(attention.mixer)
    return peers.flexible_unet(parts.in_channels, parts.classes, arguments, decoder_channels)


def _peer(name: str, make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder of a network that has no place for a backbone."""

    def builder(parts: _Parts, **params: Any) -> nn.Module:
        parts.without_backbone(name)
        return make(parts.in_channels, parts.classes, **params)

    builder.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    return builder


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "qtseg": _qtseg,
    "unet": _unet,
    "self_guided": _self_guided,
    "flexible_unet": _flexible_unet,
    "monai_unet": _peer("monai_unet", peers.monai_unet),
    "attention_unet": _peer("attention_unet", peers.attention_unet),
    "swin_unetr": _peer("swin_unetr", peers.swin_unetr),
    "segresnet": _peer("segresnet", peers.segresnet),
}


def _check_params(name: str, builder: Callable[..., nn.Module], params: Mapping[str, Any]) -> None:
    accepted = [key for key in inspect.signature(builder).parameters if key not in ("parts", "in_channels", "classes")]
    for key in params:
        if key not in accepted:
            near = nearest_name(key, accepted)
            hint = f" Did you mean '{near}'?" if near else ""
            raise InputError(f"decoder '{name}' has no parameter '{key}'.{hint} It takes: {', '.join(accepted)}.")


def _own(path: str, parts: _Parts, params: Mapping[str, Any]) -> nn.Module:
    """A class of the user's: ``Class(in_channels=, classes=, **params)``, ``encoder=`` where there is a backbone."""
    module_name, _, class_name = path.partition(":")
    try:
        cls = operator.attrgetter(class_name)(importlib.import_module(module_name))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"decoder '{path}' cannot be imported ({error}); the form is package.module:Class and the package must be "
            "importable from where the command runs."
        ) from error
    attention = parts.attention(parts.backbone, takes_gates=False)
    given = {"in_channels": parts.in_channels, "classes": parts.classes, **params}
    if parts.backbone is not None:
        given["encoder"] = parts.backbone.build(_pyramid_levels, attention.mixer)
    try:
        made = cls(**given)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"decoder '{path}' cannot be built with {', '.join(given)} ({reason}).") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"decoder '{path}' gave a {type(made).__name__}; a torch.nn.Module is needed.")
    return made
