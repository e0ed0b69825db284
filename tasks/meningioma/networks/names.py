"""Parameters of the released AGUNet and DAUNet by the names they have here.

Keras has no state dict; states that were exported for PyTorch use short neutral names, one for each layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from attention.attention_gate import AttentionGate
from attention.dual_position_channel import PositionAttention

State = dict[str, Tensor]

_BLOCK = (r"bn([12])\.", r"norm\1.")
_SHARED = (
    (r"^encoder\.blocks\.(\d+)\.", r"encoder.levels.\1.block."),
    (r"^up\.(\d+)\.conv\.", r"decoder.levels.\1.up."),
    (r"^(?:upbn|catbn)\.(\d+)\.", r"decoder.levels.\1.norm."),
    (r"^upg\.(\d+)\.conv\.", r"decoder.levels.\1.guide."),
    (r"^gate\.(\d+)\.", r"decoder.levels.\1.gate."),
    (r"^dec\.(\d+)\.", r"decoder.levels.\1.block."),
    (r"^head\.(\d+)\.", r"decoder.heads.\1."),
)
_DUAL = (
    (r"^pam\.", "dual.position.attention."),
    (r"^cam\.", "dual.channel.attention."),
    (r"^pam_(conv[12])\.", r"dual.position.\1."),
    (r"^cam_(conv[12])\.", r"dual.channel.\1."),
    (r"^pam_bn\.", "dual.position.norm."),
    (r"^cam_bn\.", "dual.channel.norm."),
    (r"^fuse\.", "dual.fuse."),
    (r"^fuse_bn\.", "dual.norm."),
)


def of_agunet(state: Mapping[str, Tensor]) -> State:
    """AGUNet's state from neutral names."""
    renamed = {_renamed(key): value for key, value in state.items()}
    return _within(renamed, re.compile(r"^decoder\.levels\.\d+\.gate\."), AttentionGate.checkpoint_filter)


def of_daunet(state: Mapping[str, Tensor]) -> State:
    """DAUNet's and DAGUNet's state from neutral names."""
    renamed = {_renamed(key): value for key, value in state.items()}
    return _within(renamed, re.compile(r"^dual\.position\.attention\."), PositionAttention.checkpoint_filter)


def _renamed(key: str) -> str:
    level = re.match(r"^encoder\.pyramid\.(\d+)\.(.*)", key)
    if level:  # the first level has none, and theirs are counted without it
        return f"encoder.levels.{int(level[1]) + 1}.pyramid.{level[2]}"
    for pattern, ours in (*_SHARED, *_DUAL):
        key = re.sub(pattern, ours, key)
    return re.sub(*_BLOCK, key) if ".block." in key or "bottleneck." in key else key


def _within(state: State, prefix: re.Pattern[str], rename: Callable[[State], State]) -> State:
    """``state`` with the part below each match of ``prefix`` renamed by the module that it is of."""
    parts: dict[str, State] = {}
    rest: State = {}
    for key, value in state.items():
        found = prefix.match(key)
        if found:
            parts.setdefault(found[0], {})[key.removeprefix(found[0])] = value
        else:
            rest[key] = value
    for start, part in parts.items():
        rest |= {start + key: value for key, value in rename(part).items()}
    return rest
