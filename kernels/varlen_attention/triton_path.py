"""Packed attention in Triton: launches of :mod:`kernels.varlen_attention.triton_kernels`.

Work is cut into blocks of rows that never cross a segment, numbered over all segments, so that one long segment does
not serialise. Their table is built on the device; its length is bounded from shapes alone, without waiting for it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.launch import Config, interpreting, launch, precision
from kernels.varlen_attention.triton_kernels import (
    attention_forward,
    key_gradients,
    query_gradient,
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (Tq, H, E) and log-sum-exp (Tq, H) float32."""
    q, k, v = _dense_heads(q, k, v)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    configs = _configs(q, v, "forward")
    block = configs[0].constants["BLOCK"]
    launch(
        attention_forward,
        lambda c: (_blocks(q, cu_q, block), q.shape[1]),
        {
            **_operands(q, k, v, cu_q, cu_k, key_bias, causal, scale),
            "block_ends": _block_ends(cu_q, block),
            "out": out,
            "lse": lse,
        },
        configs,
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and key_bias; the incoming gradients are contiguous."""
    q, k, v = _dense_heads(q, k, v)
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    delta = torch.empty_like(lse)
    operands = _operands(q, k, v, cu_q, cu_k, key_bias, causal, scale)
    configs = _configs(q, v, "queries")
    block = configs[0].constants["BLOCK"]
    launch(
        query_gradient,
        lambda c: (_blocks(q, cu_q, block), q.shape[1]),
        {
            **operands,
            "block_ends": _block_ends(cu_q, block),
            "grad_out": grad_out,
            "grad_lse": grad_lse,
            "out": out,
            "lse": lse,
            "delta": delta,
            "d_q": d_q,
        },
        configs,
    )
    # One row per query head; heads that share a bias are summed below.
    d_bias = None if key_bias is None else lse.new_empty(q.shape[1], k.shape[0])
    configs = _configs(q, v, "keys", more=q.shape[1] > k.shape[1] or key_bias is not None)
    keys_block = configs[0].constants["BLOCK"]
    launch(
        key_gradients,
        lambda c: (_blocks(k, cu_k, keys_block), k.shape[1]),
        {
            **operands,
            "block_ends": _block_ends(cu_k, keys_block),
            "grad_out": grad_out,
            "lse": lse,
            "delta": delta,
            "d_k": d_k,
            "d_v": d_v,
            "d_bias": d_bias,
        },
        configs,
    )
    if d_bias is not None and key_bias is not None:
        d_bias = d_bias.sum_to_size(key_bias.shape).to(key_bias.dtype)
    return d_q, d_k, d_v, d_bias


def _dense_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels take any strides but that of the last axis."""
    return tuple(t if t.stride(2) == 1 else t.contiguous() for t in tensors)


def _operands(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, causal: bool, scale: float
) -> dict[str, object]:
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_q": cu_q,
        "cu_k": cu_k,
        "key_bias": key_bias,
        "scale": scale,
        "segments": cu_q.numel() - 1,
        "key_total": k.shape[0],
        **{f"{n}_row": t.stride(0) for n, t in (("q", q), ("k", k), ("v", v))},
        **{f"{n}_head": t.stride(1) for n, t in (("q", q), ("k", k), ("v", v))},
        "bias_head": 0 if key_bias is None or len(key_bias) == 1 else key_bias.stride(0),
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "E": v.shape[2],
        "BLOCK_D": max(triton.next_power_of_2(q.shape[2]), 16),
        "BLOCK_E": max(triton.next_power_of_2(v.shape[2]), 16),
        "CAUSAL": causal,
        "PRECISION": precision(q.dtype),
    }


def _blocks(rows: Tensor, cu_seqlens: Tensor, block: int) -> int:
    """At most this many blocks: every segment may end in one that is not full."""
    return min(rows.shape[0] // block + cu_seqlens.numel() - 1, rows.shape[0])


def _block_ends(cu_seqlens: Tensor, block: int) -> Tensor:
    """(S,) int32: one past the number of each segment's last block."""
    return torch.div(cu_seqlens.diff() + block - 1, block, rounding_mode="floor").cumsum(0).to(torch.int32)


def _configs(q: Tensor, v: Tensor, kernel: str, more: bool = False) -> list[Config]:
    """Tiles by the width of a head, chosen so that nothing spills; exact float32 products need many registers.

    Args:
        kernel: ``forward``, ``queries`` or ``keys``.
        more: whether the keys' kernel also loops over grouped heads or sums a bias.
    """
    if interpreting():
        return [Config({"BLOCK": 16, "BLOCK_N": 16})]
    width = triton.next_power_of_2(max(q.shape[2], v.shape[2], 16))
    if q.dtype == torch.float32:
        block, block_n = {16: (64, 64), 32: (64, 64), 64: (32, 32)}.get(width, (16, 16))
        # The widest heads in float32 are rare; their rows do not fit the registers at any tile size.
        return [Config({"BLOCK": block, "BLOCK_N": block_n}, 8, 1, spills=288 if width > 128 else 0)]
    if width <= 64:
        if kernel == "keys" and (more or width == 64):
            return [Config({"BLOCK": 32, "BLOCK_N": 32}, 4, 2)]
        return [Config({"BLOCK": 64, "BLOCK_N": 64 if width <= 32 or kernel == "forward" else 32}, 4, 2)]
    if width <= 128:
        return [Config({"BLOCK": 64, "BLOCK_N": 64 if kernel == "forward" else 32}, 4 if kernel == "forward" else 8, 2)]
    return [Config({"BLOCK": 32, "BLOCK_N": 32}, 4, 2 if kernel == "forward" else 1)]
