"""The network of a configuration: described, built, and tried on a small input before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from kernels.errors import InputError
from tasks.common.segmentation.checkpoint import (
    Description,
    Segmenter,
    check_cutoff,
    fill_inference,
    inference_fields,
    segmenter_of,
)
from tasks.common.segmentation.fitting import plain
from tasks.qtseg.networks.build import build_network, check_network
from tasks.qtseg.preprocessing import Preprocessing

TASK = "qtseg"
INFERENCE = {"overlap": 0.5, "batch_size": 4, "flips": "none", "amp": False}
"""What ``inference`` is in training where it is null; see :func:`fill_inference`."""
CUT = {"cutoff": "argmax", "smallest": 0}


def build(description: Description, weights: bool = False) -> nn.Module:
    """The network, untrained.

    Args:
        weights: load the backbone's, where ``backbone.pretrained`` or ``backbone.checkpoint`` asks for some.
    """
    network = description.network
    backbone = network["backbone"]
    if backbone is not None and not weights:
        backbone = {**backbone, "pretrained": False, "checkpoint": None}
    return build_network(
        {
            "decoder": {"name": network["name"], **network["params"]},
            "backbone": backbone,
            "attention": network["attention"],
            "in_channels": network["in_channels"],
            "classes": len(description.classes),
            "size": network["size"],
        }
    )


def is_pretrained(description: Description) -> bool:
    """Whether the encoder begins with weights from elsewhere."""
    backbone = description.network["backbone"] or {}
    return bool(backbone.get("pretrained") or backbone.get("checkpoint"))


def describe(
    cfg: DictConfig, classes: Sequence[str], preprocessing: Preprocessing, smallest: tuple[int, int] | None = None
) -> Description:
    """What the checkpoints of a run will say of themselves; the network is built and run on one black image.

    Args:
        smallest: (height, width) of the smallest image, for ``data.resize=native``.

    Raises:
        InputError: decoder, backbone, attention or size cannot be used.
    """
    decoder = plain(cfg.decoder)
    native = preprocessing.resize == "native"
    described = {
        "name": str(decoder.pop("name")),
        "params": decoder,
        "backbone": plain(cfg.get("backbone")),
        "attention": plain(cfg.get("attention")),
        "in_channels": preprocessing.channels,
        "size": None if native else list(preprocessing.size),
    }
    fill_inference(cfg.inference, INFERENCE | CUT)
    stored, cut = stored_inference(cfg, preprocessing), {name: cfg.inference[name] for name in CUT}
    description = Description(described, tuple(classes), preprocessing.to_dict(), stored, cut)
    description.how().flipped_axes(2)
    if not isinstance(cfg.training.freeze_epochs, int) or cfg.training.freeze_epochs < 0:
        raise InputError(f"training.freeze_epochs={cfg.training.freeze_epochs} must be 0 or more.")
    with torch.random.fork_rng(devices=[]):
        network = build(description, weights=True)
        size = smallest if native and smallest is not None else preprocessing.size
        check_network(network, preprocessing.channels, len(classes), size)
    if cfg.training.freeze_epochs and is_pretrained(description) and not hasattr(network, "encoder"):
        raise InputError(
            f"decoder '{described['name']}' has no part called encoder that could be frozen; set "
            "training.freeze_epochs=0."
        )
    return description


def stored_inference(cfg: DictConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """Fields of :class:`Inference` for the section ``inference``.

    Raises:
        InputError: a setting cannot be used.
    """
    check_cut(cfg.inference)
    return inference_fields(cfg.inference, window_of(cfg.inference, preprocessing))


def window_of(settings: DictConfig, preprocessing: Preprocessing) -> list[int] | None:
    """(height, width) of the windows that images are seen in, None for whole images.

    Raises:
        InputError: ``inference.tile`` is no size, or there are no tiles.
    """
    tile = plain(settings.tile)
    if tile is None:
        return list(preprocessing.size) if preprocessing.resize == "tiles" else None
    if preprocessing.resize != "tiles":
        raise InputError(f"inference.tile={tile} goes with data.resize=tiles, not {preprocessing.resize}.")
    sides = [tile, tile] if isinstance(tile, int) else tile
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise InputError(f"inference.tile={tile} must be a number of pixels, or [height, width].")
    return sides


def check_cut(settings: DictConfig) -> None:
    """Raise InputError for a cut-off or a smallest component that cannot be."""
    if settings.smallest < 0:
        raise InputError(f"inference.smallest={settings.smallest} must be 0 pixels or more.")
    check_cutoff(settings.cutoff)


def load(cfg: DictConfig) -> Segmenter:
    """The segmenter of ``checkpoint=``; what is null in ``inference`` becomes what it was trained with.

    Raises:
        InputError: no checkpoint is given, or it cannot be used.
    """
    segmenter = segmenter_of(cfg, TASK, build)
    check_cut(cfg.inference)
    return segmenter
