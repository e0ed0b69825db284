"""Attention of sorted tokens in groups, and to global tokens beside: tokens of one kind meet wherever they lie.

The intra-group attention of CATANet (Liu et al., CVPR 2025), apart from its projections. Tokens are ordered by the
cluster they belong to (:func:`group_order`); each group of neighbours in that order attends to itself and to the next
group, and, in a second softmax whose result is added, to global tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Choice, choose
from kernels.checks import check_dtypes, check_indices
from kernels.errors import InputError
from kernels.group_attention.operator import group_attention_forward
from kernels.group_attention.reference import group_attention_reference
from kernels.operators import autocast_to

__all__ = ["group_attention", "group_order", "plan"]

LARGEST_HEAD = 256


def group_order(cluster_ids: Tensor) -> Tensor:
    """The order that puts tokens of a cluster next to each other, each cluster's in the order they come in.

    Args:
        cluster_ids: (B, N), of any sortable dtype.

    Returns:
        (B, N) int64: the token at each sorted position.
    """
    return cluster_ids.argsort(dim=-1, stable=True)


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    group_size: int,
    *,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention within groups of sorted tokens, and to global tokens.

    With N tokens and groups of g = min(N, group_size), sorted positions i * g to i * g + g - 1 attend to positions
    i * g to i * g + 2 g - 1; past the last one the sequence is mirrored, again and again where one mirror image is too
    short (which the released code does not survive).

    Args:
        q: (B, N, H, D) queries, in the tokens' original order as everything here is.
        k: (B, N, H, D) keys.
        v: (B, N, H, E) values.
        order: (B, N) int64, a permutation for each item: the token at each sorted position. That no token is there
            twice is not checked, nor is the range on a GPU.
        group_size: tokens of a group.
        k_global: (M, H, D), or (B, M, H, D) where every item has its own.
        v_global: (M, H, E) or (B, M, H, E); the result of a softmax over these alone is added.
        scale: of the scores; D^-0.5 by default.

    Returns:
        (B, N, H, E) in the dtype of ``q``.

    Raises:
        InputError: shapes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(q, k, v, order, group_size, k_global=k_global, v_global=v_global, scale=scale, backend=backend)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = autocast_to(q, k, v)
    if k_global is not None and v_global is not None:
        k_global, v_global = autocast_to(k_global, v_global)
        if k_global.dim() == 3:
            k_global, v_global = k_global[None], v_global[None]
    if choice.backend == "reference":
        return group_attention_reference(q, k, v, order, group_size, k_global, v_global, scale)
    return group_attention_forward(q, k, v, order, k_global, v_global, group_size, scale, choice.backend)[0]


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    group_size: int,
    *,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`group_attention` and say which implementation serves them."""
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"group_attention takes q (B, N, H, D), k (B, N, H, D), v (B, N, H, E); got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}."
        )
    if order.shape != q.shape[:2] or order.dtype != torch.int64:
        raise InputError(
            f"group_attention: order must be {tuple(q.shape[:2])} int64; got {tuple(order.shape)} {order.dtype}."
        )
    check_dtypes("group_attention", q=q, k=k, v=v)
    check_indices("group_attention", "order", order, q.shape[1])
    if group_size < 1:
        raise InputError(f"group_attention: group_size must be positive; got {group_size}.")
    if (k_global is None) != (v_global is None):
        raise InputError("group_attention: k_global and v_global come together; only one of them was given.")
    if k_global is not None and v_global is not None:
        batch, _, heads, width = q.shape
        leads = [(), (batch,)]
        fits = k_global.shape[:-3] in leads and k_global.shape[:-1] == v_global.shape[:-1] and k_global.shape[-3] > 0
        if not fits or k_global.shape[-2:] != (heads, width) or v_global.shape[-1] != v.shape[3]:
            raise InputError(
                f"group_attention: k_global and v_global must be (M, {heads}, {width}) and (M, {heads}, {v.shape[3]}), "
                f"or the same with a batch of {batch} in front; got {tuple(k_global.shape)}, {tuple(v_global.shape)}."
            )
    largest = max(q.shape[3], v.shape[3])
    refusal = f"heads are {largest} wide and the kernels take up to {LARGEST_HEAD}" if largest > LARGEST_HEAD else None
    return choose("group_attention", backend, (q, k, v, k_global, v_global), refusal)
