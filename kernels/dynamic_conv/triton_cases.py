"""Calls that reach every configuration of the windowed products' kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels.dynamic_conv import triton_path
from kernels.dynamic_conv.taps import taps

BFLOAT, FLOAT = torch.bfloat16, torch.float32


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every width of a head, small and large windows, 1-D to 3-D, both borders, dilation, a table."""
    yield "7 x 7, heads of 16, table", lambda: _call(BFLOAT, 16, (64, 64), 7, biased=True)
    yield "17 x 17, heads of 128", lambda: _call(BFLOAT, 128, (32, 32), 17)
    yield "11 x 11 dilated, heads of 64, table", lambda: _call(BFLOAT, 64, (32, 32), 11, dilation=2, biased=True)
    yield "9 x 9 x 9, heads of 64, zeros", lambda: _call(BFLOAT, 64, (16,) * 3, 9, padding="zero")
    yield "5 x 5 x 5 dilated, zeros, heads of 256", lambda: _call(BFLOAT, 256, (16,) * 3, 5, dilation=2, padding="zero")
    yield "7 x 7 dilated, zeros, odd width", lambda: _call(FLOAT, 24, (64, 64), 7, dilation=2, padding="zero")
    yield "13 x 13, heads of 64, table", lambda: _call(FLOAT, 64, (32, 32), 13, biased=True)
    yield "7, heads of 256", lambda: _call(FLOAT, 256, (4096,), 7)


def _call(
    dtype: torch.dtype, width: int, grid: tuple[int, ...], kernel: int, biased: bool = False, **window: Any
) -> object:
    where = taps(grid, kernel, window.get("dilation", 1), window.get("padding", "shift"))
    q = torch.empty(8, 4, *grid, width, dtype=dtype, device="meta")
    rpb = torch.empty(4, *where.table, device="meta") if biased else None
    logits = triton_path.products(q, q, rpb, 0.125, where)
    triton_path.weighted_sum(logits, q, 0.125, where)
    triton_path.transposed_sum(logits, q, 0.125, where)
    return triton_path.table_gradient(logits, where) if biased else None
