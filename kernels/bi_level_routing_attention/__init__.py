"""Bi-level routing attention: each region of a map attends to the few regions that are most like it.

The attention of BiFormer (Zhu et al., CVPR 2023), apart from its projections: means of regions choose, for every
region of queries, ``topk`` regions of keys (:func:`route_regions`), and its queries attend to all their tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Choice, choose
from kernels.bi_level_routing_attention.layout import map_of
from kernels.bi_level_routing_attention.operator import routing_attention_forward
from kernels.bi_level_routing_attention.reference import routing_attention_reference
from kernels.bi_level_routing_attention.regions import RegionSize, as_map, regions, route_regions
from kernels.checks import check_dtypes, check_indices
from kernels.errors import InputError
from kernels.operators import autocast_to

__all__ = ["bi_level_routing_attention", "plan", "route_regions", "routing_probabilities"]

LARGEST_HEAD = 256


def bi_level_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_size: RegionSize,
    *,
    topk: int | None = None,
    region_graph: Tensor | None = None,
    num_heads: int | None = None,
    kv_region_size: RegionSize | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each region's queries to the tokens of the regions it is routed to.

    Maps are (B, C, H, W), whose channels are ``num_heads`` heads end to end, or (B, H, W, heads, D); of any strides.
    Where a size is not a multiple of the region's, the last regions stick out of the map at the bottom and the right:
    tokens there are zeros, and as keys they take part with score 0 and value 0, unless ``mask_padding`` hides them.

    Args:
        q: map of queries.
        k, v: maps of keys and values, of another height and width than the queries where wanted; heads of ``v`` may be
            wider or narrower.
        region_size: rows and columns of a region of queries, or one number for both.
        topk: how many regions each is routed to, by :func:`route_regions`; give this or ``region_graph``.
        region_graph: (B, 1 or heads, query regions, n) int64, numbers of key regions in row-major order; a region that
            is named twice counts twice. They must be from 0 to the number of regions - 1; GPU kernels do not check.
        num_heads: of (B, C, H, W) maps.
        kv_region_size: as ``region_size``, of the keys; ``region_size`` by default.
        scale: of the scores; C^-0.5 with the channels of all heads by default, as the released models have it.
        mask_padding: hide keys outside the map.

    Returns:
        out: in the layout of ``q``, with the channels of ``v``.
        region_graph: the one given, or (B, 1, query regions, topk).
        lse: (B, heads, H, W) float32 (float64 for float64), natural log-sum-exp of the scores.

    Raises:
        InputError: shapes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(
        q,
        k,
        v,
        region_size,
        topk=topk,
        region_graph=region_graph,
        num_heads=num_heads,
        kv_region_size=kv_region_size,
        scale=scale,
        mask_padding=mask_padding,
        backend=backend,
    )
    q, k, v = autocast_to(q, k, v)
    key_size = region_size if kv_region_size is None else kv_region_size
    if region_graph is None:
        assert topk is not None
        region_graph = route_regions(q, k, region_size, topk, kv_region_size=key_size, num_heads=num_heads)
    # A (B, C, H, W) map may be dense in either order in memory; the output is dense in the same.
    planes = q.dim() == 4 and q.stride(1) != 1
    channels_first = q.dim() == 4
    a, b, c = as_map(q, num_heads), as_map(k, num_heads, "k"), as_map(v, num_heads, "v")
    scale = (a.shape[3] * a.shape[4]) ** -0.5 if scale is None else scale
    query_grid, key_grid = regions(a.shape[1:3], region_size), regions(b.shape[1:3], key_size)
    if choice.backend == "reference":
        out, lse, _ = routing_attention_reference(a, b, c, region_graph, query_grid, key_grid, scale, mask_padding)
    else:
        sizes = [query_grid.rows, query_grid.columns], [key_grid.rows, key_grid.columns]
        raw, lse = routing_attention_forward(a, b, c, region_graph, *sizes, scale, mask_padding, planes, choice.backend)
        out = map_of(raw, planes)
    return out.permute(0, 3, 4, 1, 2).flatten(1, 2) if channels_first else out, region_graph, lse


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_size: RegionSize,
    *,
    topk: int | None = None,
    region_graph: Tensor | None = None,
    num_heads: int | None = None,
    kv_region_size: RegionSize | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`bi_level_routing_attention` and say which implementation serves them."""
    a, b, c = as_map(q, num_heads), as_map(k, num_heads, "k"), as_map(v, num_heads, "v")
    if q.dim() != k.dim() or k.dim() != v.dim() or b.shape[:4] != c.shape[:4]:
        raise InputError(
            f"bi_level_routing_attention: k {tuple(k.shape)} and v {tuple(v.shape)} must be maps of one size in the "
            f"layout of q {tuple(q.shape)}."
        )
    if (a.shape[0], *a.shape[3:]) != (b.shape[0], *b.shape[3:]):
        raise InputError(
            f"bi_level_routing_attention: q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, heads or width."
        )
    check_dtypes("bi_level_routing_attention", q=q, k=k, v=v)
    query_grid = regions(a.shape[1:3], region_size)
    key_grid = regions(b.shape[1:3], region_size if kv_region_size is None else kv_region_size)
    if (topk is None) == (region_graph is None):
        raise InputError("bi_level_routing_attention takes either topk or a region_graph, and one of them it needs.")
    if topk is not None and not 1 <= topk <= key_grid.count:
        raise InputError(f"bi_level_routing_attention: topk {topk} must be from 1 to the {key_grid.count} key regions.")
    if region_graph is not None:
        shapes = [(a.shape[0], heads, query_grid.count) for heads in (1, a.shape[3])]
        if region_graph.dim() != 4 or tuple(region_graph.shape[:3]) not in shapes or region_graph.shape[3] == 0:
            raise InputError(
                f"bi_level_routing_attention: region_graph must be (B, 1 or heads, query regions, n) = ({a.shape[0]}, "
                f"1 or {a.shape[3]}, {query_grid.count}, at least 1); got {tuple(region_graph.shape)}."
            )
        if region_graph.dtype != torch.int64:
            raise InputError(f"bi_level_routing_attention: region_graph must be int64; got {region_graph.dtype}.")
        check_indices("bi_level_routing_attention", "region_graph", region_graph, key_grid.count)
    largest = max(a.shape[4], c.shape[4])
    refusal = f"heads are {largest} wide and the kernels take up to {LARGEST_HEAD}" if largest > LARGEST_HEAD else None
    return choose("bi_level_routing_attention", backend, (q, k, v), refusal)


def routing_probabilities(
    q: Tensor,
    k: Tensor,
    region_size: RegionSize,
    region_graph: Tensor,
    *,
    num_heads: int | None = None,
    kv_region_size: RegionSize | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
) -> Tensor:
    """What :func:`bi_level_routing_attention` weighs its values by, for looking at; slow, and large in memory.

    Returns:
        (B, heads, query regions, tokens, keys): keys in the order of ``region_graph``, then row-major in the region.
    """
    plan(
        q,
        k,
        k,
        region_size,
        region_graph=region_graph,
        num_heads=num_heads,
        kv_region_size=kv_region_size,
    )
    a, b = as_map(q, num_heads), as_map(k, num_heads, "k")
    scale = (a.shape[3] * a.shape[4]) ** -0.5 if scale is None else scale
    query_grid = regions(a.shape[1:3], region_size)
    key_grid = regions(b.shape[1:3], region_size if kv_region_size is None else kv_region_size)
    return routing_attention_reference(a, b, b, region_graph, query_grid, key_grid, scale, mask_padding)[2]
