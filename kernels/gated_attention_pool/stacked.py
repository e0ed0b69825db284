"""The operator on stacked weights of tanh and sigmoid, which is how models hold them and kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_attention_pool.operator import gated_attention_pool_forward, gated_attention_scores
from kernels.gated_attention_pool.reference import gated_attention_pool_reference
from kernels.operators import autocast_to

LARGEST_BRANCHES = 64


def pool_stacked(
    backend: str,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`kernels.gated_attention_pool.gated_attention_pool` with ``gate (2 h, D)``: tanh, then sigmoid.

    ``gate (h, D)`` has no sigmoid; ``backend`` is a settled choice.
    """
    dtype = (x if values is None else values).dtype
    x, gate, score = autocast_to(x, gate, score)
    values = None if values is None else autocast_to(values)[0]
    if backend == "reference":
        pooled, lse, scores = gated_attention_pool_reference(
            x, gate, gate_bias, score, score_bias, cu_seqlens, values, drop_mask
        )
    else:
        tensors = (x, gate, gate_bias, score, score_bias, values)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        pooled, lse, scores, _, _ = gated_attention_pool_forward(
            x, gate, gate_bias, score, score_bias, cu_seqlens, values, drop_mask, trains, backend
        )
    return pooled.to(dtype), lse, scores


def scores_stacked(x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor, score_bias: Tensor) -> Tensor:
    """The scores (N, K) alone by Triton, not differentiated: what decides which instances to hide."""
    x, gate, score = autocast_to(x.detach(), gate.detach(), score.detach())
    scores: Tensor = gated_attention_scores(x, gate, gate_bias.detach(), score, score_bias.detach())
    return scores


def triton_refusal(branches: int) -> str | None:
    """What the kernels cannot do with this many branches, or None."""
    if branches > LARGEST_BRANCHES:
        return f"there are {branches} branches and the kernels take up to {LARGEST_BRANCHES}"
    return None
