"""The network of a run: a backbone by name, with an attention module where one is asked for, and its first check."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import backbones
from backbones import registry
from backbones.checkpoints import find_file, load, read_state
from kernels.errors import InputError

_FORWARD_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)


def build_network(
    backbone: Mapping[str, Any], attention: Mapping[str, Any] | None, num_classes: int, img_size: int
) -> nn.Module:
    """A network that gives logits (B, num_classes) for images (B, 3, img_size, img_size).

    Args:
        backbone: ``name`` and, where wanted, ``params``, ``pretrained``, ``checkpoint``; the classifier is always new.
        attention: ``name`` and parameters, as in ``conf/attention``. ``stages`` has one entry per stage: true for the
            module, false or null for the stage as it is, or another module (a name, or a mapping with ``name``).

    Raises:
        InputError: a name or parameter is unknown, the backbone has no place for the attention, or weights do not fit.
    """
    name, pretrained, checkpoint = backbone["name"], bool(backbone.get("pretrained")), backbone.get("checkpoint")
    arguments: dict[str, Any] = {"attention": attention_argument(attention), **(backbone.get("params") or {})}
    if not registry.is_dotted_path(name):
        arguments.setdefault("img_size", img_size)
    model = _create(name, num_classes=num_classes, **arguments)
    if pretrained and checkpoint is not None:
        raise InputError(f"backbone '{name}': pretrained=true and checkpoint={checkpoint} exclude each other.")
    if not pretrained and checkpoint is None:
        return model
    donor = _create(name, pretrained=pretrained, num_classes=0, **arguments)
    if checkpoint is not None:
        load(donor, read_state(find_file(checkpoint)), name, f"backbone.checkpoint={checkpoint}")
    missing = model.load_state_dict(donor.state_dict(), strict=False).missing_keys
    classifier = {id(p) for p in model.get_classifier().parameters()} if hasattr(model, "get_classifier") else set()  # type: ignore[operator]
    others = [key for key, p in model.named_parameters() if key in missing and id(p) not in classifier]
    if others and classifier and not hasattr(model, "forward_exits"):
        raise InputError(f"backbone '{name}': its weights have no {others[0]}; it cannot be started from them.")
    return model


def _create(name: str, **arguments: Any) -> nn.Module:
    """``backbones.create`` without its log line, which every fold would repeat."""
    logger = logging.getLogger("backbones.registry")
    before, logger.disabled = logger.disabled, True
    try:
        return backbones.create(name, **arguments)
    finally:
        logger.disabled = before


def attention_argument(chosen: Mapping[str, Any] | None) -> Any:
    """What ``backbones.create`` takes for ``attention``: None, one choice, or one per stage."""
    if chosen is None:
        return None
    one = {key: value for key, value in chosen.items() if key != "stages"}
    stages = chosen.get("stages")
    if stages is None:
        return one
    if isinstance(stages, str | Mapping | bool | int):
        raise InputError(f"attention.stages={stages} must be a list with one entry per stage, such as [false,true].")
    return [None if entry in (None, False) else one if entry is True else entry for entry in stages]


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Input size, mean and deviation that the backbone states for itself."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return {
        "img_size": int(cfg.get("input_size", (3, 224, 224))[-1]),
        "mean": tuple(float(v) for v in cfg.get("mean", (0.485, 0.456, 0.406))),
        "std": tuple(float(v) for v in cfg.get("std", (0.229, 0.224, 0.225))),
    }


def own_input_size(name: str) -> int:
    """The side of the images a backbone was made for; 224 where it does not say."""
    if registry.is_dotted_path(name):
        return 224
    import timm

    cfg = timm.get_pretrained_cfg(registry.resolve(name, False)) if not name.startswith(registry.HUB) else None
    return int(cfg.input_size[-1]) if cfg is not None and cfg.input_size else 224


@torch.no_grad()
def check_network(model: nn.Module, name: str, num_classes: int, img_size: int) -> None:
    """Run two images through the network.

    Raises:
        InputError: it does not take images of this size, or does not give (2, num_classes).
    """
    training = model.training
    model.eval()
    try:
        logits = model(torch.zeros(2, 3, img_size, img_size))
    except _FORWARD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:150]
        raise InputError(f"backbone '{name}' does not take images of {img_size} pixels ({reason}).") from error
    finally:
        model.train(training)
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, num_classes):
        raise InputError(
            f"backbone '{name}' gives {shape or type(logits).__name__} for 2 images, not (2, {num_classes})."
        )
