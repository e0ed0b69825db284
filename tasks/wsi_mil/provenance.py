"""What a feature file says of its making, kept with a trained classifier to make the same features of a new slide."""

from __future__ import annotations

import json
from typing import Any

from tasks.wsi_mil.features import BagInfo, read_attributes

_ENCODER = ("name", "pretrained", "checkpoint", "seed", "params", "weights", "fingerprint")
_TILES = {
    "requested_mpp": "mpp",
    "patch_size": "tile",
    "overlap": "overlap",
    "min_tissue": "min_tissue",
}


def read_provenance(info: BagInfo) -> dict[str, dict[str, Any]]:
    """``{"encoder": ..., "tiles": ...}`` of one bag; both are empty for files made elsewhere that say nothing.

    ``encoder`` holds what ``backbones.create_encoder`` needs, the line on its weights and their fingerprint; ``tiles``
    the options of ``action=prepare`` that cut them.
    """
    attributes = read_attributes(info)
    encoder = _decoded(attributes.get("encoder_spec")) or {}
    if "encoder" in attributes:
        encoder.setdefault("name", str(attributes["encoder"]))
        encoder.setdefault("weights", str(attributes.get("weights", "unknown")))
        encoder.setdefault("fingerprint", str(attributes.get("weights_fingerprint", "")))
    tiles = {ours: _plain(attributes[theirs]) for theirs, ours in _TILES.items() if theirs in attributes}
    tiles |= {"settings": settings} if (settings := _decoded(attributes.get("settings"))) else {}
    return {"encoder": {key: value for key, value in encoder.items() if key in _ENCODER}, "tiles": tiles}


def _decoded(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if isinstance(text, str | bytes) else text
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
