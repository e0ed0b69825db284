"""Neighbourhood attention in Triton: launches of :mod:`kernels.neighborhood_attention.triton_kernels`.

Kernel size, stride, dilation and grid are run-time numbers: one compilation serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.autotune import size_bucket
from kernels.launch import Config, interpreting, launch, precision
from kernels.neighborhood_attention.triton_kernels import (
    attention_forward,
    frame_gradient,
    key_gradients,
    query_gradient,
    table_gradient,
)
from kernels.windows import Axis, Window

LARGE_WINDOW = 256  # keys per query from which larger tiles waste little
FRAMES = 1 << 24  # numbers of the partial sums of a bias gradient
SHARES = 64  # programs that share the tiles of a chunk of a bias gradient

# Tiles by the number of their tokens, for grids of one, two and three axes.
_TILES = {
    16: ((1, 1, 16), (1, 4, 4), (2, 2, 4)),
    32: ((1, 1, 32), (1, 4, 8), (2, 4, 4)),
    64: ((1, 1, 64), (1, 8, 8), (4, 4, 4)),
    128: ((1, 1, 128), (1, 8, 16), (4, 4, 8)),
}


def forward(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs (B, *grid, H, E) and log-sum-exp (B, *grid, H) float32."""
    q, k, v, rpb = _dense_heads(q, k, v, rpb)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    launch(
        attention_forward,
        lambda c: (_tiles(window, c) * q.shape[0] * q.shape[-2],),
        {**_operands(q, k, v, rpb, window, scale), "out": out, "lse": lse},
        _configs(q, v, window, backward=False, biased=rpb is not None),
        _key(q, v, window),
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, on request, of rpb; the incoming gradients are contiguous."""
    q, k, v, table = _dense_heads(q, k, v, rpb)
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    delta = torch.empty_like(lse)
    operands = _operands(q, k, v, table, window, scale) | {"grad_out": grad_out, "lse": lse, "delta": delta}
    configs = _configs(q, v, window, backward=True, biased=rpb is not None)
    launch(
        query_gradient,
        lambda c: (_tiles(window, c) * q.shape[0] * q.shape[-2],),
        {**operands, "grad_lse": grad_lse, "out": out, "d_q": d_q},
        configs,
        _key(q, v, window),
    )
    launch(
        key_gradients,
        lambda c: (_tiles(window, c) * q.shape[0] * k.shape[-2],),
        {**operands, "d_k": d_k, "d_v": d_v},
        configs,
        _key(q, v, window),
    )
    d_rpb = None
    if rpb is not None and bias_gradient:
        d_rpb = _bias_gradient(operands, rpb, window, configs[0])
    return d_q, d_k, d_v, d_rpb


def _bias_gradient(operands: Mapping[str, Any], rpb: Tensor, window: Window, config: Config) -> Tensor:
    """Sums over tiles in the frame of a tile, in float32 and a fixed order, then over the frame."""
    tile, axes = _tile(config.constants), _three(window)
    size = math.prod(t + 2 * axis.kernel - 2 for t, axis in zip(tile, axes, strict=True))
    block_n = config.constants["BLOCK_N"]
    chunks = triton.cdiv(size, block_n)
    heads = rpb.shape[0]
    items = _tiles(window, config.constants) * operands["q"].shape[0]
    splits = max(1, min(SHARES, items, FRAMES // (heads * math.prod(tile) * chunks * block_n)))
    frames = rpb.new_empty((splits, heads, math.prod(tile), chunks * block_n), dtype=torch.float32)
    counts = {"splits": splits, "chunks": chunks, "frames": frames}
    arguments = {**operands, **counts, "items": items}
    launch(frame_gradient, lambda c: (chunks * splits * heads,), arguments, [config])
    d_rpb = rpb.new_empty(rpb.shape, dtype=torch.float32)
    kernel_size = {f"K{i}": axis.kernel for i, axis in enumerate(axes)}
    launch(
        table_gradient,
        lambda c: (triton.cdiv(d_rpb[0].numel(), block_n) * heads,),
        {**counts, **kernel_size, "heads": heads, "d_rpb": d_rpb},
        [config],
    )
    return d_rpb.to(rpb.dtype)


def _dense_heads(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The kernels take any strides but that of the last axis."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v, None if rpb is None else rpb.contiguous()


def _three(window: Window) -> tuple[Axis, ...]:
    """The window on a grid of three axes, the first of length 1 where there are fewer."""
    return (Axis(1, 1),) * (3 - len(window.axes)) + window.axes


def _tile(constants: Mapping[str, int]) -> tuple[int, int, int]:
    return constants["T0"], constants["T1"], constants["T2"]


def _tiles(window: Window, constants: Mapping[str, int]) -> int:
    """Tiles of an image: those of the longest dilation group of an axis, times its groups."""
    return math.prod(
        triton.cdiv(triton.cdiv(axis.length, axis.dilation), t) * axis.dilation
        for axis, t in zip(_three(window), _tile(constants), strict=True)
    )


def _operands(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, window: Window, scale: float) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for i, axis in enumerate(_three(window)):
        numbers |= {
            f"L{i}": axis.length,
            f"K{i}": axis.kernel,
            f"S{i}": axis.stride,
            f"D{i}": axis.dilation,
            f"C{i}": int(axis.causal),
        }
    absent = 3 - len(window.axes)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        batch, *grid, head, _ = tensor.stride()
        strides = (batch, *[0] * absent, *grid, head)
        numbers |= {f"{name}_{part}": stride for part, stride in zip("b012h", strides, strict=True)}
    return {
        **numbers,
        "q": q,
        "k": k,
        "v": v,
        "rpb": rpb,
        "scale": scale,
        "heads": q.shape[-2],
        "group": q.shape[-2] // k.shape[-2],
        "D": q.shape[-1],
        "E": v.shape[-1],
        "BLOCK_D": max(triton.next_power_of_2(q.shape[-1]), 16),
        "BLOCK_E": max(triton.next_power_of_2(v.shape[-1]), 16),
        "AXES": len(window.axes),
        "PRECISION": precision(q.dtype),
    }


def _key(q: Tensor, v: Tensor, window: Window) -> tuple[Hashable, ...]:
    """What the best configuration depends on."""
    size = size_bucket(q.shape[0] * q.shape[-2] * math.prod(window.grid))
    return q.dtype, q.shape[-1], v.shape[-1], *window.kernel, *(axis.dilation > 1 for axis in window.axes), size


def _configs(q: Tensor, v: Tensor, window: Window, backward: bool, biased: bool) -> list[Config]:
    """Small tiles for small windows (a tile visits the keys of all its queries), no spills; see the compile gate."""
    axes = len(window.axes)
    if interpreting():
        return [_config(32, axes, 64)]
    width = triton.next_power_of_2(max(q.shape[-1], v.shape[-1], 16))
    if q.dtype == torch.float32:
        if width > 64:
            # Exact products of such wide heads hold whole rows in registers, whatever the tile.
            return [_config(16, axes, 16, 8, 1, spills=384)]
        return [_config(64 if width <= 32 and not biased else 32, axes, 32, 8, 1)]
    if width > 128 or (biased and width > 64):
        return [_config(32, axes, 32, 4, 1)]
    if window.neighbours >= LARGE_WINDOW and not backward and not biased:
        return [_config(128, axes, 64, 8, 2)]
    if width > 64 or biased or (backward and width > 32):
        return [_config(64, axes, 32 if backward or biased else 64, 8, 2)]
    if backward or width > 32:
        return [_config(64, axes, 64, 4, 2)]
    return [_config(64, axes, 64, 4, 2), _config(32, axes, 64, 4, 2)]


def _config(tokens: int, axes: int, block_n: int, warps: int = 4, stages: int = 2, spills: int = 0) -> Config:
    t0, t1, t2 = _TILES[tokens][axes - 1]
    return Config({"T0": t0, "T1": t1, "T2": t2, "BLOCK_N": block_n}, warps, stages, spills)
