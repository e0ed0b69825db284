"""Attention pooling of packed bags: score every instance, softmax within each bag, weighted sums, with no padding.

    a = tanh(V x + bV) * sigmoid(U x + bU)     (N, h); without U the tanh alone
    s = W a + bW                               (N, K), one column per attention branch
    p = softmax of s within each bag           (N, K)
    pooled = sum over the bag of p y           (B, K, E), where y is x unless other values are given

Sources: Ilse, Tomczak and Welling, Attention-based Deep Multiple Instance Learning, ICML 2018, eq. 8 and 9; several
branches and hidden instances: Zhang et al., Attention-Challenging Multiple Instance Learning, ECCV 2024. The form that
embeds the features first, as most poolers do, is :mod:`kernels.gated_attention_pool.embedded`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import Choice, choose
from kernels.checks import check_cuts
from kernels.errors import InputError
from kernels.gated_attention_pool.reference import MASKED
from kernels.gated_attention_pool.stacked import pool_stacked, triton_refusal
from kernels.operators import autocasting

__all__ = ["MASKED", "PoolWeights", "gated_attention_pool", "plan"]


class PoolWeights(NamedTuple):
    """V, bV, U, bU, W and bW of :func:`gated_attention_pool`; without the sigmoid's two the score is not gated."""

    tanh: Tensor  # (h, D)
    tanh_bias: Tensor  # (h,)
    sigmoid: Tensor | None  # (h, D)
    sigmoid_bias: Tensor | None  # (h,)
    score: Tensor  # (K, h)
    score_bias: Tensor  # (K,)


def gated_attention_pool(
    x: Tensor,
    weights: PoolWeights,
    cu_seqlens: Tensor,
    *,
    values: Tensor | None = None,
    drop_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool each bag of ``x`` with every attention branch; see the module for the equations.

    The attention of an instance is ``exp(score - lse)`` of its bag; that of a hidden one is 0, except in a bag with
    every instance hidden, where all have the same.

    Args:
        x: (N, D) packed instances that are scored.
        weights: of the score; in the dtype of ``x`` unless autocast is on. The biases may have any.
        cu_seqlens: (B + 1,) int32 or int64, boundaries of the bags, from 0 to N; bags may be empty.
        values: (N, E) what is pooled; ``x`` by default.
        drop_mask: (N, K) bool, true where a branch must not see an instance: its score counts as ``MASKED``.

    Returns:
        pooled: (B, K, E) in the dtype of the values; 0 for an empty bag.
        lse: (B, K) float32 (float64 for float64), natural log-sum-exp of the masked scores; -inf for an empty bag.
        scores: (N, K) float32 (float64 for float64), before masking.

    Raises:
        InputError: shapes or dtypes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(x, weights, cu_seqlens, values=values, drop_mask=drop_mask, backend=backend)
    gate, gate_bias = weights.tanh, weights.tanh_bias
    if weights.sigmoid is not None and weights.sigmoid_bias is not None:
        gate, gate_bias = torch.cat([gate, weights.sigmoid]), torch.cat([gate_bias, weights.sigmoid_bias])
    return pool_stacked(
        choice.backend, x, gate, gate_bias, weights.score, weights.score_bias, cu_seqlens, values, drop_mask
    )


def plan(
    x: Tensor,
    weights: PoolWeights,
    cu_seqlens: Tensor,
    *,
    values: Tensor | None = None,
    drop_mask: Tensor | None = None,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`gated_attention_pool` and say which implementation serves them."""
    tanh, tanh_bias, sigmoid, sigmoid_bias, score, score_bias = weights
    if x.dim() != 2 or tanh.dim() != 2 or x.shape[1] != tanh.shape[1] or tanh_bias.shape != tanh.shape[:1]:
        raise InputError(
            "gated_attention_pool takes x (N, D) with tanh weights (h, D) and bias (h,); got "
            f"{tuple(x.shape)}, {tuple(tanh.shape)}, {tuple(tanh_bias.shape)}."
        )
    if (sigmoid is None) != (sigmoid_bias is None):
        raise InputError("gated_attention_pool: give the sigmoid's weights and bias together, or neither.")
    if (
        sigmoid is not None
        and sigmoid_bias is not None
        and (sigmoid.shape != tanh.shape or sigmoid_bias.shape != tanh_bias.shape)
    ):
        raise InputError(
            f"gated_attention_pool: the sigmoid's weights {tuple(sigmoid.shape)} and bias "
            f"{tuple(sigmoid_bias.shape)} must have the shapes of the tanh's, {tuple(tanh.shape)} and "
            f"{tuple(tanh_bias.shape)}."
        )
    if score.dim() != 2 or score.shape[1] != len(tanh) or score_bias.shape != score.shape[:1]:
        raise InputError(
            f"gated_attention_pool: score weights (K, {len(tanh)}) and bias (K,) are needed; got "
            f"{tuple(score.shape)}, {tuple(score_bias.shape)}."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise InputError(f"gated_attention_pool: cu_seqlens must be (bags + 1,); got {tuple(cu_seqlens.shape)}.")
    check_cuts("gated_attention_pool", "cu_seqlens", cu_seqlens, len(x))
    if values is not None and (values.dim() != 2 or len(values) != len(x)):
        raise InputError(
            f"gated_attention_pool: values must be ({len(x)}, E), one row per instance; got {tuple(values.shape)}."
        )
    if drop_mask is not None and (drop_mask.shape != (len(x), len(score)) or drop_mask.dtype != torch.bool):
        raise InputError(
            f"gated_attention_pool: drop_mask must be bool ({len(x)}, {len(score)}); got {drop_mask.dtype} "
            f"{tuple(drop_mask.shape)}."
        )
    tensors = {"x": x, "the values": values, "the tanh weights": tanh, "the sigmoid weights": sigmoid, "score": score}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype and not autocasting(x):
            raise InputError(
                f"gated_attention_pool: x is {x.dtype} and {name} {tensor.dtype}; convert one of them, or use autocast."
            )
    return choose("gated_attention_pool", backend, tuple(tensors.values()), triton_refusal(len(score)))
