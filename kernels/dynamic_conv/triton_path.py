"""Windowed products in Triton: launches of :mod:`kernels.dynamic_conv.triton_kernels`.

Tensors are heads-first views with any strides but that of their last axis. Grids are taken as 3-D with leading axes of
length 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from kernels.dynamic_conv.taps import Taps
from kernels.dynamic_conv.triton_kernels import (
    products_kernel,
    table_gradient_kernel,
    transposed_sum_kernel,
    weighted_sum_kernel,
)
from kernels.launch import Config, interpreting, launch, precision

SPLITS = 64  # shares of the tokens in the gradient of a table; enough programs for a GPU with a few heads


def weighted_sum(attn: Tensor, value: Tensor, scale: float, taps: Taps) -> Tensor:
    """(B, H, *grid, P) and (B, H, *grid, D) to (B, H, *grid, D) contiguous, times ``scale``."""
    return _sum(weighted_sum_kernel, attn, value, scale, taps)


def transposed_sum(attn: Tensor, rows: Tensor, scale: float, taps: Taps) -> Tensor:
    """The same with the matrix of weights transposed: every token is given the rows of the windows that hold it."""
    return _sum(transposed_sum_kernel, attn, rows, scale, taps)


def _sum(kernel: object, attn: Tensor, value: Tensor, scale: float, taps: Taps) -> Tensor:
    attn, value = _dense_rows(attn), _dense_rows(value)
    out = value.new_empty(value.shape)
    launch(
        kernel,
        lambda c: _grid(value, taps, c),
        {
            "attn": attn,
            "value": value,
            "out": out,
            "scale": scale,
            **_sizes(value, taps),
            **_strides("attn", "attn", attn),
            **_strides("value", "value", value),
            **_strides("out", "out", out),
        },
        _configs(value, taps),
        key=_key(value, taps),
    )
    return out


def products(q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, taps: Taps) -> Tensor:
    """(B, H, *grid, D) twice to (B, H, *grid, P) contiguous."""
    q, k = _dense_rows(q), _dense_rows(k)
    rpb = None if rpb is None else rpb.contiguous()
    out = q.new_empty(*q.shape[:-1], taps.size)
    launch(
        products_kernel,
        lambda c: _grid(q, taps, c),
        {
            "q": q,
            "k": k,
            "rpb": rpb,
            "out": out,
            "scale": scale,
            "rpb_head": 0 if rpb is None else math.prod(taps.table),
            **_sizes(q, taps),
            **_strides("q", "q", q),
            **_strides("k", "key", k),
            **_strides("out", "out", out),
        },
        _configs(q, taps, rpb is not None),
        key=_key(q, taps),
    )
    return out


def table_gradient(d_logits: Tensor, taps: Taps) -> Tensor:
    """(B, H, *grid, P) to (H, *table) float32: shares of the tokens are summed apart, then their sums."""
    d_logits = _dense_rows(d_logits)
    batch, heads = d_logits.shape[:2]
    rows = batch * taps.tokens
    entries = math.prod(taps.table)
    config = Config({"BLOCK": 64, "BLOCK_E": 128}) if interpreting() else Config({"BLOCK": 16, "BLOCK_E": 128}, 8, 1)
    block = config.constants["BLOCK"]
    splits = max(min(SPLITS, triton.cdiv(rows, 4 * block)), 1)
    partial = d_logits.new_empty(splits, heads, entries, dtype=torch.float32)
    sizes = _sizes(d_logits, taps)
    launch(
        table_gradient_kernel,
        lambda c: (triton.cdiv(entries, c["BLOCK_E"]) * heads * splits,),
        {
            "grad": d_logits,
            "partial": partial,
            "rows": rows,
            "rows_per_split": triton.cdiv(triton.cdiv(rows, splits), block) * block,
            "table_size": entries,
            **{name: sizes[name] for name in sizes if name not in ("D", "BLOCK_D", "PRECISION")},
            **_strides("grad", "grad", d_logits),
        },
        [config],
    )
    return partial.sum(0).view(heads, *taps.table)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _three(numbers: tuple[int, ...], absent: int = 1) -> tuple[int, ...]:
    """Per-axis numbers with those of the absent leading axes."""
    return (absent,) * (3 - len(numbers)) + numbers


def _sizes(rows: Tensor, taps: Taps) -> dict[str, object]:
    return {
        "heads": rows.shape[1],
        **{f"length{i}": n for i, n in enumerate(_three(taps.grid))},
        **{f"kernel{i}": n for i, n in enumerate(_three(taps.kernel))},
        **{f"dilation{i}": n for i, n in enumerate(_three(taps.dilation))},
        "D": rows.shape[-1],
        "BLOCK_D": max(triton.next_power_of_2(rows.shape[-1]), 16),
        "DEEP": len(taps.grid) == 3,
        "ZERO": taps.zero,
        "PRECISION": precision(rows.dtype),
    }


def _strides(outer: str, inner: str, tensor: Tensor) -> dict[str, int]:
    along = _three(tensor.stride()[2:-1], absent=0)
    return {
        f"{outer}_batch": tensor.stride(0),
        f"{outer}_head": tensor.stride(1),
        **{f"{inner}{i}": stride for i, stride in enumerate(along)},
    }


def _grid(rows: Tensor, taps: Taps, constants: Mapping[str, int]) -> tuple[int]:
    """One program per tile of every dilation group of every head of every image, all on one axis."""
    programs = rows.shape[0] * rows.shape[1]
    for axis, (length, dilation) in enumerate(zip(_three(taps.grid), _three(taps.dilation), strict=True)):
        programs *= triton.cdiv(triton.cdiv(length, dilation), constants[f"T{axis}"]) * dilation
    return (programs,)


def _key(rows: Tensor, taps: Taps) -> tuple[object, ...]:
    return taps.kernel, taps.zero, taps.dilation != (1,) * len(taps.grid), rows.shape[-1], str(rows.dtype)


def _configs(rows: Tensor, taps: Taps, biased: bool = False) -> list[Config]:
    """Tiles by window and width, so that nothing spills.

    The box of a tile holds many tokens that a query does not see: its size against the window is the waste. Small
    windows take tiles of 32 tokens, large ones and 3-D ones 64. Exact float32 products need many registers.
    """
    axes = len(taps.grid)
    if interpreting():
        return [_config(_tile(axes, 32), 64, 4, 1)]
    width = max(triton.next_power_of_2(rows.shape[-1]), 16)
    if rows.dtype == torch.float32:
        return [_config(_tile(axes, 32 if width <= 64 else 16), 32 if width <= 64 else 16, 8 if width > 32 else 4, 1)]
    if width > 128 or (width > 64 and axes == 3):
        return [_config(_tile(axes, 32), 32, 8, 2)]
    if axes == 3:
        return [_config(_tile(axes, 64), 32, 4, 2)]
    block_n = 64 if width <= 64 else 32
    small = _config(_tile(axes, 32), block_n, 4, 2)
    if max(taps.kernel) <= 7:
        return [small]
    return [_config(_tile(axes, 64), 32 if biased else block_n, 4, 2), small]


def _tile(axes: int, tokens: int) -> tuple[int, int, int]:
    """A tile as near to a cube as powers of two allow, longer along the last axes."""
    if axes == 1:
        return 1, 1, tokens
    if axes == 2:
        return 1, {16: 4, 32: 4, 64: 8}[tokens], {16: 4, 32: 8, 64: 8}[tokens]
    return 2, {16: 2, 32: 4, 64: 4}[tokens], {16: 4, 32: 4, 64: 8}[tokens]


def _config(tile: tuple[int, int, int], block_n: int, warps: int, stages: int) -> Config:
    return Config({"T0": tile[0], "T1": tile[1], "T2": tile[2], "BLOCK_N": block_n}, warps, stages)
