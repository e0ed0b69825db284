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
from tasks.meningioma.networks.build import build_network, refuse_backbone
from tasks.meningioma.preparation import Preparation

TASK = "meningioma"
INFERENCE = {"overlap": 0.5, "flips": "none", "amp": False}
"""What ``inference`` is in training where it is null; see :func:`fill_inference`."""
CUT = {"cutoff": "search", "cut_first": False, "smallest_ml": 0.0}


def build(description: Description) -> nn.Module:
    """The network, untrained."""
    network = description.network
    return build_network(
        {"name": network["name"], **network["params"]},
        network["in_channels"],
        len(description.classes),
        network["attention"],
        tuple(network["size"]),
    )


def describe(cfg: DictConfig, in_channels: int, classes: Sequence[str], preparation: Preparation) -> Description:
    """What the checkpoints of a run will say of themselves; the network is built once.

    Raises:
        InputError: network, attention or size cannot be used.
    """
    refuse_backbone(plain(cfg.get("backbone")))
    network = plain(cfg.network)
    size = seen_size(preparation)
    described = {
        "name": str(network.pop("name")),
        "params": network,
        "attention": plain(cfg.get("attention")),
        "in_channels": in_channels,
        "size": list(size),
    }
    fill_inference(cfg.inference, INFERENCE | CUT)
    inference, cut = stored_inference(cfg, preparation), {name: cfg.inference[name] for name in CUT}
    description = Description(described, tuple(classes), preparation.as_dict(), inference, cut)
    description.how().flipped_axes(3)
    with torch.random.fork_rng(devices=[]):
        build(description)
    return description


def seen_size(preparation: Preparation) -> tuple[int, int, int]:
    """(D, H, W) of what the network is trained on: whole volumes, or patches."""
    stored = preparation.as_dict()
    depth, height, width = stored.get("size") or stored["patch"]
    return depth, height, width


def stored_inference(cfg: DictConfig, preparation: Preparation) -> dict[str, Any]:
    """Fields of :class:`Inference` for the section ``inference``.

    Raises:
        InputError: a setting cannot be used.
    """
    check_cut(cfg.inference)
    return inference_fields(cfg.inference, list(seen_size(preparation)) if preparation.recipe == "sliding" else None)


def check_cut(settings: DictConfig) -> None:
    """Raise InputError for a cut-off or a smallest component that cannot be."""
    if settings.smallest_ml < 0:
        raise InputError(f"inference.smallest_ml={settings.smallest_ml} must be 0 or more.")
    check_cutoff(settings.cutoff)


def load(cfg: DictConfig) -> Segmenter:
    """The segmenter of ``checkpoint=``; what is null in ``inference`` becomes what it was trained with.

    Raises:
        InputError: no checkpoint is given, or it cannot be used.
    """
    segmenter = segmenter_of(cfg, TASK, build)
    check_cut(cfg.inference)
    return segmenter
