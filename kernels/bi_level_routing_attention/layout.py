"""Two ways a map lies in memory: (B, heads, D, H, W), called planes, or (B, H, W, heads, D)."""

from __future__ import annotations

from torch import Tensor


def map_of(dense: Tensor, planes: bool) -> Tensor:
    """A dense tensor in either layout as a view (B, H, W, heads, D)."""
    return dense.permute(0, 3, 4, 1, 2) if planes else dense


def empty_map(like: Tensor, width: int, planes: bool) -> Tensor:
    """Room for a map of the size of ``like`` (B, H, W, heads, D) with heads of ``width``."""
    batch, height, columns, heads, _ = like.shape
    return like.new_empty((batch, heads, width, height, columns) if planes else (batch, height, columns, heads, width))
