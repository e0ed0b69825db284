"""Registration with PyTorch: ``torch.ops.fovea.gated_attention_pool``, its backward, and the scores alone.

Beside its results the operator gives what its backward pass takes: ``stats``, the largest score of each bag and the sum
of exponentials above it, which are not one number because a log-sum-exp near ``MASKED`` has no digits left for the sum;
and ``gates``, the activations of tanh and sigmoid, where :func:`kept_gates` says that keeping them is worth their
memory, else empty.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernels.gated_attention_pool import eager
from kernels.operators import custom_op

# Elements of activations up to which the PyTorch path keeps them: recomputing them is a third of the products of a
# training step, 200,000 instances' worth of them is as much memory as the features.
_KEPT_GATES = 1 << 25


def kept_gates(x: Tensor, gate: Tensor, trains: bool, backend: str) -> bool:
    """Whether the forward pass keeps the activations; ``trains`` says whether there may be a backward pass."""
    return trains and backend == "torch" and x.shape[0] * gate.shape[0] <= _KEPT_GATES


@custom_op("gated_attention_pool")
def gated_attention_pool_forward(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    trains: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled values (B, K, E), log-sum-exp (B, K), scores (N, K), stats (2, B, K), gates (N or 0, gate units).

    ``backend`` is triton or torch.
    """
    if backend == "triton":
        from kernels.gated_attention_pool import triton_path

        results = triton_path.forward(x, gate, gate_bias, score, score_bias, cu_seqlens, values, drop_mask)
        return *results, results[2].new_empty(0, len(gate))
    keep = kept_gates(x, gate, trains, backend)
    return eager.forward(x, gate, gate_bias, score, score_bias, cu_seqlens, values, drop_mask, keep)


@gated_attention_pool_forward.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    trains: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = x if values is None else values
    bags, branches = cu_seqlens.shape[0] - 1, score.shape[0]
    precise = torch.promote_types(x.dtype, torch.float32)
    return (
        values.new_empty(bags, branches, values.shape[1]),
        x.new_empty(bags, branches, dtype=precise),
        x.new_empty(x.shape[0], branches, dtype=precise),
        x.new_empty(2, bags, branches, dtype=precise),
        x.new_empty(x.shape[0] if kept_gates(x, gate, trains, backend) else 0, gate.shape[0], dtype=precise),
    )


@custom_op("gated_attention_pool_backward")
def gated_attention_pool_backward(
    d_pooled: Tensor | None,
    d_lse: Tensor | None,
    d_scores: Tensor | None,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    gates: Tensor,
    for_x: bool,
    for_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, gate_bias, score, score_bias and values; empty those of x and values that nobody wants."""
    # Autograd may hand over an expanded or transposed gradient.
    d_pooled, d_lse, d_scores = (None if d is None else d.contiguous() for d in (d_pooled, d_lse, d_scores))
    if backend == "triton":
        from kernels.gated_attention_pool import triton_path

        run: Any = triton_path.backward
    else:
        run = functools.partial(eager.backward, gates=gates if gates.shape[0] == x.shape[0] else None)
    d_x, *d_weights, d_values = run(
        d_pooled,
        d_lse,
        d_scores,
        x,
        gate,
        gate_bias,
        score,
        score_bias,
        cu_seqlens,
        values,
        drop_mask,
        pooled,
        scores,
        stats,
        for_x,
        for_values,
    )
    d_x, d_values = (x.new_empty(0) if d is None else d for d in (d_x, d_values))
    return d_x, d_weights[0], d_weights[1], d_weights[2], d_weights[3], d_values


@gated_attention_pool_backward.register_fake
def _(
    d_pooled: Tensor | None,
    d_lse: Tensor | None,
    d_scores: Tensor | None,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    gates: Tensor,
    for_x: bool,
    for_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if for_x else 0),
        gate.new_empty(gate.shape),
        gate_bias.new_empty(gate_bias.shape),
        score.new_empty(score.shape),
        score_bias.new_empty(score_bias.shape),
        x.new_empty(values.shape if for_values and values is not None else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.backend = inputs
    pooled, _, scores, stats, gates = output
    ctx.save_for_backward(*tensors, pooled, scores, stats, gates)
    ctx.set_materialize_grads(False)  # outputs that nobody uses then cost nothing
    ctx.mark_non_differentiable(stats, gates)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    d_x, *d_weights, d_values = gated_attention_pool_backward(
        *grads[:3], *ctx.saved_tensors, needed[0], needed[6], ctx.backend
    )
    return (d_x if needed[0] else None), *d_weights, None, (d_values if needed[6] else None), None, None, None


gated_attention_pool_forward.register_autograd(_backward, setup_context=_setup_context)


@custom_op("gated_attention_scores")
def gated_attention_scores(x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor, score_bias: Tensor) -> Tensor:
    """The scores (N, K) alone, by Triton; not differentiable."""
    from kernels.gated_attention_pool import triton_path

    return triton_path.scores(x, gate, gate_bias, score, score_bias)


@gated_attention_scores.register_fake
def _(x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor, score_bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], score.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
