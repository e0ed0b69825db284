"""Calls that reach every configuration of linear attention's kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.linear_attention import triton_path
from kernels.linear_attention.forms import Form


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile with what needs most registers (MALA, rotated and weighed), and the other forms in one tile each."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (32, 64, 128)[: 2 if dtype == torch.float32 else 3]:
            yield f"mala, heads of {width}", lambda d=dtype, w=width: _call(d, w, "mala")  # type: ignore[misc]
    yield "plain", lambda: _call(torch.bfloat16, 32, "sum", bare=True)
    yield "inline, packed, odd widths", lambda: _call(torch.float32, 20, "inline", 48, packed=True)


def _call(
    dtype: torch.dtype,
    width: int,
    normaliser: str,
    value_width: int | None = None,
    bare: bool = False,
    packed: bool = False,
) -> object:
    batch, tokens, heads = (1, 4096, 4) if packed else (8, 784, 4)
    q, k, v = (
        torch.empty(batch, tokens, heads, w, dtype=dtype, device="meta") for w in (width, width, value_width or width)
    )
    weight = None if bare else torch.empty(batch, tokens, heads, device="meta")
    table = None if bare else torch.empty(tokens, width // 2, device="meta")
    cuts = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    form = Form.of(normaliser, "elu_plus_one", None, None, None, width)
    given = (q, k, v, weight, weight, table, table, table, table, cuts, cuts)
    out, state = triton_path.forward(*given, form)
    return triton_path.backward(out, *given, state, form)
