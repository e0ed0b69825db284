"""The released weights of NAT, DiNAT, DiNAT_s and the isotropic networks under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.weights import unwrapped

_RULES = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^patch_embed\.", "stem."),
        (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"^layers\.(\d+)\.(?=norm|attn|mlp|gamma)", r"stages.\1.blocks.0."),  # isotropic: a stage for each block
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^norm(\d)\.", r"level_norms.\1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
]
_DOWNSAMPLE = re.compile(r"^(?:levels|layers)\.(\d+)\.downsample\.")


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Released weights for ``model``; weights that are ours already keep their names.

    Tables of relative positions are resized where the kernel, or the map that sees all of itself, is of another size.
    Norms of levels, which ImageNet weights have not, are the model's own.
    """
    own = model.state_dict()
    found: dict[str, Tensor] = {key: value for key, value in own.items() if key.startswith("level_norms.")}
    for key, value in unwrapped(state).items():
        if key.endswith("relative_position_index"):  # follows from the size of the map
            continue
        name = _ours(key)
        if name.endswith(".rpb") and name in own and value.shape != own[name].shape:
            value = resize_table(value, (own[name].shape[1], own[name].shape[2]))
        found[name] = value
    return found


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Biases (heads, rows, columns) of offsets for ``size`` others between the same furthest ones, bicubically."""
    return F.interpolate(table[None].float(), size, mode="bicubic", align_corners=False)[0].to(table.dtype)


def _ours(key: str) -> str:
    # Downsampling ends a stage there and begins one here.
    key = _DOWNSAMPLE.sub(lambda found: f"stages.{int(found[1]) + 1}.downsample.", key)
    for pattern, ours in _RULES:
        key = pattern.sub(ours, key)
    return key
