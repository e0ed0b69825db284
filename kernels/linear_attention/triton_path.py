"""Linear attention in Triton: launches of :mod:`kernels.linear_attention.triton_kernels`.

Four passes over tokens in all (keys, queries; queries, keys), each reading its tensors once. What happens to the small
state between them (normalisation, the softmax of ``channel``) is :mod:`kernels.linear_attention.forms`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.launch import Config, interpreting, launch, precision
from kernels.linear_attention.forms import Form, prepare, prepare_backward
from kernels.linear_attention.triton_kernels import (
    apply_to_queries,
    combine,
    key_gradients,
    query_gradients,
    reduce_keys,
)

# Programs to aim for: a few for each multiprocessor of a large GPU, so that the last round is nearly full.
_PROGRAMS = 1024
_SMALLEST_CHUNK, _LARGEST_CHUNK = 128, 1024


class Chunks(NamedTuple):
    """How tokens are cut: ``programs`` in all, ``per_sequence`` for each dense one, ``ends`` for packed ones."""

    size: int
    programs: int
    per_sequence: int
    ends: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, E) and state (S, H, D + 1, E + 1) float32."""
    q, k, v = (_dense_heads(t) for t in (q, k, v))
    chunks = _chunks(k, cu_k)
    partials = _states(chunks.programs, q, v)
    launch(
        reduce_keys,
        lambda c: (chunks.programs, q.shape[2]),
        {**_key_operands(k, v, key_weight, key_cos, key_sin, cu_k, chunks, form), "partials": partials},
        _configs(q, v),
    )
    state = _combine(partials, chunks, q, v, cu_q)
    chunks = _chunks(q, cu_q)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    kind = form.kind(cos is not None)
    launch(
        apply_to_queries,
        lambda c: (chunks.programs, q.shape[2]),
        {
            **_query_operands(q, v, query_weight, cos, sin, cu_q, chunks, form, kind),
            "prepared": prepare(state, form, kind),
            "out": out,
        },
        _configs(q, v),
    )
    return out, state


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    state: Tensor,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, key_weight and query_weight; the incoming gradient is contiguous."""
    q, k, v = (_dense_heads(t) for t in (q, k, v))
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    d_key_weight, d_query_weight = (None if w is None else w.new_empty(w.shape) for w in (key_weight, query_weight))
    kind = form.kind(cos is not None)
    prepared = prepare(state, form, kind)
    chunks = _chunks(q, cu_q)
    partials = _states(chunks.programs, q, v)
    launch(
        query_gradients,
        lambda c: (chunks.programs, q.shape[2]),
        {
            **_query_operands(q, v, query_weight, cos, sin, cu_q, chunks, form, kind),
            "prepared": prepared,
            "grad_out": grad_out,
            "d_q": d_q,
            "d_weight": d_query_weight,
            "partials": partials,
        },
        _configs(q, v, sums_matrices=True),
    )
    d_prepared = _combine(partials, chunks, q, v, cu_q)
    chunks = _chunks(k, cu_k)
    launch(
        key_gradients,
        lambda c: (chunks.programs, q.shape[2]),
        {
            **_key_operands(k, v, key_weight, key_cos, key_sin, cu_k, chunks, form),
            "d_state": prepare_backward(d_prepared, state, prepared, form, kind),
            "d_k": d_k,
            "d_v": d_v,
            "d_weight": d_key_weight,
        },
        _configs(q, v),
    )
    return d_q, d_k, d_v, d_key_weight, d_query_weight


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last axis."""
    return x if x.stride(3) == 1 else x.contiguous()


def _chunks(rows: Tensor, cu: Tensor | None) -> Chunks:
    """Long enough that partial states cost little, short enough to fill the GPU; from shapes alone."""
    batch, tokens, heads = rows.shape[:3]
    size = _SMALLEST_CHUNK
    while size < _LARGEST_CHUNK and batch * tokens * heads > 2 * size * _PROGRAMS:
        size *= 2
    if interpreting():
        size = 32
    if cu is None:
        per_sequence = triton.cdiv(tokens, size)
        return Chunks(size, batch * per_sequence, per_sequence, None)
    ends = torch.div(cu.diff() + size - 1, size, rounding_mode="floor").cumsum(0).to(torch.int32)
    # At most this many: every segment may end in one that is not full.
    return Chunks(size, min(tokens // size + cu.shape[0] - 1, tokens), 0, ends)


def _states(count: int, q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(count, q.shape[2], q.shape[3] + 1, v.shape[3] + 1, dtype=torch.float32)


def _combine(partials: Tensor, chunks: Chunks, q: Tensor, v: Tensor, cu: Tensor | None) -> Tensor:
    state = _states(q.shape[0] if cu is None else cu.shape[0] - 1, q, v)
    size = state.shape[2] * state.shape[3]
    launch(
        combine,
        lambda c: (state.shape[0] * state.shape[1], triton.cdiv(size, c["BLOCK"])),
        {
            "partials": partials,
            "chunk_ends": chunks.ends,
            "state": state,
            "per_sequence": chunks.per_sequence,
            "HEADS": state.shape[1],
            "SIZE": size,
        },
        [Config({"BLOCK": 1024}, 4, 1)],
    )
    return state


def _operands(rows: Tensor, v: Tensor, cu: Tensor | None, chunks: Chunks, form: Form) -> dict[str, Any]:
    return {
        "cu": cu,
        "chunk_ends": chunks.ends,
        "slope": form.slope,
        "sequences": rows.shape[0] if cu is None else cu.shape[0] - 1,
        "per_sequence": chunks.per_sequence,
        "tokens": rows.shape[1],
        "chunk": chunks.size,
        "HEADS": rows.shape[2],
        "D": rows.shape[3],
        "E": v.shape[3],
        "BLOCK_D": max(triton.next_power_of_2(rows.shape[3]), 16),
        "BLOCK_E": max(triton.next_power_of_2(v.shape[3]), 16),
        "MAP": form.feature_map,
        "PRECISION": _precision(rows.dtype),
    }


def _key_operands(
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu: Tensor | None,
    chunks: Chunks,
    form: Form,
) -> dict[str, Any]:
    return {
        **_operands(k, v, cu, chunks, form),
        "k": k,
        "v": v,
        "key_weight": weight,
        **_tables(cos, sin),
        **_strides("k", k),
        **_strides("v", v),
        **_strides("w", weight),
    }


def _query_operands(
    q: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu: Tensor | None,
    chunks: Chunks,
    form: Form,
    kind: str,
) -> dict[str, Any]:
    return {
        **_operands(q, v, cu, chunks, form),
        "q": q,
        "query_weight": weight,
        **_tables(cos, sin),
        **_strides("q", q),
        **_strides("w", weight),
        "eps": form.eps,
        "KIND": kind,
    }


def _tables(cos: Tensor | None, sin: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.contiguous() for name, t in (("cos", cos), ("sin", sin))}


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    batch, row, head = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def _precision(dtype: torch.dtype) -> str:
    """Half precision fits TF32. For exact float32, three TF32 products err by 2^-21 and need far fewer registers than
    multiply-adds."""
    return "tf32x3" if dtype == torch.float32 and precision(dtype) == "ieee" else "tf32"


def _configs(q: Tensor, v: Tensor, sums_matrices: bool = False) -> list[Config]:
    """Tiles by the width of a head, chosen so that nothing spills; ``sums_matrices``: of the queries' gradient, which
    holds a matrix to apply and one to sum."""
    if interpreting():
        return [Config({"BLOCK": 16})]
    width = triton.next_power_of_2(max(q.shape[3], v.shape[3], 16))
    if width <= 32:
        return [Config({"BLOCK": 32}, 4, 1) if q.dtype == torch.float32 else Config({"BLOCK": 64}, 4, 2)]
    if width <= 64:
        return [Config({"BLOCK": 16 if sums_matrices and q.dtype == torch.float32 else 32}, 8, 1)]
    if sums_matrices:
        return [Config({"BLOCK": 16}, 8, 1, spills=40)]  # on an A100; two matrices of 128 x 128 fill the registers
    return [Config({"BLOCK": 32}, 8, 1)]
