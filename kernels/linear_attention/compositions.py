"""Cores of attention modules that are the operator with its inputs in other roles, or more than one step."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import InputError
from kernels.linear_attention.two_pass import linear_attention_2pass, plan
from kernels.segment import segment_ids, segment_lengths, segment_softmax, segment_sum


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_of_key: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention between the channels of a head (DaViT, arXiv:2204.03645): the operator with normaliser ``channel``.

    With matrices of tokens by channels, as DaViT's code names them, the output's transpose is

        softmax(scale K^T V) Q^T               D^-0.5 by default (first version)
        softmax(scale Q^T K) V^T               N^-0.5 by default, with ``query_of_key`` (the version of Florence-2)

    the softmax over the last axis. Both are one call: the operator's state is the transpose of the logits.

    Args:
        q, k, v: (B, N, H, D), or packed (T, H, D) with ``cu_seqlens``. Packed sequences of the second version differ
            in N and need a ``scale``.

    Returns:
        Of the shape of ``q``.

    Raises:
        InputError: as :func:`linear_attention_2pass`, or a scale is needed.
    """
    if query_of_key and scale is None:
        if cu_seqlens is not None:
            raise InputError("channel_attention: packed sequences differ in length; give query_of_key a scale.")
        scale = max(q.shape[1], 1) ** -0.5
    values, keys, queries = (q, k, v) if query_of_key else (k, v, q)
    return linear_attention_2pass(
        queries,
        keys,
        values,
        normaliser="channel",
        feature_map="identity",
        scale=scale,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    eps: float = 1e-6,
    eps_after: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Flow attention without a causal mask (Flowformer, arXiv:2202.06258): sources compete, sinks are allocated.

    With f = sigmoid(q_i), g = sigmoid(k_j), e = ``eps``, a = ``eps_after``, N queries and M keys:

        I_i = 1 / ((f_i + e).(sum_j g_j + e) + a)              O_j = 1 / ((g_j + e).(sum_i f_i + e) + a)
        allocation_i = sigmoid(N / M ((f_i + e).(sum_j O_j g_j + e) + a))
        competition_j = M softmax_j(clamp((g_j + e).(sum_i I_i f_i + e) + a, -1, 1))
        out_i = allocation_i I_i f_i [sum_j g_j (competition_j v_j)^T]

    The last line is the operator, with ``competition`` as key weights and the factors of the query as query weights;
    the per-token scalars before it are PyTorch's, from features that are kept for the backward pass.

    Args:
        q: (B, N, H, D), or packed (T, H, D) with ``cu_seqlens``; k, v: (B, M, H, D) and (B, M, H, E), or packed.
        eps_after: 0 in the published form, 1e-6 in its vision backbone.

    Returns:
        (B, N, H, E) or (T, H, E).

    Raises:
        InputError: as :func:`linear_attention_2pass`.
    """
    plan(q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, backend=backend)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    precise = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is None:  # heads first in memory, for the products
        f, g = (
            t.transpose(1, 2).to(precise, memory_format=torch.contiguous_format).sigmoid().transpose(1, 2)
            for t in (q, k)
        )
    else:
        f, g = q.to(precise).sigmoid(), k.to(precise).sigmoid()

    def flow(rows: Tensor, sums: Tensor, cu: Tensor | None) -> Tensor:
        """(rows + eps).(sums + eps) + eps_after of each token and head."""
        sums = sums + eps
        constant = eps * sums.sum(-1) + eps_after
        if cu is None:
            return (rows.transpose(1, 2) @ sums[..., None])[..., 0].transpose(1, 2) + constant[:, None]
        ids = segment_ids(cu, len(rows))
        return (rows * sums[ids]).sum(-1) + constant[ids]

    def total(rows: Tensor, weights: Tensor | None, cu: Tensor | None) -> Tensor:
        """Sum over the tokens, (B or S, H, D)."""
        if cu is None:
            if weights is None:
                return rows.sum(1)
            return (weights.transpose(1, 2)[:, :, None] @ rows.transpose(1, 2))[:, :, 0]
        rows = rows if weights is None else rows * weights[..., None]
        return segment_sum(rows.flatten(1), cu).unflatten(1, rows.shape[1:])

    of_query = flow(f, total(g, None, cu_k), cu_seqlens).reciprocal()
    of_key = flow(g, total(f, None, cu_seqlens), cu_k).reciprocal()
    conserved_query = flow(f, total(g, of_key, cu_k), cu_seqlens)
    conserved_key = flow(g, total(f, of_query, cu_seqlens), cu_k).clamp(-1, 1)
    if cu_seqlens is None or cu_k is None:
        allocation = (conserved_query * (q.shape[1] / max(k.shape[1], 1))).sigmoid()
        competition = conserved_key.softmax(1) * k.shape[1]
    else:
        queries, keys = segment_lengths(cu_seqlens), segment_lengths(cu_k)
        ratio = (queries / keys.clamp_min(1)).to(precise)
        allocation = (conserved_query * ratio[segment_ids(cu_seqlens, len(q)), None]).sigmoid()
        share = segment_softmax(conserved_key.t(), cu_k).t()
        competition = share * keys.to(precise)[segment_ids(cu_k, len(k)), None]
    out = linear_attention_2pass(
        f,
        g,
        v.to(precise),
        normaliser="none",
        feature_map="identity",
        key_weight=competition,
        query_weight=allocation * of_query,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        backend=backend,
    )
    return out.to(q.dtype)
