"""Bi-level routing attention in Triton: launches of :mod:`kernels.bi_level_routing_attention.triton_kernels`.

Gradients of keys and values need the graph inverted: which query regions are routed to a key region. It is built on the
device, without atomics and without waiting for it.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from kernels.bi_level_routing_attention.layout import empty_map, map_of
from kernels.bi_level_routing_attention.regions import Regions
from kernels.bi_level_routing_attention.triton_kernels import (
    attention_forward,
    invert_graph,
    key_gradients,
    query_gradient,
)
from kernels.launch import Config, interpreting, launch, precision

# A table of every pair of regions takes one launch; above this many query regions it would be large, and is sorted.
LARGEST_TABLE = 1024
WIDEST_PLANES = 32


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
    """Outputs and log-sum-exp as :mod:`kernels.bi_level_routing_attention.operator` describes them."""
    if planes and _too_wide(q, v):
        a, b, c = (t.contiguous() for t in (q, k, v))
        out, lse = forward(a, b, c, region_graph, query_grid, key_grid, scale, mask_padding, planes=False)
        return out.permute(0, 3, 4, 1, 2).contiguous(), lse
    q, k, v = _dense_heads(q, k, v, planes)
    out = empty_map(q, v.shape[4], planes)
    lse = q.new_empty((q.shape[0], q.shape[3], *q.shape[1:3]), dtype=torch.float32)
    configs = _configs(q, v, query_grid.tokens, planes, "forward")
    launch(
        attention_forward,
        lambda c: (_tiles(query_grid, c["BLOCK"]) * query_grid.count * q.shape[0] * q.shape[3],),
        {
            **_operands(q, k, v, query_grid, key_grid, scale, planes),
            **_routes(region_graph),
            "tiles": _tiles(query_grid, configs[0].constants["BLOCK"]),
            "out": out,
            "lse": lse,
            "MASK": mask_padding and key_grid.ragged,
        },
        configs,
    )
    return out, lse


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
    """Gradients of q, k and v; the incoming gradients are contiguous."""
    if planes and _too_wide(q, v):
        a, b, c, d_out, o = (t.contiguous() for t in (q, k, v, map_of(grad_out, planes), map_of(out, planes)))
        grads = backward(
            d_out, grad_lse, a, b, c, region_graph, o, lse, query_grid, key_grid, scale, mask_padding, planes=False
        )
        d_q, d_k, d_v = (g.permute(0, 3, 4, 1, 2).contiguous() for g in grads)
        return d_q, d_k, d_v
    q, k, v = _dense_heads(q, k, v, planes)
    d_q, d_k, d_v = (empty_map(t, t.shape[4], planes) for t in (q, k, v))
    delta = torch.empty_like(lse)
    operands = _operands(q, k, v, query_grid, key_grid, scale, planes)
    configs = _configs(q, v, query_grid.tokens, planes, "queries")
    launch(
        query_gradient,
        lambda c: (_tiles(query_grid, c["BLOCK"]) * query_grid.count * q.shape[0] * q.shape[3],),
        {
            **operands,
            **_routes(region_graph),
            "tiles": _tiles(query_grid, configs[0].constants["BLOCK"]),
            "grad_out": grad_out,
            "grad_lse": grad_lse,
            "out": out,
            "lse": lse,
            "delta": delta,
            "d_q": d_q,
        },
        configs,
    )
    entries, starts, ends = _inverse(region_graph, key_grid)
    configs = _configs(q, v, key_grid.tokens, planes, "keys")
    launch(
        key_gradients,
        lambda c: (_tiles(key_grid, c["BLOCK"]) * key_grid.count * q.shape[0] * q.shape[3],),
        {
            **operands,
            "entries": entries,
            "starts": starts,
            "ends": ends,
            "tiles": _tiles(key_grid, configs[0].constants["BLOCK"]),
            "key_regions": key_grid.count,
            "graph_heads": region_graph.shape[1],
            "grad_out": grad_out,
            "lse": lse,
            "delta": delta,
            "d_k": d_k,
            "d_v": d_v,
        },
        configs,
    )
    return d_q, d_k, d_v


def _too_wide(q: Tensor, v: Tensor) -> bool:
    """Heads this wide are copied to where their channels are neighbours: addresses of each would fill the registers."""
    return max(q.shape[4], v.shape[4]) > WIDEST_PLANES


def _dense_heads(q: Tensor, k: Tensor, v: Tensor, planes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels take any strides, but are fastest, and compiled for, channels that are neighbours."""
    if planes:
        return q, k, v
    a, b, c = (t if t.stride(4) == 1 else t.contiguous() for t in (q, k, v))
    return a, b, c


def _operands(
    q: Tensor, k: Tensor, v: Tensor, query_grid: Regions, key_grid: Regions, scale: float, planes: bool
) -> dict[str, object]:
    axes = ("batch", "row", "column", "head", "channel")
    return {
        "q": q,
        "k": k,
        "v": v,
        "scale": scale,
        "heads": q.shape[3],
        "regions": query_grid.count,
        "height": query_grid.height,
        "width": query_grid.width,
        "across": query_grid.across,
        "rows": query_grid.rows,
        "columns": query_grid.columns,
        "key_height": key_grid.height,
        "key_width": key_grid.width,
        "key_across": key_grid.across,
        "key_rows": key_grid.rows,
        "key_columns": key_grid.columns,
        **{f"{n}_{a}": s for n, t in (("q", q), ("k", k), ("v", v)) for a, s in zip(axes, t.stride(), strict=True)},
        "D": q.shape[4],
        "E": v.shape[4],
        "BLOCK_D": max(triton.next_power_of_2(q.shape[4]), 16),
        "BLOCK_E": max(triton.next_power_of_2(v.shape[4]), 16),
        "PLANES": planes,
        "PRECISION": precision(q.dtype),
    }


def _routes(region_graph: Tensor) -> dict[str, object]:
    graph = region_graph.contiguous()
    return {
        "graph": graph,
        "topk": graph.shape[3],
        "graph_batch": graph.stride(0),
        "graph_head": 0 if graph.shape[1] == 1 else graph.stride(1),
    }


def _inverse(region_graph: Tensor, key_grid: Regions) -> tuple[Tensor, Tensor, Tensor]:
    """Query regions that name each key region, as ``times named * query regions + number``.

    Returns:
        entries: int32; starts, ends: (B, heads of the graph, key regions) int64, bounds of a key region's entries.
    """
    graph = region_graph.contiguous()
    batch, heads, regions, topk = graph.shape
    bounds = (batch, heads, key_grid.count)
    if regions > LARGEST_TABLE:
        named, positions = graph.flatten(2).sort(dim=2, stable=True)
        numbers = torch.arange(key_grid.count + 1, device=graph.device).expand(batch, heads, -1).contiguous()
        first = torch.arange(batch * heads, device=graph.device).view(batch, heads, 1) * (regions * topk)
        cuts = torch.searchsorted(named, numbers) + first
        entries = positions.div_(topk, rounding_mode="floor").add_(regions).to(torch.int32)  # a repeat is listed twice
        return entries, cuts[..., :-1].contiguous(), cuts[..., 1:].contiguous()
    entries = graph.new_empty(*bounds, regions, dtype=torch.int32)
    starts, ends = graph.new_empty(bounds), graph.new_empty(bounds)
    launch(
        invert_graph,
        lambda c: (starts.numel(),),
        {
            "graph": graph,
            "entries": entries,
            "starts": starts,
            "ends": ends,
            "regions": regions,
            "key_regions": key_grid.count,
            "topk": topk,
        },
        [Config({"BLOCK": 64, "BLOCK_N": 16}, 4, 1)],
    )
    return entries, starts, ends


def _tiles(grid: Regions, block: int) -> int:
    """Tiles of a region."""
    return -(-grid.tokens // block)


def _configs(
    q: Tensor, v: Tensor, tokens: int, planes: bool, kernel: Literal["forward", "queries", "keys"]
) -> list[Config]:
    """Tiles by the tokens of a region and the width of a head, chosen so that nothing spills.

    Regions of up to 16 tokens take the smallest tile of the tensor cores and few warps. Exact float32 products need
    many registers, and so do the addresses of tiles whose channels are apart.
    """
    if interpreting():
        return [Config({"BLOCK": 16, "BLOCK_N": 32})]
    width = triton.next_power_of_2(max(q.shape[4], v.shape[4], 16))
    small = tokens <= 16
    if q.dtype == torch.float32:
        if width > 32:
            # Of heads of 256 the query gradient keeps two to four numbers of a thread on the stack.
            return [Config({"BLOCK": 16, "BLOCK_N": 16}, 8, 1 if kernel == "keys" else 2, spills=16)]
        return [Config({"BLOCK": 16 if small or planes else 32, "BLOCK_N": 32}, 4 if small or planes else 8, 1)]
    if width <= 64 and small:
        return [Config({"BLOCK": 16, "BLOCK_N": 32 if planes else 64}, 2, 2)]
    if width <= 64:
        narrow = planes or (kernel != "forward" and width == 64)
        return [Config({"BLOCK": 64, "BLOCK_N": 32 if narrow else 64}, 8 if narrow else 4, 2)]
    if width == 128:
        return [Config({"BLOCK": 64, "BLOCK_N": 32}, 8, 2)]
    return [Config({"BLOCK": 32, "BLOCK_N": 16}, 8, 1)]
