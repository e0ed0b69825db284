"""From the names of papers' released weights to those of timm's networks, where timm has the network but not the names.

| family | official names | renamed here |
|---|---|---|
| GC ViT (NVlabs/GCVit) | ``levels``, ``patch_embed``; dense: ``norm0`` .. ``norm3`` | yes |
| CrossViT (IBM/CrossViT) | ``pos_embed.0``, ``cls_token.0`` | yes |
| DaViT (dingmyu/davit) | ``main_blocks``, ``patch_embeds``; dense: ``norm0`` .. | yes; dense ones are not in timm |
| VOLO (sail-sg/volo) | as timm's | nothing to do |
| Swin (microsoft/Swin-Transformer) | ``layers`` | timm knows them |

The state dicts are taken out of training checkpoints and are given back unchanged when they have timm's names already.
Weights of norms behind the levels of a dense version are named ``level_norms.K``, see
:class:`backbones.dense.LevelNorms`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from backbones.weights import State, unwrapped


def to_timm(state_dict: Mapping[str, Any]) -> State:
    """``state_dict`` under timm's names, whichever of the families it is of."""
    state = unwrapped(state_dict)
    if any(key.startswith("levels.0.blocks.") for key in state):
        return gcvit(state)
    if any(key.startswith(("pos_embed.", "cls_token.")) for key in state):
        return crossvit(state)
    if any(key.startswith("main_blocks.") for key in state):
        return davit(state)
    return state


def crossvit(state: Mapping[str, Tensor]) -> State:
    """CrossViT: the parameters of each branch are numbered by an underscore instead of a dot."""
    return {re.sub(r"^(pos_embed|cls_token)\.(\d)$", r"\1_\2", key): value for key, value in state.items()}


def davit(state: Mapping[str, Tensor]) -> State:
    """DaViT; a classifier and its norm go where timm has them, the norms behind levels to ``level_norms``."""
    renamed: State = {}
    for key, value in state.items():
        key = re.sub(r"^patch_embeds\.(\d)\.proj", r"patch_embeds.\1.conv", key)
        key = re.sub(r"^patch_embeds\.0", "stem", key)
        key = re.sub(r"^patch_embeds\.(\d)", r"stages.\1.downsample", key)
        key = re.sub(r"^main_blocks\.(\d)", r"stages.\1.blocks", key)
        key = re.sub(r"\.cpe\.([01])\.", lambda m: f".cpe{int(m[1]) + 1}.", key)
        key = re.sub(r"^norms\.", "head.norm.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        renamed[_level_norm(key)] = value
    return renamed


def gcvit(state: Mapping[str, Tensor]) -> State:
    """GC ViT, whose stages end with the downsampling that begins timm's next one; indices are computed, not loaded."""
    renamed: State = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        key = re.sub(r"^patch_embed\.proj\.", "stem.conv1.", key)
        key = re.sub(r"^patch_embed\.conv_down\.", "stem.down.", key)
        key = re.sub(r"^levels\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
        query = re.match(r"^levels\.(\d)\.q_global_gen\.to_q_global\.(\d)\.", key)
        if query:
            place = f"stages.{query[1]}.global_block.blocks.conv{int(query[2]) + 1}."
            key = place + _gcvit_convolution(key[query.end() :], "")
        elif key.startswith("stem.down.") or ".downsample." in key:
            key = _gcvit_convolution(key, "conv_block.")
        key = re.sub(r"^levels\.", "stages.", key)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        key = key.replace("attn.relative_position_bias_table", "attn.rel_pos.relative_position_bias_table")
        # What the dense version has behind its last level is what timm's last stage has at its end.
        key = re.sub(r"^norm3?\.", "stages.3.norm.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        # The squeeze and excitation is of linear layers there, of 1 x 1 convolutions here.
        renamed[_level_norm(key)] = value[:, :, None, None] if ".se.fc" in key and value.ndim == 2 else value
    return renamed


def _gcvit_convolution(key: str, place: str) -> str:
    names = {"conv.0.": "conv_dw.", "conv.2.fc.0.": "se.fc1.", "conv.2.fc.2.": "se.fc2.", "conv.3.": "conv_pw."}
    for old, new in names.items():
        key = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{place}{new}", key)
    return key


def _level_norm(key: str) -> str:
    return re.sub(r"^norm([0-3])\.", r"level_norms.\1.", key)
