"""Bi-level routing attention on any device: whole regions are gathered and attended as a batch of dense problems.

Batch and head are folded into the number of a region, so that a gather copies whole regions and its gradient adds whole
regions: the released formulation gathers, and scatters back, element by element. Maps of at most ``DENSE`` tokens
attend densely as they lie, with the logarithm of how often a region is routed to as a bias. Memory is bounded, and
stays in the processor's cache, by taking so many query regions at a time that their work fits into ``CHUNK`` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.bi_level_routing_attention.regions import Regions
from kernels.softmax_attention import LOG2E, attend, attend_backward

DENSE = 256  # tokens up to which gathering costs more than attending to everything
FUSED = 8192  # products of queries and keys of a region from which the fused kernel is faster
CHUNK = 4 << 20


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    query_grid: Regions,
    key_grid: Regions,
    scale: float,
    mask_padding: bool,
    planes: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs, laid out as ``planes`` says, and log-sum-exp (B, heads, H, W), of maps (B, H, W, heads, D)."""
    if _dense(query_grid, key_grid):
        k, v, key_grid = _keys_of_dense(k, v, key_grid, mask_padding)
        bias = _bias(region_graph, query_grid, key_grid, q)
        out, lse = attend(_sequence(q), _sequence(k), _sequence(v), scale, bias=bias)
        return _to_map(out, q, planes), lse.reshape(*lse.shape[:2], *q.shape[1:3]).contiguous()
    queries, keys, values = query_grid.split(q), key_grid.split(k), key_grid.split(v)
    rows, chosen = _rows(queries), _folded(region_graph, queries, key_grid)
    out = q.new_empty(*rows.shape[:2], v.shape[4])
    lse = q.new_empty(rows.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    keys, values = _rows(keys), _rows(values)
    inside = key_grid.inside(q.device) if mask_padding and key_grid.ragged else None
    for some in _chunks(rows, values, chosen.shape[1]):
        mask = _mask(inside, chosen[some], key_grid)
        picked = _gather(keys, chosen[some]), _gather(values, chosen[some])
        _attend(rows[some], *picked, scale, mask, out[some], lse[some])
    shape = (q.shape[0], q.shape[3], query_grid.count, query_grid.tokens)
    sums = query_grid.join(lse.reshape(*shape, 1), planes=True).squeeze(2)
    return query_grid.join(out.reshape(*shape, v.shape[4]), planes), sums


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    out: Tensor,
    lse: Tensor,
    query_grid: Regions,
    key_grid: Regions,
    scale: float,
    mask_padding: bool,
    planes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as ``planes`` says; ``grad_out`` and ``out`` are maps (B, H, W, heads, E)."""
    if _dense(query_grid, key_grid):
        size = k.shape[1:3]
        k, v, key_grid = _keys_of_dense(k, v, key_grid, mask_padding)
        d_q, d_k, d_v, _ = attend_backward(
            _sequence(grad_out),
            None if grad_lse is None else grad_lse.flatten(2),
            _sequence(q),
            _sequence(k),
            _sequence(v),
            _sequence(out),
            lse.flatten(2),
            scale,
            bias=_bias(region_graph, query_grid, key_grid, q),
        )
        for_q, for_k, for_v = _to_map(d_q, q, planes), _to_map(d_k, k, planes, size), _to_map(d_v, v, planes, size)
        return for_q, for_k, for_v
    queries, keys, values = query_grid.split(q), key_grid.split(k), key_grid.split(v)
    d_out, result = query_grid.split(grad_out), query_grid.split(out)
    # A query outside the map has gradient 0 and any finite log-sum-exp will do.
    sums = query_grid.split(lse[..., None].permute(0, 2, 3, 1, 4)).flatten(0, 2)[..., 0]
    d_sums = None
    if grad_lse is not None:
        d_sums = query_grid.split(grad_lse[..., None].permute(0, 2, 3, 1, 4)).flatten(0, 2)[..., 0]
    chosen = _folded(region_graph, queries, key_grid)
    queries, keys, values, d_out, result = (_rows(t) for t in (queries, keys, values, d_out, result))
    d_q = torch.empty_like(queries)
    d_k, d_v = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (keys, values))
    inside = key_grid.inside(q.device) if mask_padding and key_grid.ragged else None
    for some in _chunks(queries, values, chosen.shape[1]):
        d_q[some], of_keys, of_values = _attend_backward(
            d_out[some],
            None if d_sums is None else d_sums[some],
            queries[some],
            _gather(keys, chosen[some]),
            _gather(values, chosen[some]),
            result[some],
            sums[some],
            scale,
            _mask(inside, chosen[some], key_grid),
        )
        index = chosen[some].flatten()
        for total, part in ((d_k, of_keys), (d_v, of_values)):
            total.flatten(1).index_add_(0, index, part.reshape(len(index), -1).to(total.dtype))
    grads = []
    for gradient, like, grid in ((d_q, q, query_grid), (d_k, k, key_grid), (d_v, v, key_grid)):
        shape = (like.shape[0], like.shape[3], grid.count, grid.tokens, like.shape[4])
        grads.append(grid.join(gradient.to(like.dtype).reshape(shape), planes))
    return grads[0], grads[1], grads[2]


def _rows(x: Tensor) -> Tensor:
    """(B, heads, regions, tokens, D) as (B * heads * regions, tokens, D)."""
    return x.flatten(0, 2)


def _folded(region_graph: Tensor, queries: Tensor, key_grid: Regions) -> Tensor:
    """(B * heads * query regions, topk): rows of the folded keys."""
    batch, heads, count = queries.shape[:3]
    first = torch.arange(batch * heads, device=queries.device).view(batch, heads, 1, 1) * key_grid.count
    return (region_graph.expand(batch, heads, count, -1) + first).flatten(0, 2)


def _gather(rows: Tensor, chosen: Tensor) -> Tensor:
    """(n, topk * tokens, D): the regions each of n query regions is routed to, end to end."""
    picked = rows.flatten(1).index_select(0, chosen.flatten())
    return picked.view(chosen.shape[0], chosen.shape[1] * rows.shape[1], rows.shape[2])


def _mask(inside: Tensor | None, chosen: Tensor, key_grid: Regions) -> Tensor | None:
    """(n, 1, keys) bool: which of the gathered keys are on the map."""
    return None if inside is None else inside[chosen % key_grid.count].flatten(1)[:, None]


def _chunks(rows: Tensor, values: Tensor, topk: int) -> Iterator[slice]:
    """Query regions to take at a time."""
    keys = topk * values.shape[1]
    each = keys * (2 * rows.shape[2] + 2 * values.shape[2] + 2 * rows.shape[1]) * rows.element_size()
    step = max(1, CHUNK // each)
    return (slice(n, n + step) for n in range(0, len(rows), step))


def _dense(query_grid: Regions, key_grid: Regions) -> bool:
    return max(query_grid.count * query_grid.tokens, key_grid.count * key_grid.tokens) <= DENSE


def _keys_of_dense(k: Tensor, v: Tensor, key_grid: Regions, mask_padding: bool) -> tuple[Tensor, Tensor, Regions]:
    """Maps of what is seen: with the zeros outside, unless these are hidden."""
    if mask_padding or not key_grid.ragged:
        return k, v, key_grid
    k, v = key_grid.whole(k), key_grid.whole(v)
    return k, v, Regions(k.shape[1], k.shape[2], key_grid.rows, key_grid.columns)


def _sequence(x: Tensor) -> Tensor:
    """A map (B, H, W, heads, D) as (B, heads, H * W, D); a view of all usual layouts."""
    return x.flatten(1, 2).transpose(1, 2)


def _to_map(x: Tensor, like: Tensor, planes: bool, size: torch.Size | None = None) -> Tensor:
    """(B, heads, N, D) of a map like (B, H, W, heads, _), cut to ``size``, laid out as ``planes`` says."""
    x = x.unflatten(2, like.shape[1:3])
    if size is not None and like.shape[1:3] != size:
        x = x[:, :, : size[0], : size[1]]
    return (x.permute(0, 1, 4, 2, 3) if planes else x.permute(0, 2, 3, 1, 4)).contiguous()


def _bias(region_graph: Tensor, query_grid: Regions, key_grid: Regions, q: Tensor) -> Tensor:
    """(B, heads or 1, queries, keys): logarithm of how often a query sees a key; -inf where it does not."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    times = torch.zeros(*region_graph.shape[:3], key_grid.count, dtype=dtype, device=q.device)
    times.scatter_add_(3, region_graph, torch.ones_like(region_graph, dtype=dtype))
    by_key = times.log_().index_select(3, key_grid.numbers(q.device))
    return by_key.index_select(2, query_grid.numbers(q.device))


def _fused(q: Tensor, k: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[1] * k.shape[1] >= FUSED


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Attention of each of n regions, q (n, T, D), k (n, L, D), v (n, L, E), into out (n, T, E) and lse (n, T)."""
    if _fused(q, k):
        part, sums = attend(
            q[:, None], k[:, None], v[:, None], scale, None if mask is None else mask[:, None], fused=True
        )
        out.copy_(part[:, 0])
        lse.copy_(sums[:, 0])
        return
    weights = torch.bmm(q.to(lse.dtype) * (scale * LOG2E), k.to(lse.dtype).mT)
    if mask is not None:
        weights.masked_fill_(~mask, -torch.inf)
    highest = weights.amax(-1, keepdim=True)  # finite: every region has a token on the map
    total = weights.sub_(highest).exp2_().sum(-1, keepdim=True)
    if out.dtype == lse.dtype:
        torch.bmm(weights, v, out=out).div_(total)
    else:
        out.copy_(torch.bmm(weights, v.to(lse.dtype)).div_(total))
    torch.div(highest.add_(total.log2_()), LOG2E, out=lse[..., None])


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of :func:`_attend`."""
    if grad_lse is None and _fused(q, k):
        d_q, d_k, d_v, _ = attend_backward(
            grad_out[:, None],
            None,
            q[:, None],
            k[:, None],
            v[:, None],
            out[:, None],
            lse[:, None],
            scale,
            None if mask is None else mask[:, None],
            fused=True,
        )
        return d_q[:, 0], d_k[:, 0], d_v[:, 0]
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k, v, grad_out = (t.to(precise) for t in (q, k, v, grad_out))
    weights = torch.baddbmm(lse[..., None] * -LOG2E, q, k.mT, alpha=scale * LOG2E)
    if mask is not None:
        weights.masked_fill_(~mask, -torch.inf)
    weights.exp2_()
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse[..., None]
    d_scores = torch.bmm(grad_out, v.mT).sub_(delta).mul_(weights)
    return torch.bmm(d_scores, k).mul_(scale), torch.bmm(d_scores.mT, q).mul_(scale), torch.bmm(weights.mT, grad_out)
