"""Attention pooling bag by bag in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segment import bounds

MASKED = -1e9  # the score of a hidden instance; finite, so that a bag with every instance hidden keeps its softmax


def gated_attention_pool_reference(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled values (B, K, E), log-sum-exp (B, K), scores (N, K)."""
    values = x if values is None else values
    scores = scores_reference(x, gate, gate_bias, score, score_bias)
    masked = scores if drop_mask is None else scores.masked_fill(drop_mask, MASKED)
    pooled, lse = [values[:0, None].expand(-1, len(score), -1)], [masked[:0]]
    for start, end in bounds(cu_seqlens, len(x)):
        bag = masked[start:end]
        pooled.append((bag.softmax(0).t() @ values[start:end].to(bag.dtype)).to(values.dtype)[None])
        lse.append(bag.logsumexp(0)[None])
    return torch.cat(pooled), torch.cat(lse), scores


def scores_reference(x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor, score_bias: Tensor) -> Tensor:
    """Scores (N, K), float32 at least."""
    precise = torch.promote_types(x.dtype, torch.float32)
    x, gate, gate_bias, score, score_bias = (t.to(precise) for t in (x, gate, gate_bias, score, score_bias))
    before = F.linear(x, gate, gate_bias)
    width = score.shape[1]
    product = before[:, :width].tanh()
    if len(gate) > width:
        product = product * before[:, width:].sigmoid()
    return F.linear(product, score, score_bias).to(precise)  # autocast may have lowered it
