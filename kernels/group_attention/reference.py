"""Group attention with every group's keys gathered, in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def group_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    group_size: int,
    k_global: Tensor | None,
    v_global: Tensor | None,
    scale: float,
) -> Tensor:
    """Outputs (B, N, H, E); ``k_global`` and ``v_global`` are (1 or B, M, H, D or E)."""
    batch, tokens = order.shape
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    precise = torch.promote_types(q.dtype, torch.float32)
    size = min(tokens, group_size)
    count = -(-tokens // size)
    first = torch.arange(count, device=q.device)[:, None] * size
    position = (first + torch.arange(2 * size, device=q.device)) % (2 * tokens)
    seen = torch.minimum(position, 2 * tokens - 1 - position)  # past the end the sequence is mirrored
    rows = torch.arange(batch, device=q.device)[:, None, None]
    queries = q[rows, order[:, seen[:, :size]]].to(precise)
    keys, values = (t[rows, order[:, seen]].to(precise) for t in (k, v))
    weights = (torch.einsum("bgihd,bgjhd->bghij", queries, keys) * scale).softmax(-1)
    out = torch.einsum("bghij,bgjhe->bgihe", weights, values)
    if k_global is not None and v_global is not None:
        known, worth = (t.to(precise).expand(batch, -1, -1, -1) for t in (k_global, v_global))
        weights = (torch.einsum("bgihd,bmhd->bghim", queries, known) * scale).softmax(-1)
        out = out + torch.einsum("bghim,bmhe->bgihe", weights, worth)
    back = order.argsort(1)
    return out.flatten(1, 2)[rows[:, 0], back].to(q.dtype)
