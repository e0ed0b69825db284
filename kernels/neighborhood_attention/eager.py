"""Neighbourhood attention on any device: tiles of queries against the union of their windows, as dense attention.

A key is gathered once per tile, not once per query, and a tile is one block of a fused dense call. Tiles that look
alike are one call with one small mask. Chunks bound the memory of what is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.neighborhood_attention.tiles import Look, Piece, looks, mask, tile_sizes
from kernels.softmax_attention import attend, attend_backward
from kernels.tables import made_once
from kernels.windows import Window

CHUNK = 1 << 19  # gathered numbers of a chunk, keys and values together
KEPT_ROWS = 1 << 19  # of an index table that is kept between calls
KEPT_MASK = 1 << 16  # entries of a mask that is kept between calls

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs (B, *grid, H, E) and log-sum-exp (B, *grid, H), both contiguous."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    q_rows, k_rows, v_rows, out_rows, lse_rows = (_rows(t, window) for t in (q, k, v, out, lse))
    bias = _Bias(rpb, q)
    fused = _fused_serves(q, v, rpb)
    for chunk in _chunks(q, k, v, rpb, window):
        queries = _gather(q_rows, chunk.queries)
        keys, values = (_gather(t, chunk.keys) for t in (k_rows, v_rows))
        for part in chunk.parts:
            operands = part.queries_of(queries), part.keys_of(keys), part.keys_of(values)
            hidden, added = bias.of(part.look, fused)
            if fused:
                result, sums = _flash(*operands, attn_mask=added, scale=scale)
            else:
                result, sums = attend(*operands, scale, hidden, added)
            _put(out_rows, part.queries, result)
            _put(lse_rows, part.queries, sums)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, on request, of the relative position table."""
    d_q = q.new_empty(q.shape)
    # Several tiles add to a key: their sum is kept in float32 whatever the keys are.
    d_k, d_v = (t.new_zeros(t.shape, dtype=lse.dtype) for t in (k, v))
    by_look: dict[Look, Tensor] = {}  # sums of the bias' gradient over tiles that look alike
    k_rows, v_rows, d_q_rows, d_k_rows, d_v_rows = (_rows(t, window) for t in (k, v, d_q, d_k, d_v))
    by_query = [None if t is None else _rows(t, window) for t in (grad_out, grad_lse, q, out, lse)]
    bias = _Bias(rpb, q)
    fused = _fused_serves(q, v, rpb) and grad_lse is None and not bias_gradient
    for chunk in _chunks(q, k, v, rpb, window):
        gathered = [None if t is None else _gather(t, chunk.queries) for t in by_query]
        keys, values = (_gather(t, chunk.keys) for t in (k_rows, v_rows))
        for part in chunk.parts:
            g, g_lse, a, o, sums = (None if t is None else part.queries_of(t) for t in gathered)
            b, c = part.keys_of(keys), part.keys_of(values)
            hidden, added = bias.of(part.look, fused)
            if fused:
                grads = _flash_backward(g, a, b, c, o, sums, 0.0, False, attn_mask=added, scale=scale)
            else:
                assert g is not None and a is not None and o is not None and sums is not None
                *grads, d_bias = attend_backward(
                    g, g_lse, a, b, c, o, sums, scale, hidden, added, bias_gradient=bias_gradient
                )
                if d_bias is not None:
                    by_look[part.look] = d_bias[0] + by_look[part.look] if part.look in by_look else d_bias[0]
            _put(d_q_rows, part.queries, grads[0])
            _add(d_k_rows, part.keys, grads[1])
            _add(d_v_rows, part.keys, grads[2])
    d_rpb = None
    if rpb is not None and bias_gradient:
        d_rpb = rpb.new_zeros(rpb.shape, dtype=lse.dtype)
        for look, d_bias in by_look.items():
            d_rpb += _to_table(d_bias, look.parts, d_rpb.shape)
        d_rpb = d_rpb.to(rpb.dtype)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_rpb


def _rows(x: Tensor, window: Window) -> Tensor:
    """(B, *grid, H, ...) as (B * N, H, ...): a view of all usual layouts."""
    return x.flatten(0, len(window.axes))


def _gather(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _put(rows: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Write (tiles, H, T, ...) to the rows of a part."""
    values = values.transpose(1, 2).flatten(0, 1)
    if index is None:
        rows.copy_(values)
    else:
        rows.index_copy_(0, index, values)


def _add(rows: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Add (tiles, G, W, D) to the rows of a part."""
    values = values.transpose(1, 2).flatten(0, 1)
    if index is None:
        rows.add_(values)
    else:
        rows.index_add_(0, index, values.to(rows.dtype))


def _fused_serves(q: Tensor, v: Tensor, rpb: Tensor | None) -> bool:
    """Whether the CPU's fused kernel can be called as it is; every query sees itself, so that no row is empty."""
    exact = rpb is None or q.dtype in (torch.float32, torch.float64)  # it takes a bias in the dtype of q alone
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.stride(-1) == v.stride(-1) == 1 and exact


# ------------------------------------------------------------------------------------------------------ chunks of tiles


@dataclass(frozen=True, eq=False)
class _Part:
    """Tiles of a chunk that look alike.

    Attributes:
        queries, keys: rows of the flattened batch and grid; None for all of them in order.
        query_slice, key_slice: where they are among those of the chunk.
    """

    look: Look
    tiles: int
    queries: Tensor | None
    keys: Tensor | None
    query_slice: slice
    key_slice: slice

    def queries_of(self, rows: Tensor) -> Tensor:
        """(tiles, H, T, ...) of the chunk's gathered rows."""
        return rows[self.query_slice].unflatten(0, (self.tiles, -1)).transpose(1, 2)

    def keys_of(self, rows: Tensor) -> Tensor:
        """(tiles, G, W, D) of the chunk's gathered rows."""
        return rows[self.key_slice].unflatten(0, (self.tiles, -1)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Tiles that are gathered together; a query is in one part of one chunk.

    Attributes:
        queries, keys: rows of the flattened batch and grid, part after part; None for all of them in order.
    """

    parts: tuple[_Part, ...]
    queries: Tensor | None
    keys: Tensor | None


def _chunks(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, window: Window) -> Sequence[_Chunk] | Iterator[_Chunk]:
    batch, heads = q.shape[0], q.shape[-2]
    if q.numel() == 0 or v.numel() == 0:
        return ()
    width = k.shape[-1] + v.shape[-1]
    sizes = tile_sizes(window, batch * heads, width, rpb is not None)
    if sizes == window.grid:
        return (_dense(window, rpb is not None, batch),)
    at_once = max(CHUNK // (k.shape[-2] * width), 1)
    arguments = (window, sizes, rpb is not None, batch, at_once, q.device)
    tokens = math.prod(window.grid)
    return _kept_chunks(*arguments) if batch * tokens * 8 <= KEPT_ROWS else _cut(*arguments)


@made_once(64)
def _dense(window: Window, relative: bool, batch: int) -> _Chunk:
    """One tile per image: nothing is gathered."""
    (look,) = looks(window, window.grid, relative)
    return _Chunk((_Part(look, batch, None, None, slice(None), slice(None)),), None, None)


def _cut(
    window: Window, sizes: tuple[int, ...], relative: bool, batch: int, at_once: int, device: torch.device
) -> Iterator[_Chunk]:
    """Chunks of at most about ``at_once`` gathered keys."""
    tokens = math.prod(window.grid)
    parts: list[tuple[Look, Tensor, Tensor]] = []
    room = at_once
    for look in looks(window, sizes, relative):
        kinds, width = look.keys.shape
        first, end = 0, batch * kinds
        while first < end:
            number = torch.arange(first, min(first + max(room // width, 1), end))
            offset = (torch.div(number, kinds, rounding_mode="floor") * tokens)[:, None]
            parts.append((look, look.queries[number % kinds] + offset, look.keys[number % kinds] + offset))
            first, room = first + len(number), room - len(number) * width
            if room < width:
                yield _chunk(parts, device)
                parts, room = [], at_once
    if parts:
        yield _chunk(parts, device)


@made_once(16)
def _kept_chunks(*arguments: Any) -> tuple[_Chunk, ...]:
    return tuple(_cut(*arguments))


def _chunk(tiles: list[tuple[Look, Tensor, Tensor]], device: torch.device) -> _Chunk:
    queries = torch.cat([rows.flatten() for _, rows, _ in tiles]).to(device)
    keys = torch.cat([rows.flatten() for _, _, rows in tiles]).to(device)
    parts, query, key = [], 0, 0
    for look, query_rows, key_rows in tiles:
        among = slice(query, query + query_rows.numel()), slice(key, key + key_rows.numel())
        parts.append(_Part(look, len(query_rows), queries[among[0]], keys[among[1]], *among))
        query, key = among[0].stop, among[1].stop
    return _Chunk(tuple(parts), queries, keys)


# ------------------------------------------------------------------------------------- masks, relative position tables


@dataclass(frozen=True)
class _Bias:
    """What is added to or hidden from the scores of tiles."""

    rpb: Tensor | None
    q: Tensor
    made: dict[Look, Tensor] = field(default_factory=dict)

    def of(self, look: Look, fused: bool) -> tuple[Tensor | None, Tensor | None]:
        """Mask (1, 1, T, W) bool and bias (1, 1 or H, T, W); the fused kernel takes a bias alone."""
        entries = math.prod(part.steps.numel() for part in look.parts)
        make = _kept_mask if entries <= KEPT_MASK else _mask
        if self.rpb is None:
            if fused:
                return None, make(look.parts, self.q.dtype, self.q.device)
            return make(look.parts, torch.bool, self.q.device), None
        if look not in self.made:
            precise = torch.promote_types(self.q.dtype, torch.float32)
            bias = _from_table(self.rpb.to(precise), look.parts)[None]
            hidden = make(look.parts, torch.bool, self.q.device)
            self.made[look] = bias if hidden is None else bias.masked_fill_(~hidden, -torch.inf)
        return None, self.made[look]


def _mask(parts: tuple[Piece, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(1, 1, T, W), true or 0 where a query sees a key, false or -inf elsewhere; None where all are seen."""
    seen = mask(parts)
    if seen is None:
        return None
    if dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return seen[None, None].to(device)


_kept_mask = made_once(128)(_mask)


def _from_table(rpb: Tensor, parts: Sequence[Piece]) -> Tensor:
    """(H, T, W) bias of a tile from the (H, 2k-1, ...) table."""
    bias, n = rpb, len(parts)
    for axis, part in enumerate(parts):
        bias = bias.index_select(axis + 1, part.steps.flatten().to(rpb.device))
    bias = bias.view(len(rpb), *(size for part in parts for size in part.steps.shape))
    bias = bias.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2))
    return bias.flatten(n + 1).flatten(1, n)


def _to_table(d_bias: Tensor, parts: Sequence[Piece], table: Sequence[int]) -> Tensor:
    """(H, 2k-1, ...) sums of a tile's (H, T, W) by entry, as products with one-hot matrices axis by axis."""
    n = len(parts)
    d_bias = d_bias.view(table[0], *(part.steps.shape[i] for i in (0, 1) for part in parts))
    d_bias = d_bias.permute(0, *(i for axis in range(n) for i in (1 + axis, 1 + n + axis)))
    # The last axis first: it is where the product wants it, and what is left is small.
    for axis in reversed(range(n)):
        one_hot = F.one_hot(parts[axis].steps.flatten().to(d_bias.device), table[axis + 1]).to(d_bias.dtype)
        place = 1 + 2 * axis
        d_bias = (d_bias.flatten(place, place + 1).movedim(place, -1) @ one_hot).movedim(-1, place)
    return d_bias
