"""From the names of BiFormer's released weights to those of :class:`backbones.biformer.BiFormer`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attention.bi_level_routing import BiLevelRoutingAttention
from backbones.weights import State, unwrapped
from kernels.errors import InputError

_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(.+)")
# The MLP is a list whose activation, and convolution or none, are counted too.
_MLP = {"0": "fc1", "1.dwconv": "conv", "2": "fc2", "3": "fc2"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> State:
    """The weights of a released checkpoint by our names; weights that have them already pass unchanged.

    Taken are classifiers, and detectors and segmenters, of which the backbone is kept. Norms of the levels that the
    model has and the checkpoint has not stay as they are.

    Raises:
        InputError: the checkpoint has norms of the levels and the model has none.
    """
    state = _backbone(state_dict)
    if any(key.startswith("downsample_layers.") for key in state):
        state = _renamed(state)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("level_norms.")}
    if not own and any(key.startswith("level_norms.") for key in state):
        raise InputError("biformer: these weights have a norm for each level; build the model with level_norms=true.")
    return own | state


def _backbone(state_dict: Mapping[str, Any]) -> State:
    """The weights alone, and of a detector or segmenter those of its backbone."""
    state = unwrapped(state_dict)
    part = "backbone."
    if any(key.startswith(f"{part}downsample_layers.") for key in state):
        return {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
    return state


def _renamed(state: State) -> State:
    if "downsample_layers.0.3.weight" in state:
        stem, downsample = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}, {"0": "conv", "1": "norm"}
    else:
        stem, downsample = {"0": "conv", "1": "norm"}, {"0": "norm", "1": "conv"}
    found: State = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if block is not None:
            stage, index, inner = block.groups()
            found |= {f"stages.{stage}.blocks.{index}.{k}": v for k, v in _in_block(inner, value).items()}
        elif key.startswith("downsample_layers."):
            _, place, layer, leaf = key.split(".")
            ours = f"stem.{stem[layer]}" if place == "0" else f"stages.{place}.downsample.{downsample[layer]}"
            found[f"{ours}.{leaf}"] = value
        elif key.startswith("head."):
            found[f"head.fc.{key.removeprefix('head.')}"] = value
        else:
            found[re.sub(r"^extra_norms\.", "level_norms.", key)] = value
    return found


def _in_block(key: str, value: Tensor) -> State:
    """One entry of a block; the form with channels first has 1 x 1 convolutions for linear layers."""
    part, _, rest = key.partition(".")
    if part == "attn":
        return {f"mixer.{k}": v for k, v in BiLevelRoutingAttention.checkpoint_filter({rest: value}).items()}
    if part == "mlp":
        layer, _, leaf = rest.rpartition(".")
        ours = _MLP[layer]
        return {f"mlp.{ours}.{leaf}": value.flatten(1) if value.dim() == 4 and ours != "conv" else value}
    if part in ("gamma1", "gamma2"):
        return {f"ls{part[-1]}.gamma": value}
    return {key.replace("pos_embed.", "position."): value}
