"""Group attention in Triton: launches of :mod:`kernels.group_attention.triton_kernels`."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
from torch import Tensor

from kernels.group_attention.groups import Groups
from kernels.group_attention.triton_kernels import (
    attention_forward,
    global_gradients,
    key_gradients,
    query_gradient,
)
from kernels.launch import Config, interpreting, launch, precision

# Queries whose share of the global tokens' gradients one program sums.
PART = 512


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    groups: Groups,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, N, H, E), and the log-sum-exp of both softmaxes (B, H, N) in sorted order."""
    q, k, v, k_global, v_global = _dense_heads(q, k, v, k_global, v_global)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    lse_global = lse.new_empty(0 if k_global is None else lse.shape)
    configs = _configs(q, v, groups.size, "forward")
    tiles = triton.cdiv(groups.size, configs[0].constants["BLOCK"])
    launch(
        attention_forward,
        lambda c: (tiles * groups.count * q.shape[0] * q.shape[2],),
        {
            **_operands(q, k, v, order, groups, scale),
            **_globals(k_global, v_global),
            "keys": groups.keys,
            "tiles": tiles,
            "out": out,
            "lse": lse,
            "lse_global": lse_global if k_global is not None else None,
        },
        configs,
    )
    return out, lse, lse_global


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    k_global: Tensor | None,
    v_global: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_global: Tensor,
    groups: Groups,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, k_global and v_global; the incoming gradient is contiguous."""
    q, k, v, k_global, v_global = _dense_heads(q, k, v, k_global, v_global)
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    delta, delta_global = torch.empty_like(lse), torch.empty_like(lse_global)
    operands = _operands(q, k, v, order, groups, scale)
    present = k_global is not None
    configs = _configs(q, v, groups.size, "queries")
    block = configs[0].constants["BLOCK"]
    tiles = triton.cdiv(groups.size, block)
    launch(
        query_gradient,
        lambda c: (tiles * groups.count * q.shape[0] * q.shape[2],),
        {
            **operands,
            **_globals(k_global, v_global),
            "keys": groups.keys,
            "tiles": tiles,
            "grad_out": grad_out,
            "out": out,
            "lse": lse,
            "lse_global": lse_global if present else None,
            "delta": delta,
            "delta_global": delta_global if present else None,
            "d_q": d_q,
        },
        configs,
    )
    configs = _configs(q, v, groups.size, "keys")
    block = configs[0].constants["BLOCK"]
    blocks = triton.cdiv(groups.tokens, block)
    launch(
        key_gradients,
        lambda c: (blocks * q.shape[0] * q.shape[2],),
        {
            **operands,
            "keys": groups.keys,
            "tiles": blocks,
            "grad_out": grad_out,
            "lse": lse,
            "delta": delta,
            "d_k": d_k,
            "d_v": d_v,
        },
        configs,
    )
    if k_global is None or v_global is None:
        return d_q, d_k, d_v, None, None
    members, parts = k_global.shape[1], triton.cdiv(groups.tokens, PART)
    d_known, d_worth = (
        t.new_empty((q.shape[0], parts, members, *t.shape[2:]), dtype=torch.float32) for t in (k_global, v_global)
    )
    of_members = triton.cdiv(members, block)
    launch(
        global_gradients,
        lambda c: (of_members * parts * q.shape[0] * q.shape[2],),
        {
            **_without_keys(operands),
            **_globals(k_global, v_global),
            "tiles": of_members,
            "parts": parts,
            "part": PART,
            "grad_out": grad_out,
            "lse_global": lse_global,
            "delta_global": delta_global,
            "d_known": d_known,
            "d_worth": d_worth,
        },
        configs,
    )
    return d_q, d_k, d_v, d_known.sum(1).sum_to_size(k_global.shape), d_worth.sum(1).sum_to_size(v_global.shape)


def _dense_heads(*tensors: Tensor | None) -> list[Any]:
    """The kernels take any strides but that of the last axis."""
    return [t if t is None or t.stride(3) == 1 else t.contiguous() for t in tensors]


def _operands(q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Groups, scale: float) -> dict[str, object]:
    return {
        "q": q,
        "k": k,
        "v": v,
        "order": order.contiguous(),
        "scale": scale,
        "heads": q.shape[2],
        "tokens": groups.tokens,
        "size": groups.size,
        **{
            f"{n}_{axis}": t.stride(i)
            for n, t in (("q", q), ("k", k), ("v", v))
            for i, axis in enumerate(("batch", "row", "head"))
        },
        "D": q.shape[3],
        "E": v.shape[3],
        "BLOCK_D": max(triton.next_power_of_2(q.shape[3]), 16),
        "BLOCK_E": max(triton.next_power_of_2(v.shape[3]), 16),
        "PRECISION": precision(q.dtype),
    }


def _without_keys(operands: dict[str, object]) -> dict[str, object]:
    """What a kernel takes that reads neither the tokens' keys and values nor their groups."""
    return {name: value for name, value in operands.items() if name != "size" and name.split("_")[0] not in ("k", "v")}


def _globals(k_global: Tensor | None, v_global: Tensor | None) -> dict[str, object]:
    """Strides of 0 along the batch where all items share them."""
    strides = {}
    for name, t in (("kg", k_global), ("vg", v_global)):
        for i, axis in enumerate(("batch", "row", "head")):
            strides[f"{name}_{axis}"] = 0 if t is None or (i == 0 and len(t) == 1) else t.stride(i)
    members = 0 if k_global is None else k_global.shape[1]
    return {"k_global": k_global, "v_global": v_global, "members": members, **strides}


def _configs(q: Tensor, v: Tensor, size: int, kernel: Literal["forward", "queries", "keys"]) -> list[Config]:
    """Tiles by the size of a group and the width of a head, chosen so that nothing spills.

    Exact float32 products need many registers.
    """
    if interpreting():
        return [Config({"BLOCK": 16, "BLOCK_N": 32})]
    width = triton.next_power_of_2(max(q.shape[3], v.shape[3], 16))
    if q.dtype == torch.float32:
        if width == 16:
            return [Config({"BLOCK": 32, "BLOCK_N": 32}, 8, 1)]
        # Of heads of 256 the query gradient keeps up to ten numbers of a thread on the stack.
        return [Config({"BLOCK": 16, "BLOCK_N": 16}, 8, 1 if kernel == "keys" else 2, spills=48)]
    if width <= 32:
        return [Config({"BLOCK": 64 if size > 32 else 32, "BLOCK_N": 64}, 4, 2)]
    if width <= 128:
        return [Config({"BLOCK": 64, "BLOCK_N": 32}, 8, 2)]
    return [Config({"BLOCK": 32, "BLOCK_N": 32 if kernel == "forward" else 16}, 8, 1)]
