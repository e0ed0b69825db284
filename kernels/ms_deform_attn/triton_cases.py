"""Calls that reach every configuration of the deformable sampling kernels, for the compile gate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from kernels.ms_deform_attn import triton_path


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Narrow, usual, odd and wide heads; half precision with exact locations, as under autocast."""
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), (32, 256)):
        yield f"heads of {width}", lambda d=dtype, w=width: _call(d, w)  # type: ignore[misc]
    yield "odd heads", lambda: _call(torch.float32, 20)


def _call(dtype: torch.dtype, width: int) -> object:
    sizes = [64, 64, 32, 32, 16, 16, 8, 8]
    value = torch.empty(2, 5440, 8, width, dtype=dtype, device="meta")
    locations = torch.empty(2, 1000, 8, 4, 4, 2, device="meta")
    weights = torch.empty(2, 1000, 8, 4, 4, device="meta")
    out = triton_path.forward(value, sizes, locations, weights)
    return triton_path.backward(out, value, sizes, locations, weights)
