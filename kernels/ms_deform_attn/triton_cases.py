"""Calls that reach every configuration of deformable sampling's kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.ms_deform_attn import triton_path


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Usual and odd head sizes, with both ways to sum the gradient of the values."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (32, 64, 256):
            yield f"heads of {width}", lambda d=dtype, w=width: _call(d, w)  # type: ignore[misc]
    yield "odd width, half locations", lambda: _call(torch.float16, 20, torch.float16)


def _call(dtype: torch.dtype, width: int, positions: torch.dtype = torch.float32) -> object:
    shapes, starts = [64, 64, 32, 32], [0, 4096]
    value = torch.empty(2, 5120, 8, width, dtype=dtype, device="meta")
    locations = torch.empty(2, 300, 8, 2, 4, 2, dtype=positions, device="meta")
    weights = torch.empty(2, 300, 8, 2, 4, dtype=positions, device="meta")
    given = (value, locations, weights, shapes, starts)
    out = triton_path.forward(*given)
    triton_path.gather_values(out, *given)
    return triton_path.backward(out, *given)
