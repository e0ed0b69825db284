"""Calls that reach every configuration of the routing kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.bi_level_routing_attention import triton_path
from kernels.bi_level_routing_attention.regions import Regions


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile size, in both layouts, with and without regions that stick out."""
    narrow, wide = torch.bfloat16, torch.float32
    for dtype, width, small in (
        (narrow, 32, True), (narrow, 32, False), (narrow, 64, False), (narrow, 128, False), (narrow, 256, False),
        (wide, 32, True), (wide, 32, False), (wide, 256, False),
    ):  # fmt: skip
        name = f"heads of {width}, {'small' if small else 'large'} regions"
        yield name, lambda d=dtype, w=width, s=small: _call(d, w, s)  # type: ignore[misc]
    yield "planes, small regions", lambda: _call(narrow, 32, True, planes=True)
    yield "planes, padding masked", lambda: _call(narrow, 32, False, planes=True, mask_padding=True)
    yield "planes", lambda: _call(wide, 32, False, planes=True)


def _call(dtype: torch.dtype, width: int, small: bool, planes: bool = False, mask_padding: bool = False) -> object:
    heads, side = 4, 4 if small else 8
    grid = Regions(58 if mask_padding else 56, 56, side, side)
    shape = (2, heads, width, grid.height, grid.width) if planes else (2, grid.height, grid.width, heads, width)
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(3))
    if planes:
        q, k, v = (t.permute(0, 3, 4, 1, 2) for t in (q, k, v))
    graph = torch.empty(2, 1, grid.count, 4, dtype=torch.int64, device="meta")
    out, lse = triton_path.forward(q, k, v, graph, grid, grid, 0.125, mask_padding, planes)
    return triton_path.backward(out, None, q, k, v, graph, out, lse, grid, grid, 0.125, mask_padding, planes)
