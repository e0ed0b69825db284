"""Softmax attention over packed sequences: each segment attends within itself, whatever the lengths, with no padding.

This is the block mask of packed bags (one segment per bag) in any transformer-like pooler. Semantics follow
flash-attention 2: with ``causal`` the last query of a segment is aligned with its last key.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backend import Choice, choose
from kernels.checks import check_cuts, check_dtypes
from kernels.errors import InputError
from kernels.operators import autocast_to
from kernels.varlen_attention.operator import varlen_attention_forward
from kernels.varlen_attention.reference import varlen_attention_reference

__all__ = ["plan", "varlen_attention"]

LARGEST_HEAD = 256


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    causal: bool = False,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each segment's queries to the same segment's keys.

    Args:
        q: (Tq, H, D) packed queries.
        k: (Tk, G, D) packed keys; H is a multiple of G, and each key head serves H / G neighbouring query heads.
        v: (Tk, G, E) packed values.
        cu_q, cu_k: (S + 1,) int32 or int64, boundaries of the segments, from 0 to Tq and to Tk; either side of a
            segment may be empty. GPU kernels do not check them.
        causal: query i of a segment sees keys j <= i + keys - queries of it.
        key_bias: (1 or H, Tk) float32, added to the scaled scores of a key; -inf hides it.
        scale: of the scores; D^-0.5 by default.

    Returns:
        out: (Tq, H, E) in the dtype of ``q``; 0 where a query sees no key.
        lse: (Tq, H) float32 (float64 for float64), natural log-sum-exp of the scores; -inf where a query sees no key.

    Raises:
        InputError: shapes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(q, k, v, cu_q, cu_k, causal=causal, key_bias=key_bias, scale=scale, backend=backend)
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if choice.backend == "reference":
        return varlen_attention_reference(q, k, v, cu_q, cu_k, causal, key_bias, scale)
    return varlen_attention_forward(q, k, v, cu_q, cu_k, key_bias, causal, scale, choice.backend)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    causal: bool = False,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`varlen_attention` and say which implementation serves them."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise InputError(
            f"varlen_attention takes q (Tq, H, D), k (Tk, G, D), v (Tk, G, E); got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"varlen_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads.")
    if cu_q.shape != cu_k.shape or cu_q.dim() != 1 or cu_q.numel() == 0:
        raise InputError(
            f"varlen_attention: cu_q {tuple(cu_q.shape)} and cu_k {tuple(cu_k.shape)} must both be (segments + 1,)."
        )
    check_dtypes("varlen_attention", q=q, k=k, v=v)
    check_cuts("varlen_attention", "cu_q", cu_q, q.shape[0])
    check_cuts("varlen_attention", "cu_k", cu_k, k.shape[0])
    if key_bias is not None and key_bias.shape not in ((1, k.shape[0]), (q.shape[1], k.shape[0])):
        raise InputError(f"varlen_attention: key_bias must be (1 or H, Tk); got {tuple(key_bias.shape)}.")
    largest = max(q.shape[2], v.shape[2])
    refusal = f"heads are {largest} wide and the kernels take up to {LARGEST_HEAD}" if largest > LARGEST_HEAD else None
    return choose("varlen_attention", backend, (q, k, v), refusal)
