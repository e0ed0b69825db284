"""Adaptive average pooling of the tokens that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def adaptive_mean(x: Tensor, mask: Tensor | None, cells: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Mean over the real tokens of each cell of a map.

    Args:
        x: (B, C, *grid), 0 where masked.
        mask: (B, *grid) bool, true for real tokens.
        cells: how many along each axis.

    Returns:
        (B, C, *cells), 0 in cells without real tokens, and with a mask (B, *cells) bool, true for the others.
    """
    pool = _POOLS[len(cells)]
    means = pool(x, tuple(cells))
    if mask is None:
        return means, None
    share = pool(mask[:, None].to(torch.promote_types(x.dtype, torch.float32)), tuple(cells))
    return (means / share.masked_fill(share == 0, 1)).to(x.dtype), (share > 0)[:, 0]
