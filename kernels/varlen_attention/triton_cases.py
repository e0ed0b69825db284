"""Calls that reach every configuration of packed attention's kernels, for the compile gate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from kernels.varlen_attention import triton_path


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile size, with and without a causal mask, a bias and grouped heads."""
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), (32, 64, 128, 256)):
        yield f"heads of {width}", lambda d=dtype, w=width: _call(d, w)  # type: ignore[misc]
    yield "causal, grouped, biased", lambda: _call(torch.bfloat16, 64, causal=True, key_heads=2, biased=True)
    yield "odd widths", lambda: _call(torch.float32, 20, value_width=72)


def _call(
    dtype: torch.dtype,
    width: int,
    value_width: int | None = None,
    causal: bool = False,
    key_heads: int = 4,
    biased: bool = False,
) -> object:
    total, heads, width_v = 4096, 4, value_width or width
    q = torch.empty(total, heads, width, dtype=dtype, device="meta")
    k = torch.empty(total, key_heads, width, dtype=dtype, device="meta")
    v = torch.empty(total, key_heads, width_v, dtype=dtype, device="meta")
    cuts = torch.empty(9, dtype=torch.int32, device="meta")
    bias = torch.empty(heads, total, device="meta") if biased else None
    out, lse = triton_path.forward(q, k, v, cuts, cuts, bias, causal, 0.125)
    return triton_path.backward(out, None, q, k, v, cuts, cuts, bias, out, lse, causal, 0.125)
