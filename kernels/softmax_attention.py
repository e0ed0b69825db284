"""Dense softmax attention with its log-sum-exp, forward and backward apart: what the PyTorch paths are built from.

Operators cut their tokens into dense blocks, call :func:`attend` on them, keep inputs, outputs and log-sum-exp, and
call :func:`attend_backward` with the same blocks. On the CPU both go through PyTorch's fused kernel, which keeps no
scores; where it cannot serve, through matrix products.

Shapes: q (B, H, Lq, D), k (B, G, Lk, D), v (B, G, Lk, E) with H a multiple of G (each key head serves H / G
neighbouring query heads); ``mask`` bool, true where a query sees a key, and ``bias``, added to the scaled scores,
broadcast to (B, H, Lq, Lk). A query that sees no key gives 0, log-sum-exp -inf, and no gradient.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_HALF = (torch.float16, torch.bfloat16)
# Weights are powers of 2: PyTorch's exp takes up to twenty times as long on a CPU where scores are hidden or underflow.
LOG2E = math.log2(math.e)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention without autograd.

    Args:
        fused: force or forbid the fused kernel; by default it is used where it serves.

    Returns:
        out: (B, H, Lq, E) in the dtype of ``q``.
        lse: (B, H, Lq) natural log-sum-exp of the scores, float32 (float64 for float64 inputs).
    """
    if q.numel() == 0 or k.shape[2] == 0:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=_precise(q), device=q.device)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    if _fused_serves(q, bias) if fused is None else fused:
        q, k, v, width = _same_width(q, k, v)
        out, lse = _flash(q, k, v, attn_mask=_additive(mask, bias, q), scale=scale)
        if mask is not None or bias is not None:
            lse = lse.masked_fill(~_sees(mask, bias), -torch.inf)
        return out[..., :width], lse
    scores = _scores(q, k, scale, mask, bias)
    # Dividing the few outputs instead of the many weights saves two passes over the scores.
    highest = _finite(scores.amax(-1, keepdim=True))
    weights = scores.sub_(highest).mul_(LOG2E).exp2_()
    total = weights.sum(-1, keepdim=True)
    out = _per_key_head(weights, v).flatten(1, 2) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return out.to(q.dtype), (highest + total.log())[..., 0]


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    bias_gradient: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, on request, of ``bias`` (in its own shape) from those of :func:`attend`'s outputs."""
    if q.numel() == 0 or k.shape[2] == 0:
        d_bias = torch.zeros_like(bias) if bias is not None and bias_gradient else None
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), d_bias
    serves = grad_lse is None and not bias_gradient and (_fused_serves(q, bias) if fused is None else fused)
    if serves:
        d, e = q.shape[3], v.shape[3]
        q, k, v, _ = _same_width(q, k, v)
        out, grad_out = (_widened(t, q.shape[3]) for t in (out, grad_out))
        d_q, d_k, d_v = _flash_backward(
            grad_out, q, k, v, out, _finite(lse), 0.0, False, attn_mask=_additive(mask, bias, q), scale=scale
        )
        return d_q[..., :d], d_k[..., :d], d_v[..., :e], None
    # Query heads that share a key head are further rows of its products, which then sum over them.
    shape, groups = (*q.shape[:3], k.shape[2]), k.shape[0] * k.shape[1]
    rows, d_rows, keys, values = (_per_group(t, groups) for t in (q, grad_out, k, v))
    start = _finite(lse).contiguous()[..., None] * -LOG2E  # or all scores would follow the strides of lse
    added = _additive(mask, bias, q)
    if added is not None:
        start = start + added.to(lse.dtype) * LOG2E
    start = start.expand(shape).reshape(*rows.shape[:2], -1)
    weights = torch.baddbmm(start, rows, keys.mT, alpha=scale * LOG2E).exp2_()
    delta = (d_rows * _per_group(out, groups)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse.reshape(delta.shape)
    d_scores = torch.bmm(d_rows, values.mT).sub_(delta).mul_(weights)
    d_q = torch.bmm(d_scores, keys).mul_(scale).view(q.shape)
    d_k = torch.bmm(d_scores.mT, rows).mul_(scale).view(k.shape)
    d_v = torch.bmm(weights.mT, d_rows).view(v.shape)
    d_bias = None
    if bias is not None and bias_gradient:
        d_bias = d_scores.view(shape).sum_to_size(bias.shape).to(bias.dtype)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_bias


def _precise(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def _fused_serves(q: Tensor, bias: Tensor | None) -> bool:
    # The kernel takes a mask in the dtype of q alone: half precision would round a bias.
    return q.device.type == "cpu" and (bias is None or bias.dtype == q.dtype not in _HALF)


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Operands whose last axis is dense and equally long in all, and the width of the output."""
    width = max(q.shape[3], v.shape[3])
    a, b, c = (_widened(t, width) for t in (q, k, v))
    return a, b, c, v.shape[3]


def _widened(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros up to ``width`` and a dense last axis; padding by nothing would copy."""
    if x.shape[3] != width:
        return F.pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()


def _additive(mask: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None:
        return bias
    if bias is None:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    return bias.masked_fill(~mask, -torch.inf)


def _sees(mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Whether a query sees any key, broadcastable to (B, H, Lq)."""
    parts = [mask] if mask is not None else []
    parts += [bias != -torch.inf] if bias is not None else []
    return functools.reduce(torch.logical_and, parts).any(-1)


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scaled scores (B, H, Lq, Lk) in float32, or float64 for float64 inputs."""
    scores = _per_key_head((q * scale).to(_precise(q)), k.mT).flatten(1, 2)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores


def _per_group(x: Tensor, groups: int) -> Tensor:
    """(B, heads, L, D) as (groups, B * heads * L / groups, D), in the precision of scores."""
    return x.to(_precise(x)).reshape(groups, x.shape[0] * x.shape[1] * x.shape[2] // groups, x.shape[3])


def _per_key_head(left: Tensor, right: Tensor) -> Tensor:
    """``left (B, H, M, K)`` times the ``right (B, G, K, N)`` of its key head, (B, G, H / G, M, N)."""
    return left.unflatten(1, (right.shape[1], -1)) @ right.to(left.dtype)[:, :, None]


def _finite(lse: Tensor) -> Tensor:
    """-inf replaced by 0: subtracting it from scores of -inf then gives -inf, not NaN."""
    return lse.where(lse != -torch.inf, 0)
