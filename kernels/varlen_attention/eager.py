"""Packed attention on any device: one fused call per segment.

A loop over segments is the fastest form on a CPU (a padded batch takes 4 times, a block-diagonal mask 5 times as long):
each segment is a dense problem, and nothing is padded or masked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.softmax_attention import attend, attend_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (Tq, H, E) and log-sum-exp (Tq, H), both contiguous."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for rows, keys in _segments(cu_q, cu_k):
        mask, bias = _hidden(rows, keys, key_bias, causal, q)
        a, b, c = _heads_first(q[rows], k[keys], v[keys])
        part, sums = attend(a, b, c, scale, mask, bias)
        out[rows], lse[rows] = part[0].transpose(0, 1), sums[0].t()
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and key_bias."""
    d_q, d_k, d_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    d_bias = None if key_bias is None else torch.zeros_like(key_bias, memory_format=torch.contiguous_format)
    for rows, keys in _segments(cu_q, cu_k):
        mask, bias = _hidden(rows, keys, key_bias, causal, q)
        a, b, c, o, d_o = _heads_first(q[rows], k[keys], v[keys], out[rows], grad_out[rows])
        grads = attend_backward(
            d_o,
            None if grad_lse is None else grad_lse[rows].t()[None],
            a,
            b,
            c,
            o,
            lse[rows].t()[None],
            scale,
            mask,
            bias,
            bias_gradient=bias is not None,
        )
        d_q[rows], d_k[keys], d_v[keys] = (g[0].transpose(0, 1) for g in grads[:3])
        if d_bias is not None and grads[3] is not None:
            d_bias[:, keys] = grads[3][0, :, 0]
    return d_q, d_k, d_v, d_bias


def _segments(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of every segment that has both."""
    cuts_q, cuts_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(cuts_q) - 1):
        if cuts_q[i] < cuts_q[i + 1] and cuts_k[i] < cuts_k[i + 1]:
            yield slice(cuts_q[i], cuts_q[i + 1]), slice(cuts_k[i], cuts_k[i + 1])


def _heads_first(*packed: Tensor) -> tuple[Tensor, ...]:
    """(T, H, D) as (1, H, T, D), views."""
    return tuple(t.transpose(0, 1)[None] for t in packed)


def _hidden(
    rows: slice, keys: slice, key_bias: Tensor | None, causal: bool, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Mask (1, 1, Lq, Lk) and bias (1, 1 or H, 1, Lk) of a segment."""
    bias = None if key_bias is None else key_bias[None, :, None, keys]
    if not causal:
        return None, bias
    queries, known = rows.stop - rows.start, keys.stop - keys.start
    ones = torch.ones(queries, known, dtype=torch.bool, device=q.device)
    return ones.tril_(known - queries)[None, None], bias
