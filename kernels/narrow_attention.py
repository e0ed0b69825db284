"""Softmax attention whose queries and keys are narrower than its values.

PyTorch's fused kernels want one width throughout. On the CPU, zeros up to the width of the values cost more than the
kernel saves, so that there the queries are taken in blocks, whose weights stay in the cache and are not kept: the
backward pass makes them again from the log-sum-exp, which costs one product of narrow operands.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.softmax_attention import attend, attend_backward

BLOCK = 2**19
"""Weights in a block: 2 MB in float32. Up to four times as many take as long, within a tenth."""
LEAST_ROWS = 128
"""Queries in a block, however many keys there are; fewer make slow matrix products."""


def narrow_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v``, (B, H, N, E), for q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E), D <= E.

    No matrix of N x M is kept, unless it is as small as one block.
    """
    narrow, width = q.shape[-1], v.shape[-1]
    if narrow == width or not _blocks_serve(q, k, v):
        q, k = (F.pad(t, (0, width - narrow)) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if q.shape[-2] <= _rows(k):
        rows, keys, values = (t.flatten(0, 1) for t in (q if scale == 1 else scale * q, k, v))
        return torch.bmm(torch.softmax(torch.bmm(rows, keys.mT), -1), values).unflatten(0, q.shape[:2])
    return _Blocks.apply(q, k, v, scale)


def _blocks_serve(*operands: Tensor) -> bool:
    """Whether this is the CPU in full precision, and nobody is looking for a graph of operators."""
    full = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) for t in operands)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return full and not tracing


class _Blocks(torch.autograd.Function):
    """Attention of blocks of queries, one after the other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.rows, ctx.scale = _rows(k), scale
        parts = [attend(rows, k, v, scale, fused=False) for rows in q.split(ctx.rows, 2)]
        out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        blocks = (t.split(ctx.rows, 2) for t in (d_q, grad, q, out, lse))
        for into, above, rows, sums, totals in zip(*blocks, strict=True):
            part_q, part_k, part_v, _ = attend_backward(above, None, rows, k, v, sums, totals, ctx.scale, fused=False)
            into.copy_(part_q)
            d_k += part_k
            d_v += part_v
        return d_q, d_k, d_v, None


def _rows(k: Tensor) -> int:
    """Queries in a block, for keys (B, H, M, D)."""
    return max(BLOCK // max(k.shape[:3].numel(), 1), LEAST_ROWS)
