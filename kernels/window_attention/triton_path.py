"""Window attention in Triton: launches of :mod:`kernels.window_attention.triton_kernels`.

A window of at most 64 tokens is one tile: one kernel forward and one backward, whose programs go through many windows
of one head, read its bias once and sum its gradient in registers. A larger window is cut into blocks. Every sum over
programs is a second pass over partial results, so that results do not depend on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.launch import Config, interpreting, launch, precision
from kernels.window_attention.geometry import Geometry
from kernels.window_attention.triton_kernels import (
    bias_gradient,
    block_forward,
    key_gradients,
    query_gradient,
    tile_backward,
    tile_forward,
)

LARGEST_TILE = 64
# Programs among which windows are divided: a few for each multiprocessor of a large GPU.
NARROW = 2**31 - 2**16  # places up to here are 32-bit numbers
PROGRAMS = 2048
PROGRAMS_WITH_PARTIALS = 1024


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, W, heads, E) and log-sum-exp (B, H, W, heads) float32."""
    q, k, v = _dense_heads(q, k, v)
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    operands = {**_operands(q, k, v, bias, geometry, scale), "out": out, "lse": lse}
    windows, heads = _windows(q, geometry), q.shape[3]
    if _one_tile(q, v, geometry):
        parts, each = _share(windows, heads, PROGRAMS)
        launch(
            tile_forward,
            lambda c: (parts * heads,),
            {**operands, "total_windows": windows, "per_program": each},
            _tile_configs(q, v, geometry, backward=False),
        )
    else:
        launch(
            block_forward,
            lambda c: (windows * heads * triton.cdiv(geometry.tokens, c["BLOCK"]),),
            operands,
            _block_configs(q, v, backward=False),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    scale: float,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, on request, of the bias; the incoming gradients are contiguous."""
    q, k, v = _dense_heads(q, k, v)
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    operands = {**_operands(q, k, v, bias, geometry, scale), "grad_out": grad_out, "lse": lse}
    windows, heads, tokens = _windows(q, geometry), q.shape[3], geometry.tokens
    partials = None
    if _one_tile(q, v, geometry):
        parts, each = _share(windows, heads, PROGRAMS_WITH_PARTIALS)
        partials = lse.new_empty(parts, heads, tokens, tokens) if bias_wanted else None
        launch(
            tile_backward,
            lambda c: (parts * heads,),
            {
                **operands,
                "grad_lse": grad_lse,
                "d_q": d_q,
                "d_k": d_k,
                "d_v": d_v,
                "d_bias": partials,
                "total_windows": windows,
                "per_program": each,
            },
            _tile_configs(q, v, geometry, backward=True),
        )
    else:
        delta = torch.empty_like(lse)
        configs = _block_configs(q, v, backward=True)

        def grid(constants: object) -> tuple[int, ...]:
            return (windows * heads * triton.cdiv(tokens, configs[0].constants["BLOCK"]),)

        launch(
            query_gradient,
            grid,
            {**operands, "grad_lse": grad_lse, "out": out, "delta": delta, "d_q": d_q},
            configs,
        )
        launch(key_gradients, grid, {**operands, "delta": delta, "d_k": d_k, "d_v": d_v}, configs)
        if bias_wanted:
            block, block_n = configs[0].constants["BLOCK"], configs[0].constants["BLOCK_N"]
            blocks = triton.cdiv(tokens, block) * triton.cdiv(tokens, block_n)
            parts, each = _share(windows, heads * blocks, PROGRAMS_WITH_PARTIALS)
            partials = lse.new_empty(parts, heads, tokens, tokens)
            launch(
                bias_gradient,
                lambda c: (parts * heads * blocks,),
                {**operands, "delta": delta, "d_bias": partials, "total_windows": windows, "per_program": each},
                configs,
            )
    d_bias = None if partials is None or bias is None else partials.sum(0).to(bias.dtype)
    return d_q, d_k, d_v, d_bias


def _dense_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels take any strides but that of the last axis."""
    return tuple(t if t.stride(4) == 1 else t.contiguous() for t in tensors)


def _windows(q: Tensor, geometry: Geometry) -> int:
    """Of all maps together; none where there is nothing to compute."""
    return q.shape[0] * geometry.rows.windows * geometry.columns.windows


def _share(windows: int, others: int, programs: int) -> tuple[int, int]:
    """Into how many parts the windows are divided, and how many a part has."""
    each = max(triton.cdiv(windows * others, programs), 1)
    return triton.cdiv(windows, each), each


def _operands(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, geometry: Geometry, scale: float
) -> dict[str, object]:
    rows, columns = geometry.rows, geometry.columns
    padded = (rows.padded, columns.padded) != (rows.length, columns.length)
    shifted = rows.shift > 0 or columns.shift > 0
    return {
        "q": q,
        "k": k,
        "v": v,
        "bias": None if bias is None else bias.float().contiguous(),
        "scale": scale,
        "height": rows.length,
        "width": columns.length,
        "rows": rows.window,
        "columns": columns.window,
        "rows_of_windows": rows.windows,
        "columns_of_windows": columns.windows,
        "shift_y": rows.shift,
        "shift_x": columns.shift,
        **{
            f"{n}_{axis}": t.stride(i)
            for n, t in (("q", q), ("k", k), ("v", v))
            for i, axis in enumerate(("batch", "row", "column", "head"))
        },
        "HEADS": q.shape[3],
        "D": q.shape[4],
        "E": v.shape[4],
        "BLOCK_D": max(triton.next_power_of_2(q.shape[4]), 16),
        "BLOCK_E": max(triton.next_power_of_2(v.shape[4]), 16),
        "GRID": rows.grid,
        "PADDED": (1 if geometry.hide else 2) if padded else 0,
        "SHIFTED": (2 if geometry.released else 1) if shifted else 0,
        "WIDE": any(_reach(t) > NARROW for t in (q, k, v)),
        "PRECISION": precision(q.dtype),
    }


def _reach(x: Tensor) -> int:
    """The farthest element of one map, of the operand or of a contiguous output of its shape."""
    rows, columns = x.shape[1:3]
    return max(rows * x.stride(1) + columns * x.stride(2), rows * columns * x.shape[3] * x.shape[4])


def _wider(q: Tensor, v: Tensor) -> int:
    return triton.next_power_of_2(max(q.shape[4], v.shape[4], 16))


def _one_tile(q: Tensor, v: Tensor, geometry: Geometry) -> bool:
    """Whether a window is one tile; wide heads would leave no registers for it."""
    return geometry.tokens <= LARGEST_TILE and _wider(q, v) <= (32 if q.dtype == torch.float32 else 64)


def _tile_configs(q: Tensor, v: Tensor, geometry: Geometry, backward: bool) -> list[Config]:
    block = max(triton.next_power_of_2(geometry.tokens), 16)
    if interpreting():
        return [Config({"BLOCK": block})]
    if q.dtype == torch.float32:
        return [Config({"BLOCK": max(block, 32)}, 8 if block == 64 else 4, 1)]
    if block < 64:
        return [Config({"BLOCK": block}, 1 if block == 16 else 2, 2)]
    if not backward:
        return [Config({"BLOCK": block}, 4, 2)]
    # Twice 64 x 64 numbers live through the loop, the bias and its gradient: two registers too many for heads of 32.
    # More warps would not help: they share 64 rows badly.
    return [Config({"BLOCK": block}, 4, 2, spills=8) if _wider(q, v) <= 32 else Config({"BLOCK": block}, 4, 1)]


def _block_configs(q: Tensor, v: Tensor, backward: bool) -> list[Config]:
    """Tiles by the width of a head, chosen so that nothing spills; exact float32 products need many registers."""
    if interpreting():
        return [Config({"BLOCK": 64, "BLOCK_N": 32})]
    width = _wider(q, v)
    if q.dtype == torch.float32:
        block, block_n = (64, 32) if width <= 32 else (16, 16)
        return [Config({"BLOCK": block, "BLOCK_N": block_n}, 8, 1)]
    if width <= 32 or (width == 64 and not backward):
        return [Config({"BLOCK": 64, "BLOCK_N": 64}, 4, 2)]
    if width <= 128:
        return [Config({"BLOCK": 64, "BLOCK_N": 32}, 8 if backward else 4, 2)]
    return [Config({"BLOCK": 32, "BLOCK_N": 32}, 4, 1 if backward else 2)]
