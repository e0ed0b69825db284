"""From the names of Meta-SpikeFormer's released code to those of :mod:`backbones.meta_spikformer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from backbones.weights import unwrapped

_PLACES = {
    "downsample1_1.": "stem.",
    "ConvBlock1_1.0.": "stages.0.blocks.0.",
    "downsample1_2.": "stages.1.downsample.",
    "ConvBlock1_2.0.": "stages.1.blocks.0.",
    "downsample2.": "stages.2.downsample.",
    "ConvBlock2_1.0.": "stages.2.blocks.0.",
    "ConvBlock2_2.0.": "stages.2.blocks.1.",
    "downsample3.": "stages.3.downsample.",
    "block3.": "stages.3.blocks.",
    "downsample4.": "stages.4.downsample.",
    "block4.": "stages.4.blocks.",
    "head_kd.": "head_dist.",
}
_PARTS = {
    "encode_conv": "conv",
    "encode_bn": "bn",
    ".Conv.": ".sep.",
    "_conv.0.body.0.": ".conv1.",
    "_conv.0.body.1.bn.": ".bn1.",
    "_conv.0.body.2.0.": ".dw.",
    "_conv.0.body.2.1.": ".conv2.",
    "_conv.0.body.2.2.": ".bn2.",
    "_conv.1.": ".bn.",
    "fc1_conv": "fc1",
    "fc1_bn": "bn1",
    "fc2_conv": "fc2",
    "fc2_bn": "bn2",
}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' weights under this model's names; its own state dicts pass unchanged."""
    state = unwrapped(state_dict)
    if "downsample1_1.encode_conv.weight" not in state:
        return state
    renamed = {}
    for key, value in state.items():
        for old, new in _PLACES.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        for old, new in _PARTS.items():
            key = key.replace(old, new)
        # Convolutions over tokens in a row are 1 x 1 convolutions of the map.
        renamed[key] = value.unsqueeze(-1) if value.ndim == 3 else value
    return renamed
