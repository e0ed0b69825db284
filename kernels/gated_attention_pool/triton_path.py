"""Attention pooling in Triton: launches of :mod:`kernels.gated_attention_pool.triton_kernels`.

Forward: scores of all rows in one kernel; partial softmax and sums of chunks that never cross a bag; their combination
per bag. Backward: gradient of the scores, then of what comes before the activations, recomputed and written once, from
which plain matrix products give the gradients of features and weights. The table of chunks is built on the device; its
length is bounded from shapes alone, without waiting for it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.gated_attention_pool.triton_kernels import (
    gate_gradient,
    pool_combine,
    pool_forward,
    score_forward,
    softmax_gradient,
)
from kernels.launch import Config, interpreting, launch, precision

# Rows below which smaller blocks keep more of a GPU busy.
_FEW_ROWS = 1 << 14


def forward(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled values (B, K, E), log-sum-exp (B, K), scores (N, K), stats (2, B, K)."""
    raw = scores(x, gate, gate_bias, score, score_bias)
    values, drop_mask = _dense(x if values is None else values), _bytes(drop_mask)
    bags, branches, width = cu_seqlens.numel() - 1, len(score), values.shape[1]
    chunk = _chunk(len(x))
    chunks = _most_chunks(len(x), cu_seqlens, chunk)
    chunk_ends = _chunk_ends(cu_seqlens, chunk)
    sums = raw.new_empty(chunks, branches, width)
    highest, total = (raw.new_empty(chunks, branches) for _ in range(2))
    launch(
        pool_forward,
        lambda c: (chunks, triton.cdiv(width, c["BLOCK_E"])),
        {
            **_pool_operands(values, raw, drop_mask, cu_seqlens, chunk_ends, chunk),
            "partial_sums": sums,
            "partial_highest": highest,
            "partial_total": total,
        },
        _pool_configs(values, branches),
    )
    pooled = values.new_empty(bags, branches, width)
    lse, stats = raw.new_empty(bags, branches), raw.new_empty(2, bags, branches)
    launch(
        pool_combine,
        lambda c: (bags * branches, triton.cdiv(width, c["BLOCK_E"])),
        {
            "partial_sums": sums,
            "partial_highest": highest,
            "partial_total": total,
            "chunk_ends": chunk_ends,
            "pooled": pooled,
            "lse": lse,
            "stats": stats,
            "bags": bags,
            "branches": branches,
            "width": width,
        },
        [Config({"BLOCK_C": 4, "BLOCK_E": 32}) if interpreting() else Config({"BLOCK_C": 32, "BLOCK_E": 128})],
    )
    return pooled, lse, raw, stats


def scores(x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor, score_bias: Tensor) -> Tensor:
    """The scores (N, K), float32."""
    out = x.new_empty(len(x), len(score), dtype=torch.float32)
    launch(
        score_forward,
        lambda c: (triton.cdiv(len(x), c["BLOCK_M"]),),
        {**_gate_operands(x, gate, gate_bias, score), "score_bias": score_bias.contiguous(), "scores": out},
        _gate_configs(x, gate, score),
    )
    return out


def backward(
    d_pooled: Tensor | None,
    d_lse: Tensor | None,
    d_scores: Tensor | None,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    for_x: bool,
    for_values: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate, gate_bias, score, score_bias and values; the incoming gradients are contiguous."""
    of_pooling = None  # what the weighted sum sends back
    if for_values and values is not None:
        of_pooling = x.new_empty(values.shape)
    elif for_x and values is None:
        of_pooling = x.new_empty(x.shape)
    d_visible = _softmax_backward(
        d_pooled, d_lse, d_scores, x if values is None else values, cu_seqlens, drop_mask, pooled, scores, stats,
        of_pooling,
    )  # fmt: skip
    branches, width = score.shape
    configs = _gate_configs(x, gate, score)
    blocks = triton.cdiv(len(x), configs[0].constants["BLOCK_M"])
    d_gates = x.new_empty(len(x), len(gate))
    partial = scores.new_empty(blocks, branches + len(gate) // width, width)
    launch(
        gate_gradient,
        lambda c: (blocks, triton.cdiv(width, c["BLOCK_H"])),
        {
            **_gate_operands(x, gate, gate_bias, score),
            "d_scores": d_visible,
            "d_gates": d_gates,
            "partial": partial,
        },
        configs,
    )
    sums = partial.sum(0)
    d_gate = d_gates.t() @ x
    d_x = None
    if for_x:
        d_x = of_pooling.addmm_(d_gates, gate) if values is None and of_pooling is not None else d_gates @ gate
    return (
        d_x,
        d_gate,
        sums[branches:].flatten().to(gate_bias.dtype),
        sums[:branches].to(score.dtype, copy=True),
        d_visible.sum(0).to(score_bias.dtype),
        None if values is None else of_pooling,
    )


def _softmax_backward(
    d_pooled: Tensor | None,
    d_lse: Tensor | None,
    d_scores: Tensor | None,
    values: Tensor,
    cu_seqlens: Tensor,
    drop_mask: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    of_pooling: Tensor | None,
) -> Tensor:
    """Gradient (N, K) of the scores before masking; fills ``of_pooling``."""
    values, drop_mask = _dense(values), _bytes(drop_mask)
    d_pooled = torch.zeros_like(pooled) if d_pooled is None else d_pooled
    # What a softmax takes off what arrives; the gradient of the log-sum-exp enters here and nowhere else.
    mean = (d_pooled.float() * pooled).sum(-1)
    if d_lse is not None:
        mean = mean - d_lse
    d_visible = torch.empty_like(scores)
    configs = _pool_configs(values, scores.shape[1])
    chunk = configs[0].constants["BLOCK_N"]
    launch(
        softmax_gradient,
        lambda c: (_most_chunks(len(values), cu_seqlens, chunk),),
        {
            **_pool_operands(values, scores, drop_mask, cu_seqlens, _chunk_ends(cu_seqlens, chunk), chunk),
            "stats": stats,
            "mean": mean,
            "d_pooled": d_pooled,
            "d_scores": d_scores,
            "d_values": of_pooling,
            "d_visible": d_visible,
        },
        configs,
    )
    return d_visible


def _dense(x: Tensor) -> Tensor:
    """The kernels take any stride of the rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def _bytes(drop_mask: Tensor | None) -> Tensor | None:
    return None if drop_mask is None else _dense(drop_mask).view(torch.uint8)


def _gate_operands(x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor) -> dict[str, object]:
    x, gate, score = _dense(x), _dense(gate), _dense(score)
    return {
        "x": x,
        "gate": gate,
        "gate_bias": gate_bias.contiguous(),
        "score": score,
        "total": len(x),
        "width": score.shape[1],
        "depth": x.shape[1],
        "branches": len(score),
        "x_row": x.stride(0),
        "gate_row": gate.stride(0),
        "score_row": score.stride(0),
        "GATED": len(gate) > score.shape[1],
        "PRECISION": precision(x.dtype),
        "BLOCK_K": _padded(len(score)),
    }


def _pool_operands(
    values: Tensor, scores: Tensor, drop_mask: Tensor | None, cu_seqlens: Tensor, chunk_ends: Tensor, chunk: int
) -> dict[str, object]:
    return {
        "values": values,
        "scores": scores,
        "drop_mask": drop_mask,
        "cu_seqlens": cu_seqlens,
        "chunk_ends": chunk_ends,
        "bags": cu_seqlens.numel() - 1,
        "chunk": chunk,
        "branches": scores.shape[1],
        "width": values.shape[1],
        "values_row": values.stride(0),
        "mask_row": 0 if drop_mask is None else drop_mask.stride(0),
        "PRECISION": precision(values.dtype),
        "BLOCK_K": _padded(scores.shape[1]),
    }


def _padded(branches: int) -> int:
    return max(triton.next_power_of_2(branches), 16)


def _chunk(rows: int) -> int:
    """Rows that one program pools: enough programs for a large GPU, few enough that partial results stay small."""
    return 32 if interpreting() else min(max(triton.next_power_of_2(rows) // 256, 64), 1024)


def _most_chunks(rows: int, cu_seqlens: Tensor, chunk: int) -> int:
    """At most this many chunks: every bag may end in one that is not full."""
    return min(rows // chunk + cu_seqlens.numel() - 1, rows)


def _chunk_ends(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """(B,) int32: one past the number of each bag's last chunk."""
    return torch.div(cu_seqlens.diff() + chunk - 1, chunk, rounding_mode="floor").cumsum(0).to(torch.int32)


def _gate_configs(x: Tensor, gate: Tensor, score: Tensor) -> list[Config]:
    """Tiles of the score's product; exact float32 products need many registers, and so do rows that are not aligned."""
    if interpreting():
        return [Config({"BLOCK_M": 32, "BLOCK_H": 16, "BLOCK_D": 32})]
    if x.dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_H": 32, "BLOCK_D": 32}, 8, 1)]
    if not _aligned(x, gate, score):
        return [Config({"BLOCK_M": 64, "BLOCK_H": 32, "BLOCK_D": 32}, 4, 1)]
    if len(x) < _FEW_ROWS or len(score) > 16:
        return [Config({"BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_D": 64}, 4, 3)]
    return [Config({"BLOCK_M": 128, "BLOCK_H": 64, "BLOCK_D": 64}, 8, 3)]


def _pool_configs(values: Tensor, branches: int) -> list[Config]:
    """Tiles of the products with the values."""
    if interpreting():
        return [Config({"BLOCK_N": 16, "BLOCK_E": 32})]
    if values.dtype == torch.float32:
        few = branches <= 16
        return [Config({"BLOCK_N": 32 if few else 16, "BLOCK_E": 64 if few else 32}, 8, 1)]
    if not _aligned(values) or branches > 16:
        return [Config({"BLOCK_N": 32, "BLOCK_E": 64}, 4, 1)]
    return [Config({"BLOCK_N": 64, "BLOCK_E": 64}, 4, 3)]


def _aligned(*matrices: Tensor) -> bool:
    """Whether whole tiles can be copied without touching registers."""
    return all(m.stride(0) % 16 == 0 and m.shape[1] % 16 == 0 for m in matrices)
