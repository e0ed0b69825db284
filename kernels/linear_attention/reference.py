"""Linear attention in plain PyTorch, segment by segment: the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention.forms import Form


def linear_attention_reference(
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
) -> Tensor:
    """Output (B, N, H, E) for q (B, N, H, D), k (B, M, H, D), v (B, M, H, E); packed ones have B = 1."""
    precise = torch.promote_types(q.dtype, torch.float32)
    f, g, v_ = (t.transpose(1, 2).to(precise) for t in (q, k, v))
    f, g = _features(f, form), _features(g, form)
    weights = torch.ones_like(v_[..., 0]) if key_weight is None else key_weight.transpose(1, 2)
    f_rotated, g_rotated = _rotate(f, cos, sin), _rotate(g, key_cos, key_sin)
    if cu_q is None or cu_k is None:
        out = _attend(f, f_rotated, g, g_rotated, v_, weights, form)
    else:
        parts = [f.new_zeros(1, f.shape[1], 0, v.shape[3])]
        for segment in range(cu_q.numel() - 1):
            rows, keys = slice(cu_q[segment], cu_q[segment + 1]), slice(cu_k[segment], cu_k[segment + 1])
            own = (f[:, :, rows], f_rotated[:, :, rows], g[:, :, keys], g_rotated[:, :, keys], v_[:, :, keys])
            parts.append(_attend(*own, weights[:, :, keys], form))
        out = torch.cat(parts, 2)
    out = out.transpose(1, 2)
    return (out if query_weight is None else out * query_weight[..., None]).to(q.dtype)


def _attend(
    f: Tensor, f_rotated: Tensor, g: Tensor, g_rotated: Tensor, v: Tensor, weights: Tensor, form: Form
) -> Tensor:
    """All (B, H, tokens, width), weights (B, H, M)."""
    if v.shape[2] == 0:
        return f.new_zeros(*f.shape[:3], v.shape[3]) + 0 * f.sum()
    weights = weights[..., None]
    count = weights.sum(2, keepdim=True)
    some = count != 0
    count = count.where(some, 1)
    state = (g_rotated * weights).mT @ v
    if form.normaliser == "channel":
        return (f_rotated @ (form.scale * state).softmax(2)).where(some, 0)
    numerator = form.scale * (f_rotated @ state)
    total = f @ (g * weights).sum(2, keepdim=True).mT
    if form.normaliser == "sum":
        return numerator / (total + form.eps)
    if form.normaliser == "l2vit":
        return numerator / total.clamp_min(form.eps)
    if form.normaliser == "none":
        return numerator
    z, mean = form.scale * total / count, (v * weights).sum(2, keepdim=True) / count
    if form.normaliser == "inline":
        return numerator / count + (1 - z) * mean
    return (1 + 1 / (z + form.eps)) * numerator / count - z * mean


def _features(x: Tensor, form: Form) -> Tensor:
    if form.feature_map == "elu_plus_one":
        return F.elu(x) + 1
    if form.feature_map == "leaky_relu":
        return F.leaky_relu(x, form.slope)
    if form.feature_map == "exp":
        return (form.slope * x).exp()
    return {"identity": x, "relu": x.relu(), "sigmoid": x.sigmoid()}[form.feature_map]


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return x
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
