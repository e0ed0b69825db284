"""Deformable sampling level by level with ``grid_sample``: the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]], starts: list[int]
) -> Tensor:
    """Output (B, Q, H * D)."""
    precise = torch.promote_types(value.dtype, torch.float32)
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2 * locations.to(precise) - 1).transpose(1, 2).flatten(0, 1)  # (B H, Q, L, P, 2)
    scales = weights.to(precise).transpose(1, 2).flatten(0, 1)[:, None]  # (B H, 1, Q, L, P)
    out = value.new_zeros(batch * heads, width, queries, dtype=precise) + 0 * value.sum().to(precise)
    for level, ((rows, columns), start) in enumerate(zip(shapes, starts, strict=True)):
        pixels = value[:, start : start + rows * columns].to(precise)
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, width, rows, columns)
        samples = F.grid_sample(image, grids[:, :, level], padding_mode="zeros", align_corners=False)
        out = out + (samples * scales[..., level, :]).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)
