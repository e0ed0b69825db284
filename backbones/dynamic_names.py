"""From the names of Dynamic Perceiver's released weights to those of :mod:`backbones.dynamic_perceiver`.

The released models hold torchvision's RegNet and MobileNetV3 and timm's ResNet; here all three are of timm's blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from backbones.weights import unwrapped

_LAYER = {
    "cross_attn.q_norm": "norm_query",
    "cross_attn.kv_norm": "norm_context",
    "cross_attn.attention": "attn",
    "self_attn.norm": "norm",
    "self_attn.attention": "attn",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "proj",
    "relative_position_bias": "key_bias",
    "mlp.layernorm": "mlp.norm",
}
_HEAD = {
    "early_classifier3": "head.exit1",
    "classifier_att": "head.exit2",
    "isc3.0": "head.recycle1.fc",
    "isc3.1": "head.recycle1.bn",
    "isc4.0": "head.recycle2.fc",
    "isc4.1": "head.recycle2.bn",
    "classifier_merge.0": "head.exit4.bn",
}
_HEAD_PLAIN = {"classifier_cnn": "head.exit3.fc", "classifier_merge.1": "head.exit4.fc"}
_HEAD_HIDDEN = {
    "classifier_cnn.0": "head.exit3.hidden.0",
    "classifier_cnn.3": "head.exit3.fc",
    "classifier_merge.1": "head.exit4.hidden.0",
    "classifier_merge.4": "head.exit4.fc",
}
_REGNET_BLOCK = {
    "proj.0": "downsample.conv",
    "proj.1": "downsample.bn",
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se": "se",
    "f.c.0": "conv3.conv",
    "f.c.1": "conv3.bn",
}
_MOBILE_EXPAND = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}
_MOBILE_PLAIN = {"0.0": "conv_dw", "0.1": "bn1", "1.0": "conv_pw", "1.1": "bn2"}
_MOBILE_LATE = {"2.fc1": "se.conv_reduce", "2.fc2": "se.conv_expand", "2.0": "conv_pwl", "2.1": "bn3"}
_MOBILE_LATE |= {"3.0": "conv_pwl", "3.1": "bn3"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' weights under this model's names; its own state dicts pass unchanged."""
    state = unwrapped(state_dict)
    if "cross_att1_x2z.mlp.fc1.weight" not in state:
        return state
    hidden = "classifier_cnn.0.weight" in state
    return {_own_name(key, hidden): value for key, value in state.items()}


def _own_name(key: str, hidden: bool) -> str:
    if key == "latent":
        return key
    for pattern, name in _PLACES:
        match = re.match(pattern, key)
        if match:
            return name(match) + _replace(key[match.end() :], _LAYER)
    if key.startswith(("cnn_stem", "cnn_body")):
        return _cnn_name(key)
    return _replace(key, _HEAD | (_HEAD_HIDDEN if hidden else _HEAD_PLAIN))


_PLACES: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"dwc(\d)_x2z", lambda m: f"stages.{int(m[1]) - 1}.read.local"),
    (r"cross_att(\d)_x2z", lambda m: f"stages.{int(m[1]) - 1}.read.cross"),
    (r"cross_att(\d)_z2x", lambda m: f"stages.{int(m[1]) - 2}.write"),
    (r"last_cross_att_z2x", lambda m: "stages.3.write"),
    (r"self_att(\d)", lambda m: f"stages.{int(m[1]) - 1}.think"),
    (r"token_mixer\.(\d)", lambda m: f"stages.{m[1]}.halve"),
    (r"token_expander\.(\d)", lambda m: f"stages.{m[1]}.widen"),
]


def _cnn_name(key: str) -> str:
    """Names of timm's blocks for those of torchvision; a ResNet's blocks are timm's already."""
    regnet = re.fullmatch(r"cnn_body\.block(\d)\.block\d-(\d+)\.(.+)", key)
    if regnet:
        return f"stages.{int(regnet[1]) - 1}.cnn.b{int(regnet[2]) + 1}.{_replace(regnet[3], _REGNET_BLOCK)}"
    stage = re.fullmatch(r"cnn_body_stage(\d)\.(\d+)\.(.+)", key)
    if stage:
        return f"stages.{int(stage[1]) - 1}.cnn.{stage[2]}.{_mobile_block(stage[3], _MOBILE_EXPAND)}"
    block = re.fullmatch(r"cnn_stem\.([12])\.(block\..+)", key)
    if block:
        return f"stem.block{block[1]}.{_mobile_block(block[2], _MOBILE_PLAIN if block[1] == '1' else _MOBILE_EXPAND)}"
    key = re.sub(r"^cnn_stem\.0\.([01])\.", r"cnn_stem.\1.", key)
    return _replace(key, {"cnn_stem.0": "stem.conv", "cnn_stem.1": "stem.bn"})


def _mobile_block(rest: str, early: Mapping[str, str]) -> str:
    if rest.startswith("block."):
        return _replace(rest.removeprefix("block."), {**early, **_MOBILE_LATE})
    # The convolution that ends MobileNetV3; a block of a ResNet has no such names and keeps its own.
    return re.sub("^1", "bn1", re.sub("^0", "conv", rest))


def _replace(name: str, names: Mapping[str, str]) -> str:
    """``name`` with whole dotted parts replaced, each of ``names`` at most once."""
    for old, new in names.items():
        name, count = re.subn(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name, count=1)
        if count and old[0].isdigit():
            break
    return name
