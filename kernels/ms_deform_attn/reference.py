"""Deformable sampling level by level with ``grid_sample``: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """(B, Q, H * D); every sample of every level is held in memory at once."""
    batch, queries, heads = locations.shape[:3]
    precise = torch.promote_types(value.dtype, locations.dtype)
    samples = [value.new_zeros(batch * heads, value.shape[3], queries, 0, dtype=precise)]
    start = 0
    for level, (height, width) in enumerate(sizes):
        tokens = value[:, start : start + height * width].permute(0, 2, 3, 1).flatten(0, 1)
        start += height * width
        places = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        maps = tokens.unflatten(2, (height, width)).to(precise)
        samples.append(F.grid_sample(maps, places.to(precise), align_corners=False))
    spread = weights.transpose(1, 2).flatten(3).flatten(0, 1)[:, None].to(precise)  # (B H, 1, Q, L P)
    out = (torch.cat(samples, 3) * spread).sum(3)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
