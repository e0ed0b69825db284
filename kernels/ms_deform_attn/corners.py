"""The four pixels around each sampling point, their shares, and the derivatives of those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Corners(NamedTuple):
    """Of points (..., L, P), the corners last: (..., L, P, 4) each.

    Attributes:
        token: place among all levels' tokens, int32; some token of the level where the corner is beyond the map.
        share: bilinear share, 0 beyond the map.
        along_x, along_y: derivatives of ``share`` by the location.
    """

    token: Tensor
    share: Tensor
    along_x: Tensor
    along_y: Tensor


def corners(locations: Tensor, sizes: list[int]) -> Corners:
    """Corners of ``locations (..., L, P, 2)`` for ``sizes`` = height, width, height, width, ..."""
    table = torch.tensor(sizes, device=locations.device).view(-1, 2)
    height, width = table[:, 0, None], table[:, 1, None]
    start = (table.prod(1).cumsum(0) - table.prod(1))[:, None]
    # In pixels, where 0 is the first pixel's centre; far points are drawn near, where their shares are 0 as well.
    x = (locations[..., 0] * width - 0.5).clamp(-2, max(sizes) + 1)
    y = (locations[..., 1] * height - 0.5).clamp(-2, max(sizes) + 1)
    left, top = x.floor(), y.floor()
    right_share, low_share = x - left, y - top
    columns = left.to(torch.int32)[..., None] + torch.tensor([0, 1, 0, 1], dtype=torch.int32, device=x.device)
    rows = top.to(torch.int32)[..., None] + torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=x.device)
    height, width = height[..., None].to(torch.int32), width[..., None].to(torch.int32)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    token = start[..., None] + rows.clamp(min=0).minimum(height - 1) * width + columns.clamp(min=0).minimum(width - 1)
    across = torch.stack([1 - right_share, right_share, 1 - right_share, right_share], -1)
    down = torch.stack([1 - low_share, 1 - low_share, low_share, low_share], -1)
    signs_x, signs_y = (torch.tensor(s, dtype=x.dtype, device=x.device) for s in ([-1, 1, -1, 1], [-1, -1, 1, 1]))
    return Corners(
        token.to(torch.int32),
        (across * down).where(inside, 0),
        (down * signs_x * width).where(inside, 0),
        (across * signs_y * height).where(inside, 0),
    )
