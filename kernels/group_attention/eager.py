"""Group attention on any device: sorted rows are copied once, and groups attend to overlapping views of them.

No group's keys are copied: a window of two groups is a view with the stride of one group. Global tokens are a second,
separate softmax, added before the rows are put back. Heads are padded with zeros to a multiple of ``LANES``, without
which the fused kernel of the CPU takes up to twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.group_attention.groups import Groups
from kernels.softmax_attention import attend, attend_backward

LANES = 16
CHUNK = 256 << 20  # bytes of scores at a time where there is no fused kernel


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    groups: Groups,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, N, H, E), and the log-sum-exp of both softmaxes (B, H, N) in sorted order."""
    batch, tokens, heads, _ = q.shape
    rows = _rows(order)
    queries, k_windows, v_windows = _operands(q, k, v, order, groups)
    result = torch.empty_like(queries)
    lse = q.new_empty(queries.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for some in _chunks(queries, groups.keys):
        result[:, some], lse[:, some] = attend(queries[:, some], k_windows[:, some], v_windows[:, some], scale)
    result, lse_global = _tokens(result, batch, tokens), lse.new_empty(0)
    if k_global is not None and v_global is not None:
        part, lse_global = _attend_globally(queries, k_global, v_global, batch, tokens, scale)
        result = result + part
    out = _put_back(result[..., : v.shape[3]], rows)
    return out, lse.flatten(1)[:, :tokens].reshape(batch, heads, tokens).contiguous(), lse_global


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    out: Tensor,
    lse: Tensor,
    groups: Groups,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, k_global and v_global."""
    batch, tokens = order.shape
    rows = _rows(order)
    queries, k_windows, v_windows = _operands(q, k, v, order, groups)
    lanes, short = queries.shape[3], groups.padded - tokens
    d_out, result = (_blocks(_take(t, rows, order, lanes), groups) for t in (grad_out, out))
    d_known = d_worth = d_each = None
    if k_global is not None and v_global is not None:
        # The output is the sum of two attentions; each needs its own in its gradient.
        part, sums = _attend_globally(queries, k_global, v_global, batch, tokens, scale)
        known, worth = _globals(k_global, v_global, batch, lanes)
        d_each, d_known, d_worth, _ = attend_backward(
            _tokens(d_out, batch, tokens), None, _tokens(queries, batch, tokens), known, worth, part, sums, scale
        )
        d_known = d_known.transpose(1, 2)[..., : k.shape[3]].sum_to_size(k_global.shape)
        d_worth = d_worth.transpose(1, 2)[..., : v.shape[3]].sum_to_size(v_global.shape)
        result = result - _blocks(part.flatten(0, 1), groups)
    # A query past the last token is zero, and so is what arrives for it: any finite log-sum-exp will do.
    sums = F.pad(lse.flatten(0, 1), (0, short)).unflatten(1, (groups.count, groups.size))
    d_queries = torch.empty_like(queries)
    precise = lse.dtype
    extended = len(queries), groups.extended // groups.size, groups.size, lanes
    d_keys, d_values = (torch.zeros(extended, dtype=precise, device=q.device) for _ in range(2))
    for some in _chunks(queries, groups.keys):
        d_queries[:, some], *windows, _ = attend_backward(
            d_out[:, some],
            None,
            queries[:, some],
            k_windows[:, some],
            v_windows[:, some],
            result[:, some],
            sums[:, some],
            scale,
        )
        for total, part in zip((d_keys, d_values), windows, strict=True):
            for number, half in enumerate(part.split(groups.size, 2)):  # the group's own keys, then the next group's
                total[:, some.start + number : some.start + number + half.shape[1]] += half
    d_q = _tokens(d_queries, batch, tokens)
    if d_each is not None:
        d_q = d_q + d_each
    d_k, d_v = (groups.fold(t.flatten(1, 2)).unflatten(0, (batch, -1)) for t in (d_keys, d_values))
    return (
        _put_back(d_q[..., : q.shape[3]].to(q.dtype), rows),
        _put_back(d_k[..., : k.shape[3]].to(k.dtype), rows),
        _put_back(d_v[..., : v.shape[3]].to(v.dtype), rows),
        d_known,
        d_worth,
    )


def _rows(order: Tensor) -> Tensor:
    """(B * N,): row of each sorted token among the tokens of all items."""
    return (order + torch.arange(order.shape[0], device=order.device)[:, None] * order.shape[1]).flatten()


def _take(x: Tensor, rows: Tensor, order: Tensor, lanes: int) -> Tensor:
    """Rows of (B, N, H, D) as (B * H, rows of an item, lanes), padded with zeros."""
    batch = order.shape[0]
    picked = x.reshape(-1, x.shape[2] * x.shape[3]).index_select(0, rows).view(batch, -1, *x.shape[2:])
    return F.pad(picked.transpose(1, 2), (0, lanes - x.shape[3])).flatten(0, 1)


def _operands(q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B * H, groups, size, lanes), zeros past the last, and windows (B * H, groups, keys, lanes), views."""
    lanes = -(-max(q.shape[3], v.shape[3]) // LANES) * LANES
    extended = _rows(order).view_as(order)[:, groups.positions(order.device)].flatten()
    queries = _blocks(_take(q, _rows(order), order, lanes), groups)
    windows = [_take(t, extended, order, lanes).unfold(1, groups.keys, groups.size).mT for t in (k, v)]
    return queries, windows[0], windows[1]


def _blocks(x: Tensor, groups: Groups) -> Tensor:
    """(n, tokens, lanes) as (n, groups, size, lanes), zeros past the last."""
    return F.pad(x, (0, 0, 0, groups.padded - groups.tokens)).unflatten(1, (groups.count, groups.size))


def _tokens(blocks: Tensor, batch: int, tokens: int) -> Tensor:
    """(B * H, groups, size, lanes) as (B, H, tokens, lanes)."""
    return blocks.flatten(1, 2)[:, :tokens].unflatten(0, (batch, -1))


def _globals(k_global: Tensor, v_global: Tensor, batch: int, lanes: int) -> tuple[Tensor, Tensor]:
    """(1 or B, M, H, D) as (B, H, M, lanes)."""
    known, worth = (
        F.pad(t, (0, lanes - t.shape[3])).transpose(1, 2).expand(batch, -1, -1, -1) for t in (k_global, v_global)
    )
    return known, worth


def _attend_globally(
    queries: Tensor, k_global: Tensor, v_global: Tensor, batch: int, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, lanes) and log-sum-exp (B, H, N) over the global tokens, in sorted order."""
    known, worth = _globals(k_global, v_global, batch, queries.shape[3])
    out, lse = attend(_tokens(queries, batch, tokens), known, worth, scale)
    return out, lse.contiguous()


def _put_back(x: Tensor, rows: Tensor) -> Tensor:
    """(B, H, N, D) in sorted order as (B, N, H, D) in the original one."""
    batch, heads, tokens, width = x.shape
    out = x.new_empty(batch * tokens, heads * width)
    return out.index_copy_(0, rows, x.transpose(1, 2).reshape(-1, heads * width)).view(batch, tokens, heads, width)


def _chunks(queries: Tensor, keys: int) -> Iterator[slice]:
    """Groups to take at a time: all, unless their scores must be kept."""
    every, count, size, _ = queries.shape
    step = count if queries.device.type == "cpu" else max(1, CHUNK // (8 * every * size * keys))
    return (slice(n, min(n + step, count)) for n in range(0, count, step))
