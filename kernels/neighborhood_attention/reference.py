"""Neighbourhood attention as dense attention under a mask in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.windows import Window, axis_bias_index, window_mask


def neighborhood_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, window: Window, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, *grid, H, E) and log-sum-exp (B, *grid, H)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = neighborhood_scores(q, k, rpb, window, scale)
    repeats = q.shape[-2] // k.shape[-2]
    values = v.flatten(1, -3).transpose(1, 2).to(precise).repeat_interleave(repeats, 1)
    out = (scores.softmax(-1) @ values).transpose(1, 2).unflatten(1, window.grid)
    lse = scores.logsumexp(-1).transpose(1, 2).unflatten(1, window.grid)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def neighborhood_scores(q: Tensor, k: Tensor, rpb: Tensor | None, window: Window, scale: float) -> Tensor:
    """(B, H, N, N) scaled and biased scores, -inf where a query does not see a key."""
    precise = torch.promote_types(q.dtype, torch.float32)
    a, b = (t.flatten(1, -3).transpose(1, 2).to(precise) for t in (q, k))
    scores = a @ b.repeat_interleave(a.shape[1] // b.shape[1], 1).mT * scale
    if rpb is not None:
        scores = scores + dense_bias(rpb, window)
    return scores.masked_fill(~window_mask(window).to(scores.device), -torch.inf)


def dense_bias(rpb: Tensor, window: Window) -> Tensor:
    """(H, N, N) from the (H, 2k-1, ...) table."""
    axes = len(window.axes)
    index: list[Tensor | slice] = [slice(None)]
    for number, axis in enumerate(window.axes):
        shape = [1] * (2 * axes)
        shape[number] = shape[axes + number] = axis.length
        index.append(axis_bias_index(axis).to(rpb.device).view(shape))
    tokens = int(torch.Size(window.grid).numel())
    return rpb[tuple(index)].reshape(len(rpb), tokens, tokens)
