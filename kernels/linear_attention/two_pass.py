"""The operator's public function, its checks and its choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Choice, choose
from kernels.checks import check_cuts
from kernels.errors import InputError, unknown_name
from kernels.linear_attention.forms import FEATURE_MAPS, NORMALISERS, Form
from kernels.linear_attention.operator import linear_attention_forward
from kernels.linear_attention.reference import linear_attention_reference
from kernels.operators import autocast_to

# What the registers of a multiprocessor hold.
LARGEST_HEAD = {torch.float32: 64}
LARGEST_HALF_HEAD = 128
Rotary = tuple[Tensor, Tensor]


def linear_attention_2pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normaliser: str = "sum",
    feature_map: str = "elu_plus_one",
    slope: float | None = None,
    rotary: Rotary | None = None,
    key_rotary: Rotary | None = None,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply queries to what keys and values reduce to.

    With features ``f = feature_map(q_i)`` and ``g_j = feature_map(k_j)``, ``f'`` and ``g'`` the same after the rotary
    embedding, key weights ``w_j`` (1 without any) and

        S = sum_j w_j g'_j v_j^T (D, E)      g = sum_j w_j g_j (D)      t = sum_j w_j v_j (E)      n = sum_j w_j

    a token's output is, times its query weight,

    ============ ===================================================================== ================= =============
    normaliser   output                                                                default ``scale`` default ``eps``
    ============ ===================================================================== ================= =============
    ``none``     scale f' S                                                            1
    ``sum``      scale f' S / (f.g + eps)                                              1                 1e-6
    ``l2vit``    scale f' S / max(f.g, eps)                                            1                 100
    ``inline``   (scale / n) f' S + (1 - z) t / n,          z = (scale / n) f.g        D^-0.5
    ``mala``     (1 + 1 / (z + eps)) (scale / n) f' S - z t / n,  z as above           D^-0.5            1e-6
    ``channel``  f' A,     A = softmax of scale S over its first axis                  D^-0.5
    ============ ===================================================================== ================= =============

    The weights of ``inline`` sum to 1, and so do those of ``mala`` without a rotary embedding (up to ``eps``).

    Args:
        q: (B, N, H, D), or packed (T, H, D) with ``cu_seqlens``; any strides (kernels copy if the last is not 1).
        k: (B, M, H, D), or packed (U, H, D).
        v: (B, M, H, E), or packed (U, H, E).
        feature_map: ``identity``, ``relu``, ``leaky_relu``, ``elu_plus_one``, ``sigmoid`` or ``exp``.
        slope: of ``leaky_relu`` below 0 (default 0.01) or of ``exp`` in the exponent, exp(slope x) (default 1).
        rotary: cosines and sines (N or T, D / 2) of each query's angles; channels 2m and 2m + 1 are rotated by angle m.
        key_rotary: the same for the keys, (M or U, D / 2); by default that of the queries.
        key_weight: broadcasts to (B, M, H) or (U, H); not negative, a key of weight 0 is absent (its values must be
            finite), one of weight 2 counts twice. A boolean mask of present keys will do.
        query_weight: broadcasts to (B, N, H) or (T, H); multiplies outputs.
        cu_seqlens: (S + 1,) int32 or int64, boundaries of the packed segments, which do not see each other.
        cu_seqlens_k: the same of the keys, by default that of the queries.

    Returns:
        (B, N, H, E) or (T, H, E) in the dtype of ``q``; 0 where there is no key.

    Raises:
        InputError: shapes or names do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(
        q,
        k,
        v,
        normaliser=normaliser,
        feature_map=feature_map,
        slope=slope,
        rotary=rotary,
        key_rotary=key_rotary,
        key_weight=key_weight,
        query_weight=query_weight,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        eps=eps,
        backend=backend,
    )
    q, k, v = autocast_to(q, k, v)
    form = Form.of(normaliser, feature_map, slope, scale, eps, q.shape[-1])
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    precise = torch.promote_types(q.dtype, torch.float32)
    key_weight, query_weight = _weights(key_weight, k, precise), _weights(query_weight, q, precise)
    if key_rotary is None:
        key_rotary = rotary
    cos, sin = (None, None) if rotary is None else (t.to(precise) for t in rotary)
    key_cos, key_sin = (None, None) if key_rotary is None else (t.to(precise) for t in key_rotary)
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
        key_weight = None if key_weight is None else key_weight[None]
        query_weight = None if query_weight is None else query_weight[None]
    given = (q, k, v, key_weight, query_weight, cos, sin, key_cos, key_sin, cu_seqlens, cu_k)
    if choice.backend == "reference":
        out = linear_attention_reference(*given, form)
    else:
        out, _ = linear_attention_forward(*given, *form, choice.backend)
    return out if cu_seqlens is None else out[0]


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normaliser: str = "sum",
    feature_map: str = "elu_plus_one",
    slope: float | None = None,
    rotary: Rotary | None = None,
    key_rotary: Rotary | None = None,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`linear_attention_2pass` and say which implementation serves them."""
    if normaliser not in NORMALISERS:
        raise unknown_name("linear_attention_2pass: normaliser", normaliser, NORMALISERS)
    if feature_map not in FEATURE_MAPS:
        raise unknown_name("linear_attention_2pass: feature map", feature_map, FEATURE_MAPS)
    if slope is not None and (FEATURE_MAPS[feature_map] is None or slope < 0):
        raise InputError(
            f"linear_attention_2pass: slope {slope} with '{feature_map}'; it is for leaky_relu and exp, and at least 0."
        )
    if eps is not None and (NORMALISERS[normaliser].eps is None or eps <= 0):
        raise InputError(
            f"linear_attention_2pass: eps {eps} with '{normaliser}'; it is for sum, l2vit and mala, and above 0."
        )
    _check_shapes(q, k, v, cu_seqlens, cu_seqlens_k)
    tokens = -3  # the axis of the tokens, dense or packed
    if key_rotary is not None and rotary is None:
        raise InputError("linear_attention_2pass: key_rotary is given without rotary; give the angles of both.")
    for name, pair, rows in (("rotary", rotary, q), ("key_rotary", rotary if key_rotary is None else key_rotary, k)):
        expected = (rows.shape[tokens], q.shape[-1] // 2)
        if pair is not None and (q.shape[-1] % 2 or any(t.shape != expected for t in pair)):
            raise InputError(
                f"linear_attention_2pass: {name} must be cosines and sines (tokens, D / 2) = {expected} with an even "
                f"D; got {[tuple(t.shape) for t in pair]} for D = {q.shape[-1]}."
            )
    for name, weight, rows in (("key_weight", key_weight, k), ("query_weight", query_weight, q)):
        if weight is not None and not _broadcasts(weight, rows.shape[:-1]):
            raise InputError(
                f"linear_attention_2pass: {name} {tuple(weight.shape)} does not broadcast to {tuple(rows.shape[:-1])}."
            )
    width, largest = max(q.shape[-1], v.shape[-1]), LARGEST_HEAD.get(q.dtype, LARGEST_HALF_HEAD)
    refusal = f"heads are {width} wide and the kernels take up to {largest} here" if width > largest else None
    return choose("linear_attention_2pass", backend, (q, k, v), refusal)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    dims = 4 if cu_q is None else 3
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == dims:
        raise InputError(
            "linear_attention_2pass takes q (B, N, H, D), k (B, M, H, D), v (B, M, H, E), or packed (T, H, D), "
            f"(U, H, D), (U, H, E) with cu_seqlens; got {shapes}."
        )
    fits = q.shape[-2:] == k.shape[-2:] and k.shape[:-1] == v.shape[:-1]
    if not fits or (cu_q is None and q.shape[0] != k.shape[0]):
        raise InputError(
            f"linear_attention_2pass: q, k, v must share batch and heads, q and k the width, k and v the tokens; "
            f"got {shapes}."
        )
    if cu_q is None and cu_k is not None:
        raise InputError("linear_attention_2pass: cu_seqlens_k is given without cu_seqlens; give both.")
    if cu_q is None:
        return
    cu_k = cu_q if cu_k is None else cu_k
    if cu_q.shape != cu_k.shape or cu_q.dim() != 1 or cu_q.numel() == 0:
        raise InputError(
            f"linear_attention_2pass: cu_seqlens {tuple(cu_q.shape)} and cu_seqlens_k {tuple(cu_k.shape)} must both be "
            "(segments + 1,)."
        )
    if cu_k is cu_q and q.shape[0] != k.shape[0]:
        raise InputError(
            f"linear_attention_2pass: {q.shape[0]} packed queries and {k.shape[0]} keys need a cu_seqlens_k."
        )
    check_cuts("linear_attention_2pass", "cu_seqlens", cu_q, q.shape[0])
    check_cuts("linear_attention_2pass", "cu_seqlens_k", cu_k, k.shape[0])


def _broadcasts(weight: Tensor, shape: torch.Size) -> bool:
    sizes = [1] * (len(shape) - weight.dim()) + list(weight.shape)
    return len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True))


def _weights(weight: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.to(dtype).expand(rows.shape[:-1])
