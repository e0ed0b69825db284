"""Calls that reach every configuration of group attention's kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.group_attention import triton_path
from kernels.group_attention.groups import groups


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile size, with and without global tokens; the widths of the released model are 9 and 10."""
    narrow, wide = torch.bfloat16, torch.float32
    yield "released widths", lambda: _call(narrow, 9, 10, 256, 16)
    yield "released widths, small groups", lambda: _call(narrow, 9, 10, 32, 128)
    yield "released widths", lambda: _call(wide, 9, 10, 256, 16)
    yield "without global tokens", lambda: _call(narrow, 16, 16, 256, 0)
    for dtype, width in ((narrow, 64), (narrow, 128), (narrow, 256), (wide, 256)):
        yield f"heads of {width}", lambda d=dtype, w=width: _call(d, w, w, 256, 64)  # type: ignore[misc]


def _call(dtype: torch.dtype, width: int, value_width: int, size: int, members: int) -> object:
    heads, tokens = 4, 4000
    q, k = (torch.empty(2, tokens, heads, width, dtype=dtype, device="meta") for _ in range(2))
    v = torch.empty(2, tokens, heads, value_width, dtype=dtype, device="meta")
    order = torch.empty(2, tokens, dtype=torch.int64, device="meta")
    known = worth = None
    if members:
        known = torch.empty(1, members, heads, width, dtype=dtype, device="meta")
        worth = torch.empty(1, members, heads, value_width, dtype=dtype, device="meta")
    cut = groups(tokens, size)
    out, lse, lse_global = triton_path.forward(q, k, v, order, known, worth, cut, 0.25)
    return triton_path.backward(out, q, k, v, order, known, worth, out, lse, lse_global, cut, 0.25)
