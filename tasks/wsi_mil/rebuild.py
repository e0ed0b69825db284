"""The encoder and the tiles a checkpoint was trained with, made again for new slides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.wsi_mil.extract import weights_fingerprint
from tasks.wsi_mil.prepare_options import PrepareOptions
from tasks.wsi_mil.tissue import TissueOptions

if TYPE_CHECKING:
    from backbones.encoder import Encoder

# What of the tiles must be as in training.
_TILE_OPTIONS = ("mpp", "tile", "overlap", "min_tissue", "mpp_tolerance")


def rebuild_encoder(made_by: Mapping[str, Any], backbone: DictConfig) -> Encoder:
    """The encoder that made the features a model was trained on.

    Args:
        made_by: what the checkpoint says of its encoder (see ``provenance``): ``name``, ``weights`` (the line that says
            where they came from), ``fingerprint``, perhaps ``params``, ``seed``, ``pretrained`` and ``checkpoint``.
        backbone: the section of the configuration; its ``checkpoint`` says where a weights file is now.

    Raises:
        InputError: the checkpoint names no encoder, its weights cannot be had, or they are others than in training.
    """
    from backbones import create_encoder

    name = made_by.get("name")
    if not name:
        raise InputError(
            "the checkpoint does not say which encoder made its features; make features of the slides with "
            "action=prepare and give their folder as input."
        )
    given = backbone.get("params")
    params: Any = OmegaConf.to_container(given, resolve=True) if given and backbone.name == name else None
    source = _weights_source(str(name), made_by, backbone)
    encoder = create_encoder(str(name), params=made_by.get("params") or params, **source)
    expected = made_by.get("fingerprint")
    if expected and (found := weights_fingerprint(encoder)) != expected:
        raise InputError(
            f"encoder '{name}' has other weights ({encoder.weights}; {found}) than in training "
            f"({made_by.get('weights', 'unknown')}; {expected}); give the same weights with backbone.checkpoint=FILE."
        )
    return encoder


def _weights_source(name: str, made_by: Mapping[str, Any], backbone: DictConfig) -> dict[str, Any]:
    """``pretrained``, ``checkpoint`` or ``seed`` for ``create_encoder``."""
    if backbone.get("checkpoint") is not None:
        return {"checkpoint": backbone.checkpoint}
    if made_by.get("checkpoint"):
        return {"checkpoint": made_by["checkpoint"]}
    weights = str(made_by.get("weights") or "unknown")
    if seed := re.fullmatch(r"random, seed (\d+)", weights):
        return {"seed": int(seed[1])}
    from_file = re.search(r"\(sha256 \w+\)$", weights) is not None
    if made_by.get("pretrained") or not (from_file or weights == "unknown"):
        return {"pretrained": True}
    what = f"with weights {weights}" if from_file else "and the checkpoint does not say which weights"
    raise InputError(
        f"the model was trained on features of '{name}' {what}; say where the weights are with "
        "backbone.checkpoint=FILE."
    )


def prepare_options(tiles: Mapping[str, Any], cfg: DictConfig) -> PrepareOptions:
    """How new slides are cut: as in training, except for what concerns the single slide or the machine.

    Options of ``data.tissue`` go before those of training when any is set, for slides whose tissue is hard to find.

    Args:
        tiles: what the checkpoint says of its tiles (see ``provenance``).
    """
    asked_for = {**tiles, **(tiles.get("settings") or {})}
    known = {name: asked_for[name] for name in _TILE_OPTIONS if asked_for.get(name) is not None}
    options = PrepareOptions.from_config(cfg.data)
    if asked_for.get("tissue") and options.tissue == TissueOptions():
        known["tissue"] = TissueOptions(**asked_for["tissue"])
    return replace(options, **known)
