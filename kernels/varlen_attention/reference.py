"""Packed attention segment by segment in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (Tq, H, E) and log-sum-exp (Tq, H)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(0, q.shape[1], dtype=precise)]
    for segment in range(cu_q.numel() - 1):
        rows, keys = slice(cu_q[segment], cu_q[segment + 1]), slice(cu_k[segment], cu_k[segment + 1])
        a, b, c = (t.transpose(0, 1).to(precise) for t in (q[rows], k[keys], v[keys]))
        scores = a @ b.repeat_interleave(repeats, 0).mT * scale
        if key_bias is not None:
            scores = scores + key_bias[:, None, keys]
        if causal:
            i, j = torch.arange(scores.shape[1])[:, None], torch.arange(scores.shape[2])
            seen = j <= i + scores.shape[2] - scores.shape[1]
            scores = scores.masked_fill(~seen.to(scores.device), -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        # Rows without a key: a softmax of zeros that counts for nothing keeps NaN out of the gradients as well.
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        outs.append((weights @ c.repeat_interleave(repeats, 0)).transpose(0, 1).to(q.dtype))
        lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
        lses.append(lse.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)
