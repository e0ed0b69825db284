"""Calls that reach every configuration of neighbourhood attention's kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.neighborhood_attention import triton_path
from kernels.windows import window

HALF, FLOAT = torch.bfloat16, torch.float32


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile size, each number of axes, with and without a bias and grouped heads."""
    yield "2-D, heads of 32", lambda: _call(HALF, 32, (56, 56), 7)
    yield "3-D, heads of 64", lambda: _call(HALF, 64, (16, 16, 16), 5)
    yield "3-D, heads of 128", lambda: _call(HALF, 128, (16, 16, 16), 5)
    yield "2-D, heads of 256", lambda: _call(HALF, 256, (56, 56), 7)
    yield "1-D, large window", lambda: _call(HALF, 128, (4096,), 512, forward_only=True)
    yield "3-D, heads of 32", lambda: _call(FLOAT, 32, (16, 16, 16), 5)
    yield "3-D, heads of 64, biased", lambda: _call(FLOAT, 64, (16, 16, 16), 5, biased=True)
    yield "2-D, heads of 256", lambda: _call(FLOAT, 256, (56, 56), 7)
    for width in (32, 128):
        yield (
            f"2-D, heads of {width}, biased, strided, grouped",
            lambda w=width: _call(  # type: ignore[misc]
                HALF, w, (56, 56), 7, biased=True, stride=2, dilation=2, causal=True, key_heads=2
            ),
        )


def _call(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, ...],
    kernel_size: int,
    key_heads: int = 4,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    biased: bool = False,
    forward_only: bool = False,
) -> object:
    frame = window(grid, kernel_size, stride, dilation, causal)
    q = torch.empty(8, *grid, 4, width, dtype=dtype, device="meta")
    k, v = (torch.empty(8, *grid, key_heads, width, dtype=dtype, device="meta") for _ in range(2))
    rpb = torch.empty(4, *(2 * size - 1 for size in frame.kernel), device="meta") if biased else None
    out, lse = triton_path.forward(q, k, v, rpb, frame, 0.125)
    if forward_only:
        return out
    return triton_path.backward(out, None, q, k, v, rpb, out, lse, frame, 0.125, biased)
