"""Group attention beside the released formulation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.group_attention import group_attention, group_order
from kernels.measure import Case, Contestant

# Batch, tokens, group size, global tokens: a training crop of 64 x 64 in two of CATANet's blocks; with a short tail.
SIZES = [(2, 4096, 256, 16), (2, 4096, 64, 64), (2, 4096, 32, 128), (1, 10000, 128, 32)]
LARGE = [(16, 4096, 256, 16), (16, 4096, 32, 128), (1, 320 * 180, 256, 16), (1, 320 * 180, 128, 32)]
HEADS, WIDTH, VALUE_WIDTH = 4, 9, 10


def cases(device: torch.device) -> Iterator[Case]:
    """Tokens sorted by random clusters; on a GPU also in bfloat16."""
    runs = [(size, torch.float32) for size in SIZES]
    if device.type == "cuda":
        runs = [(size, dtype) for size in LARGE for dtype in (torch.float32, torch.bfloat16)]
    for (batch, tokens, size, members), dtype in runs:
        q, k = (torch.randn(batch, tokens, HEADS, WIDTH, device=device).to(dtype) for _ in range(2))
        v = torch.randn(batch, tokens, HEADS, VALUE_WIDTH, device=device).to(dtype)
        known, worth = (torch.randn(members, HEADS, w, device=device).to(dtype) for w in (WIDTH, VALUE_WIDTH))
        leaves = [t.requires_grad_() for t in (q, k, v, known, worth)]
        order = group_order(torch.randint(0, members, (batch, tokens), device=device))
        keys = 2 * size + members
        yield Case(
            f"groups B{batch} N{tokens} groups of {size}, {members} global {str(dtype).removeprefix('torch.')}",
            [
                Contestant("released", partial(_released, q, k, v, known, worth, order, size), leaves),
                Contestant("fovea", partial(_ours, q, k, v, known, worth, order, size), leaves),
            ],
            baseline="released",
            flops=2.0 * batch * tokens * keys * HEADS * (WIDTH + VALUE_WIDTH),
            bytes=2.0 * batch * tokens * HEADS * (WIDTH + VALUE_WIDTH) * q.element_size(),
            tolerance=2e-3 if dtype == torch.float32 else 3e-2,
        )


def _ours(q: Tensor, k: Tensor, v: Tensor, known: Tensor, worth: Tensor, order: Tensor, size: int) -> Tensor:
    return group_attention(q, k, v, order, size, k_global=known, v_global=worth)


def _released(q: Tensor, k: Tensor, v: Tensor, known: Tensor, worth: Tensor, order: Tensor, size: int) -> Tensor:
    """Channels gathered by an expanded index, mirrored tails appended, windows unfolded, two fused attentions."""
    batch, tokens, heads, _ = q.shape
    count = -(-tokens // size)
    short = count * size - tokens
    flat = [t.flatten(2) for t in (q, k, v)]
    a, b, c = (t.gather(1, order[..., None].expand(t.shape)) for t in flat)
    a = torch.cat([a, a[:, tokens - short :].flip(1)], 1)
    b, c = (torch.cat([t, t[:, tokens - short - size :].flip(1)], 1) for t in (b, c))
    queries = a.view(batch, count, size, heads, -1).transpose(2, 3)
    keys, values = (t.unfold(1, 2 * size, size).unflatten(2, (heads, -1)).permute(0, 1, 2, 4, 3) for t in (b, c))
    out = F.scaled_dot_product_attention(queries, keys, values)
    known, worth = (t.transpose(0, 1).expand(batch, count, -1, -1, -1) for t in (known, worth))
    out = out + F.scaled_dot_product_attention(queries, known, worth)
    rows = out.transpose(2, 3).reshape(batch, count * size, -1)[:, :tokens]
    return torch.zeros_like(rows).scatter(1, order[..., None].expand(rows.shape), rows).view(v.shape)
