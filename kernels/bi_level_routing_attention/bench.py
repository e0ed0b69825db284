"""Routing attention beside the released formulation and dense attention under a mask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bi_level_routing_attention import bi_level_routing_attention, route_regions
from kernels.measure import Case, Contestant

# Batch, side of the map, side of a region, heads, topk: BiFormer's first three stages, and a map of dense prediction.
SIZES = [(2, 56, 8, 2, 1), (2, 28, 4, 4, 4), (2, 14, 2, 8, 16), (1, 64, 8, 4, 8)]
LARGE = [(64, 56, 8, 2, 1), (64, 28, 4, 4, 4), (64, 14, 2, 8, 16), (4, 128, 8, 4, 8)]
WIDTH = 32


def cases(device: torch.device) -> Iterator[Case]:
    """Maps (B, C, H, W) routed by themselves; on a GPU also in bfloat16, with channels last."""
    runs = [(size, torch.float32, torch.contiguous_format) for size in SIZES]
    if device.type == "cuda":
        layouts = (torch.contiguous_format, torch.channels_last)
        runs = [(size, dtype, f) for size in LARGE for dtype in (torch.float32, torch.bfloat16) for f in layouts]
    for (batch, side, region, heads, topk), dtype, layout in runs:
        shape = (batch, heads * WIDTH, side, side)
        q, k, v = (torch.randn(shape, device=device).to(dtype, memory_format=layout).requires_grad_() for _ in range(3))
        graph = route_regions(q, k, region, topk)
        scale = shape[1] ** -0.5
        tokens, keys = batch * side * side, topk * region * region
        order = "" if layout is torch.contiguous_format else ", channels last"
        yield Case(
            f"routing B{batch} {side}x{side} regions {region}x{region} heads {heads} topk {topk} "
            f"{str(dtype).removeprefix('torch.')}{order}",
            [
                Contestant("released", partial(_gathered, q, k, v, graph, region, heads, scale), (q, k, v)),
                Contestant("dense SDPA, mask", partial(_masked, q, k, v, graph, region, heads, scale), (q, k, v)),
                Contestant("fovea", partial(_ours, q, k, v, graph, region, heads), (q, k, v)),
            ],
            baseline="released",
            flops=4.0 * tokens * keys * heads * WIDTH,
            bytes=4.0 * tokens * heads * WIDTH * q.element_size(),
            tolerance=2e-3 if dtype == torch.float32 else 3e-2,
        )


def _ours(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, region: int, heads: int) -> Tensor:
    return bi_level_routing_attention(q, k, v, region, region_graph=graph, num_heads=heads)[0]


def _gathered(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, region: int, heads: int, scale: float) -> Tensor:
    """Regions of keys and values expanded to every query region, gathered by an index as large as the result."""
    a, b, c = (_regions(t, region, heads) for t in (q, k, v))
    batch, _, count, tokens, width = b.shape
    topk = graph.shape[3]
    index = graph.expand(-1, heads, -1, -1)[..., None, None].expand(-1, -1, -1, -1, tokens, width)
    b, c = (
        t[:, :, None].expand(-1, -1, count, -1, -1, -1).gather(3, index).view(batch, heads, count, topk * tokens, width)
        for t in (b, c)
    )
    weights = ((a * scale) @ b.mT).softmax(-1)
    return _map(weights @ c, q.shape, region)


def _masked(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, region: int, heads: int, scale: float) -> Tensor:
    """Attention of everything to everything, with what is not routed hidden."""
    a, b, c = (_regions(t, region, heads) for t in (q, k, v))
    count, tokens = a.shape[2:4]
    seen = torch.zeros(q.shape[0], 1, count, count, dtype=torch.bool, device=q.device).scatter_(3, graph, True)
    mask = seen.repeat_interleave(tokens, 2).repeat_interleave(tokens, 3)
    flat = [t.flatten(2, 3) for t in (a, b, c)]
    out = F.scaled_dot_product_attention(flat[0], flat[1], flat[2], attn_mask=mask, scale=scale)
    return _map(out.view_as(a), q.shape, region)


def _regions(x: Tensor, region: int, heads: int) -> Tensor:
    """(B, C, H, W) as (B, heads, regions, tokens, D)."""
    cut = x.unflatten(3, (-1, region)).unflatten(2, (-1, region)).unflatten(1, (heads, -1))
    return cut.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)


def _map(x: Tensor, shape: torch.Size, region: int) -> Tensor:
    """The reverse of :func:`_regions`."""
    cut = x.unflatten(3, (region, region)).unflatten(2, (shape[2] // region, -1))
    return cut.permute(0, 1, 6, 2, 4, 3, 5).reshape(shape)
