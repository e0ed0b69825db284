"""From the names of OverLoCK's released weights to those of :mod:`backbones.overlock`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attention.dilated_reparam import DilatedReparam
from backbones.weights import unwrapped
from kernels.errors import InputError

_PLACES = (
    (r"patch_embed1\.", "stem."),
    (r"patch_embed([23])\.", lambda match: f"base.{int(match[1]) - 1}.downsample."),
    (r"patch_embed4\.", "overview.downsample."),
    (r"patch_embedx\.", "focus.1.downsample."),
    (r"blocks([123])\.", lambda match: f"base.{int(match[1]) - 1}.blocks."),
    (r"blocks4\.", "overview.blocks."),
    (r"high_level_proj\.", "context."),
    (r"sub_blocks([34])\.", lambda match: f"focus.{int(match[1]) - 3}.blocks."),
    (r"extra_norm\.([0-3])\.", r"dense.norms.\1."),
    (r"extra_norm\.4\.", "dense.overview.0."),
    (r"h_proj\.0\.", "dense.overview.1."),
    (r"h_proj\.1\.", "dense.overview.2."),
    (r"aux_head\.0\.", "aux_head.norm."),
    (r"aux_head\.2\.", "aux_head.fc."),
    (r"head\.0\.", "head.conv."),
    (r"head\.1\.", "head.norm."),
    (r"head\.4\.", "head.fc."),
)
_IN_MIXER = re.compile(r"^(focus\.\d+\.blocks\.\d+\.)(weight_query|weight_key|weight_proj|rpb1|rpb2)\b")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename a released state dict to the parameters of ``model``; one of ours goes through unchanged.

    Takes weights of ImageNet, segmentation and detection training, out of a training checkpoint, behind ``module.`` or
    ``backbone.``. Parts that ``model`` was built without (auxiliary head, dense norms, heads) are left out; dense norms
    that the file has not, and then its missing head, stay as ``model`` has them. Branches of large kernels are merged
    for a model that was built merged.

    Raises:
        InputError: the weights are merged and ``model`` is not.
    """
    state = _backbone(state_dict)
    own = model.state_dict()
    state = {_renamed(key): value for key, value in state.items()}
    for key in ("head.fc.weight", "aux_head.fc.weight"):
        if key in state:
            state[key] = state[key].flatten(1)  # the released classifiers are 1 x 1 convolutions
    _merge(state, own)
    optional = ("aux_head.", "dense.", "head.")
    state = {key: value for key, value in state.items() if key in own or not key.startswith(optional)}
    if "aux_head.fc.weight" in state and state["aux_head.fc.weight"].shape != own["aux_head.fc.weight"].shape:
        state = {key: value for key, value in state.items() if not key.startswith("aux_head.fc.")}
    is_dense = any(key.startswith("dense.") for key in own)
    kept = ("dense.", "head.") if is_dense else ()
    return {key: value for key, value in own.items() if key.startswith(kept) and key not in state} | state


def _backbone(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without prefixes and without a detector's other parts."""
    plain = unwrapped(state)
    inside = {key.removeprefix("backbone."): value for key, value in plain.items() if key.startswith("backbone.")}
    return inside or plain


def _renamed(key: str) -> str:
    for pattern, place in _PLACES:
        key, found = re.subn(f"^{pattern}", place, key)
        if found:
            break
    return _IN_MIXER.sub(r"\1mixer.\2", key)


def _merge(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Make one kernel of each large one and its branches, in place, where ``own`` has one."""
    for key in [key for key in state if key.endswith("lk_origin.weight")]:
        prefix = key.removesuffix("lk_origin.weight")
        merged = f"{prefix}lk_origin.bias"
        if merged in state and merged not in own and key in own:
            raise InputError("these weights have merged kernels; build the model with merged=true for them.")
        if merged in state or merged not in own:
            continue
        weight = state[key]
        kernel = DilatedReparam(len(weight), weight.shape[-1]).to(weight).eval()
        branches = {name: value for name, value in state.items() if name.startswith(prefix)}
        kernel.load_state_dict({name.removeprefix(prefix): value for name, value in branches.items()})
        for name in branches:
            del state[name]
        state |= {f"{prefix}{name}": value for name, value in kernel.merge().state_dict().items()}
