"""Calls that reach every configuration of attention pooling's kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.gated_attention_pool import triton_path


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile size, gated or not, with hidden instances and with values of their own."""
    half, single = torch.bfloat16, torch.float32
    yield "many rows", lambda: _call(half, 200_000)
    yield "few rows", lambda: _call(half, 8_000)
    yield "many branches, hidden instances", lambda: _call(half, 200_000, branches=40, hide=True, d_scores=True)
    yield "one bag, one branch, tanh alone", lambda: _call(half, 200_000, bags=1, gated=False, branches=1)
    yield "values of their own, odd widths", lambda: _call(half, 200_000, depth=500, width=100, values=300)
    yield "many rows", lambda: _call(single, 200_000)
    yield "odd", lambda: _call(single, 9_001, gated=False, branches=40, depth=500, width=100, hide=True, d_scores=True)


def _call(
    dtype: torch.dtype,
    rows: int,
    depth: int = 512,
    width: int = 128,
    branches: int = 5,
    gated: bool = True,
    hide: bool = False,
    values: int | None = None,
    d_scores: bool = False,
    bags: int = 8,
) -> object:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    units = 2 * width if gated else width
    weights = (empty(units, depth), empty(units), empty(branches, width), empty(branches))
    cuts = torch.empty(bags + 1, dtype=torch.int32, device="meta")
    mask = torch.empty(rows, branches, dtype=torch.bool, device="meta") if hide else None
    x, pooled_from = empty(rows, depth), None if values is None else empty(rows, values)
    pooled, lse, scores, stats = triton_path.forward(x, *weights, cuts, pooled_from, mask)
    return triton_path.backward(
        pooled, lse, scores if d_scores else None, x, *weights, cuts, pooled_from, mask, pooled, scores, stats,
        True, True,
    )  # fmt: skip
