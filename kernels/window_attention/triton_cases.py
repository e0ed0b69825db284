"""Calls that reach every configuration of window attention's kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.window_attention import triton_path
from kernels.window_attention.geometry import geometry


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile size; masks, bias and its gradient where they weigh most."""
    half, single = torch.bfloat16, torch.float32
    yield "7 x 7, heads of 32", lambda: _call(half, 32, (7, 7))
    yield "7 x 7, heads of 64, shifted, extended", lambda: _call(half, 64, (7, 7), shift=3, side=58)
    yield "4 x 4", lambda: _call(half, 32, (4, 4))
    yield "4 x 8 grid", lambda: _call(half, 32, (4, 8), grid=True)
    yield "7 x 7, shifted", lambda: _call(single, 32, (7, 7), shift=3)
    yield "4 x 8 grid", lambda: _call(single, 32, (4, 8), grid=True, biased=False)
    yield "16 x 16, heads of 32", lambda: _call(half, 32, (16, 16))
    yield "16 x 16, heads of 64, shifted", lambda: _call(half, 64, (16, 16), shift=8)
    yield "12 x 12, heads of 128, shifted, extended", lambda: _call(half, 128, (12, 12), shift=6, side=58, biased=False)
    yield "7 x 7, heads of 256", lambda: _call(half, 256, (7, 7), biased=False)
    yield "16 x 16, heads of 32", lambda: _call(single, 32, (16, 16))
    yield "7 x 7, heads of 128, shifted", lambda: _call(single, 128, (7, 7), shift=3)


def _call(
    dtype: torch.dtype,
    width: int,
    window: tuple[int, int],
    grid: bool = False,
    shift: int = 0,
    side: int = 112,
    biased: bool = True,
) -> object:
    heads, tokens = 4, window[0] * window[1]
    qkv = torch.empty(2, side, side, 3, heads, width, dtype=dtype, device="meta")
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    bias = torch.empty(heads, tokens, tokens, device="meta") if biased else None
    cut = geometry(q.shape, window, grid, (shift, shift), False, True)
    out, lse = triton_path.forward(q, k, v, bias, cut, 0.125)
    return triton_path.backward(out, None, q, k, v, bias, out, lse, cut, 0.125, biased)
