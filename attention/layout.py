"""Layouts of token maps, in one place: maps and sequences, channels first and last, heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_channels_last(x: Tensor) -> Tensor:
    """(B, C, *grid) as (B, *grid, C), a view."""
    return x.movedim(1, -1)


def to_channels_first(x: Tensor) -> Tensor:
    """(B, *grid, C) as (B, C, *grid), a view."""
    return x.movedim(-1, 1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., heads * D) as (..., heads, D), a view."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection (B, *grid, 3 * heads * D), ordered q, k, v, as three views (B, *grid, heads, D)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return q, k, v


def heads_first(x: Tensor) -> Tensor:
    """(B, *grid, heads, D) as the sequence (B, heads, N, D) that PyTorch's attention takes; a view where it can be."""
    return x.flatten(1, -3).transpose(1, 2)


def heads_last(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, heads, N, D) as a map (B, *grid, heads * D)."""
    return x.transpose(1, 2).flatten(2).unflatten(1, grid)


def weights_of(core: Callable[[Tensor], Tensor], v: Tensor, columns: int = 64) -> Tensor:
    """The weights (B, heads, N, N) of any core that is linear in its values, by applying it to one-hot values.

    Args:
        core: maps values (B, *grid, heads, E) to outputs (B, *grid, heads, E), for any width E.
        v: (B, *grid, heads, D); only its shape, dtype and device are used.
        columns: keys at a time, which bounds what a core keeps.
    """
    batch, *grid, heads, _ = v.shape
    tokens = v.shape[1:-2].numel()
    one_hot = torch.eye(tokens, dtype=v.dtype, device=v.device)
    parts = []
    for part in one_hot.split(columns, dim=1):
        values = part.reshape(1, *grid, 1, part.shape[1]).expand(batch, *grid, heads, part.shape[1])
        parts.append(heads_first(core(values.contiguous())))
    return torch.cat(parts, dim=-1)
