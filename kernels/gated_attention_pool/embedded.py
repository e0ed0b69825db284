"""Attention pooling of packed bags from their features on: embed, score, softmax within each bag, weighted sum.

    h = relu(x We^T + be)                                    (T, H)
    s = Ws (tanh(Wv h + bv) * sigmoid(Wu h + bu)) + bs       (R, T), one row per attention branch
    w = softmax of s within each bag                         (R, T)
    z = sum over the bag of w h                              (B, R, H)

(Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, ICML 2018, eq. 8 and 9.) Without the gate the
sigmoid factor is 1.

On the CPU one function computes all of it piece by piece with each piece in cache, keeps only ``h`` and the activated
gate for the backward pass, and never builds a gradient as large as ``h``. On a slide of 50,000 x 1024 that and the
products of :mod:`kernels.dense` are most of a training step. Elsewhere it is a linear layer and
:func:`kernels.gated_attention_pool.gated_attention_pool`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import choose
from kernels.dense import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    Activation,
    cpu_path_serves,
    linear,
    pieces,
    project,
    weight_gradient,
)
from kernels.gated_attention_pool.gate import activate, gradient, product
from kernels.gated_attention_pool.reference import MASKED
from kernels.gated_attention_pool.stacked import pool_stacked, scores_stacked, triton_refusal
from kernels.segment import cut_at_bags, dot, pool, segment_ids, segment_softmax, segment_weighted_sum

# Mean instances per bag from which the CPU path's cut of each piece at bag boundaries pays.
_LONG_BAG = 64


class AttentionPool(NamedTuple):
    """What :func:`embedded_attention_pool` gives for ``R`` rows, ``B`` bags, ``T`` instances."""

    pooled: Tensor  # (B, R, H); zeros for an empty bag
    weights: Tensor  # (R, T)
    scores: Tensor  # (R, T), hidden instances at MASKED


class AttentionWeights(NamedTuple):
    """The parameters of :func:`embedded_attention_pool`: embed (H, D), gate (2A, H) or (A, H), score (R, A).

    The gate's first A rows feed the tanh, the second A rows the sigmoid; with A rows there is no sigmoid.
    """

    embed: Tensor
    embed_bias: Tensor | None
    gate: Tensor
    gate_bias: Tensor
    score: Tensor
    score_bias: Tensor


Hide = Callable[[Tensor], Tensor]


def embedded_attention_pool(
    x: Tensor,
    params: AttentionWeights,
    cu_seqlens: Tensor,
    *,
    hide: Hide | None = None,
    activation: Activation = "relu",
    dropout: float = 0.0,
    backend: str = "auto",
) -> AttentionPool:
    """Pool packed bags ``x (T, D)``; see the module for the equations.

    Args:
        hide: given the scores (R, T), says which instances each row must not see, (R, T) bool; not differentiated.
        activation: of the embedding.
        dropout: probability on the embedding; leave at 0 outside training.
        backend: as everywhere in :mod:`kernels`. On the CPU ``"auto"`` fuses all steps for float32 weights, a ReLU and
            no dropout, when the bags are long enough to gain; ``"torch"`` fuses whenever it can.

    Raises:
        InputError: a backend is forced that cannot serve.
    """
    choice = _choose(backend, x, params)
    could = choice == "torch" and x.device.type == "cpu" and activation == "relu" and dropout == 0
    if could and not torch.is_autocast_enabled("cpu") and (backend == "torch" or _fused_serves(x, params, cu_seqlens)):
        return AttentionPool(*_FusedPool.apply(x, cu_seqlens, hide, *params))
    hidden = linear(x, params.embed, params.embed_bias, activation, backend)
    return attention_pool(F.dropout(hidden, dropout), params, cu_seqlens, hide=hide, backend=backend)


def attention_pool(
    hidden: Tensor,
    params: AttentionWeights,
    cu_seqlens: Tensor,
    *,
    hide: Hide | None = None,
    gate_dropout: float = 0.0,
    backend: str = "auto",
) -> AttentionPool:
    """The same from the embedding ``hidden (T, H)`` on.

    ``gate_dropout``, a probability on both factors of the gate, is beyond the kernels.
    """
    choice = _choose(backend, hidden, params, gate_dropout)
    if gate_dropout > 0 or choice == "reference" or (hide is not None and choice != "triton"):
        scores = _scores(hidden, params, gate_dropout, backend)
        if hide is not None:
            scores = scores.masked_fill(hide(scores.detach()), MASKED)
        weights = segment_softmax(scores, cu_seqlens)
        return AttentionPool(segment_weighted_sum(weights, hidden, cu_seqlens), weights, scores)
    # The kernels must know beforehand whom to hide: a second pass over the scores still costs less than doing without.
    mask = None if hide is None else hide(scores_stacked(hidden, *params[2:]).t())
    pooled, _, raw = pool_stacked(
        choice, hidden, *params[2:], cu_seqlens, values=None, drop_mask=None if mask is None else mask.t()
    )
    scores = raw.t() if mask is None else raw.t().masked_fill(mask, MASKED)
    return AttentionPool(pooled, segment_softmax(scores, cu_seqlens), scores)


def _choose(backend: str, x: Tensor, params: AttentionWeights, gate_dropout: float = 0.0) -> str:
    refusal = "there is dropout within the gate" if gate_dropout > 0 else triton_refusal(len(params.score))
    return choose("embedded_attention_pool", backend, (x, params.gate, params.score), refusal).backend


def _scores(hidden: Tensor, params: AttentionWeights, gate_dropout: float, backend: str) -> Tensor:
    """Scores (R, T) of ``hidden (T, H)`` in plain PyTorch, float32 at least."""
    gate = linear(hidden, params.gate, params.gate_bias, backend=backend)
    if len(params.gate) == 2 * params.score.shape[1]:
        tanh, sigmoid = gate.chunk(2, -1)
        gate = F.dropout(tanh.tanh(), gate_dropout) * F.dropout(sigmoid.sigmoid(), gate_dropout)
    else:
        gate = F.dropout(gate.tanh(), gate_dropout)
    scores = F.linear(gate, params.score, params.score_bias).t()
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _fused_serves(x: Tensor, params: AttentionWeights, cu_seqlens: Tensor) -> bool:
    return cpu_path_serves(x, params.embed) and len(x) >= _LONG_BAG * (cu_seqlens.numel() - 1)


class _FusedPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, hide: Hide | None, *weights: Tensor) -> tuple[Tensor, ...]:
        params = AttentionWeights(*weights)
        total, dtype = len(x), params.embed.dtype
        width = params.score.shape[1]
        training = any(ctx.needs_input_grad)
        hidden = params.embed.new_empty(total, len(params.embed))
        gates = params.embed.new_empty(total if training else 0, len(params.gate))
        scores = params.embed.new_empty(len(params.score), total)
        for rows in pieces(total, FORWARD_ROWS):
            piece = torch.clamp_min(project(x[rows].to(dtype), params.embed, params.embed_bias), 0, out=hidden[rows])
            gate = activate(project(piece, params.gate, params.gate_bias), width)
            if training:
                gates[rows] = gate
            scores[:, rows] = F.linear(product(gate, width), params.score, params.score_bias).t()
        mask = None if hide is None else hide(scores)
        if mask is not None:
            scores.masked_fill_(mask, MASKED)
        attention = segment_softmax(scores, cu_seqlens)
        pooled = pool(attention, hidden, cu_seqlens, "per_bag")
        ctx.save_for_backward(x, cu_seqlens, hidden, gates, attention, mask, *params)
        ctx.set_materialize_grads(False)
        return pooled, attention, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, cu_seqlens, hidden, gates, attention, mask, *weights = ctx.saved_tensors
        params = AttentionWeights(*weights)
        d_pooled, d_attention, d_masked = grads
        d_scores = _score_gradient(d_pooled, d_attention, d_masked, attention, hidden, cu_seqlens, mask)
        d_x = params.embed.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        d_params = AttentionWeights(*(None if p is None else torch.zeros_like(p) for p in params))  # type: ignore[arg-type]
        d_params.score_bias.copy_(d_scores.sum(1))
        back_through_gate = params.gate.t().contiguous()
        for rows, parts in cut_at_bags(cu_seqlens, len(x), BACKWARD_ROWS):
            d_hidden = _gate_backward(d_scores[:, rows], hidden[rows], gates[rows], params, d_params, back_through_gate)
            if d_pooled is not None:  # what the weighted sum sends back to each instance
                for bag, part in parts:
                    d_hidden[part].addmm_(attention[:, rows][:, part].t(), d_pooled[bag])
            d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden[rows], 0)
            d_params.embed.add_(weight_gradient(d_hidden, x[rows].to(hidden.dtype)))
            if d_params.embed_bias is not None:
                d_params.embed_bias.add_(d_hidden.sum(0))
            if d_x is not None:
                torch.mm(d_hidden, params.embed, out=d_x[rows])
        return (None if d_x is None else d_x.to(x.dtype)), None, None, *d_params


def _score_gradient(
    d_pooled: Tensor | None,
    d_attention: Tensor | None,
    d_scores: Tensor | None,
    attention: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Gradient of the scores before masking, (R, T), from those of the three outputs."""
    through_sum = None if d_pooled is None else dot(d_pooled, hidden, cu_seqlens, "per_bag")
    arriving = [grad for grad in (d_attention, through_sum) if grad is not None]
    total = torch.zeros_like(attention) if d_scores is None else d_scores.clone()
    if arriving:
        product = (arriving[0] if len(arriving) == 1 else arriving[0] + arriving[1]) * attention
        if cu_seqlens.numel() == 2:
            mean = product.sum(1, keepdim=True)
        else:
            ids = segment_ids(cu_seqlens, product.shape[1])
            mean = product.new_zeros(len(product), cu_seqlens.numel() - 1).index_add_(1, ids, product)[:, ids]
        total += product.addcmul_(attention, mean, value=-1)
    return total if mask is None else total.masked_fill_(mask, 0)


def _gate_backward(
    d_scores: Tensor,
    hidden: Tensor,
    gates: Tensor,
    params: AttentionWeights,
    d_params: AttentionWeights,
    gate_t: Tensor,
) -> Tensor:
    """Add one piece's gradients of the gate and score layers to ``d_params``; return that of ``hidden``."""
    width = params.score.shape[1]
    d_params.score.addmm_(d_scores, product(gates, width))
    d_gate = gradient(d_scores.t() @ params.score, gates, width)
    d_params.gate.add_(weight_gradient(d_gate, hidden))
    d_params.gate_bias.add_(d_gate.sum(0))
    return project(d_gate, gate_t)
