"""Reversed attention: a token sends its value to those it attends to, instead of receiving theirs.

Source: Ding et al., Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention (DependencyViT),
CVPR 2023, arXiv 2304.03282. No code was released. With A the softmax of the scores over keys (row i: the distribution
of child i over its parents), P the head selector and M the message of a token, token j of head h receives

    y_j = sum over i of A_ij P_ih M_i v_i,    P = softmax over heads (x Wp / temperature),
    M = (M of the layer before, at first 1) * sigmoid(mlp(x)).

The paper does not say whether selector and controller have biases; here they have none by default.

The matrix A is never written down: with L_i the log-sum-exp of row i, y_j is Z_j times the softmax over i of
``s_ij - L_i`` applied to what is sent, and Z_j the sum of its exponentials, so that two passes of fused attention, the
second with queries and keys exchanged, give it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, elementwise, projection
from attention.layout import split_qkv, weights_of
from attention.masking import blank, hide_keys
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError
from kernels.varlen_attention import plan, varlen_attention
from kernels.varlen_attention.operator import varlen_attention_backward, varlen_attention_forward


@register("reversed", kind="mixer")
class ReversedAttention(Mixer):
    """Reversed attention: each token sends its gated value to its parents (DependencyViT, Ding et al. 2023).

    ``extras["message"]`` (B, *grid), where it is there, is the message M that the layer before has left, and is
    replaced by that of this layer: pass one dictionary through all layers of a stage. A network multiplies its last
    tokens by it before it averages them.

    Args:
        dim: channels C.
        num_heads: heads.
        temperature: of the head selector's softmax.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        gate_bias: whether the head selector and the message controller have biases.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the temperature is not positive, or the message is not one number per token.
    """

    about = About("Ding et al. (DependencyViT), CVPR 2023, 2304.03282", "O(N^2)", "varlen_attention")
    grids = (1, 2, 3)
    rows_sum_to_one = False  # the columns do: a token sends what it has

    def __init__(
        self,
        dim: int,
        num_heads: int,
        temperature: float = 0.1,
        qkv_bias: bool = False,
        gate_bias: bool = False,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if not temperature > 0:
            raise InputError(f"attention 'reversed': temperature={temperature} must be greater than 0.")
        self.temperature = temperature
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.head_selector = nn.Linear(dim, num_heads, bias=gate_bias)
        self.message_fc1 = nn.Linear(dim, max(dim // 2, 1), bias=gate_bias)
        self.message_fc2 = nn.Linear(max(dim // 2, 1), 1, bias=gate_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        message = self._message(x, mask, None if extras is None else extras.get("message"))
        if extras is not None:
            extras["message"] = message
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        received = self._core(q, k, v, self._sent(x, message), mask)
        return self.proj_drop(self.proj(received.flatten(-2)))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Reversed attention, (B, heads, N, N): what token j (rows) receives of token i (columns)."""
        return self._weights(x, mask, self._message(x, mask, None))

    def dependency(self, x: Tensor, mask: Tensor | None = None, message: Tensor | None = None) -> Tensor:
        """The dependency mask (B, N, N), reversed attention summed over heads: how much row j is a parent of column i.

        Args:
            x: (B, *grid, C).
            mask: (B, *grid) bool, true for real tokens.
            message: (B, *grid), that of the layer before; 1 by default.
        """
        self._check(x, mask)
        x = blank(x, mask)
        return self._weights(x, mask, self._message(x, mask, message)).sum(1)

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        values = (self._sent(x, self._message(x, None, None))[..., None] * v).to(v.dtype)
        out = _Receive.apply(q, k, values, cu_seqlens, self.head_dim**-0.5)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _message(self, x: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
        """M of this layer, (B, *grid), 0 where masked."""
        if before is not None and before.shape != x.shape[:-1]:
            raise InputError(
                f"attention 'reversed': the message of the layer before must be {tuple(x.shape[:-1])}, one number per "
                f"token; got {tuple(before.shape)}."
            )
        gate = torch.sigmoid(self.message_fc2(F.gelu(self.message_fc1(x)))[..., 0])
        message = gate if before is None else before * gate
        return message if mask is None else message.masked_fill(~mask, 0)

    def _sent(self, x: Tensor, message: Tensor) -> Tensor:
        """P M, (B, *grid, heads): the share of its value that a token sends through each head."""
        logits = self.head_selector(x)
        precise = torch.promote_types(logits.dtype, torch.float32)
        return (logits.to(precise) / self.temperature).softmax(-1) * message[..., None]

    def _weights(self, x: Tensor, mask: Tensor | None, message: Tensor) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        sent = self._sent(x, message)
        return weights_of(lambda values: self._core(q, k, values, sent, mask), v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, sent: Tensor, mask: Tensor | None) -> Tensor:
        """(B, *grid, heads, E)."""
        batch, tokens, scale = len(q), q.shape[1:-2].numel(), self.head_dim**-0.5
        cuts = torch.arange(0, batch * tokens + 1, tokens, device=q.device)
        q, k = hide_keys(q, k, mask, scale)  # masked tokens then receive nothing, and they send their values, 0
        values = (sent[..., None] * v).to(v.dtype)
        return _Receive.apply(*(t.flatten(0, -3) for t in (q, k, values)), cuts, scale).view(v.shape)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        total = batch * tokens
        statistics = attend("softmax statistics", total, tokens, self.dim, total)
        return [
            projection("q, k, v", total, self.dim, 3 * self.dim),
            projection("head selector", total, self.dim, self.num_heads),
            projection("message controller", total, self.dim, self.dim // 2 + 1),
            elementwise("gated values", total * self.dim),
            Part(statistics.name, statistics.flops / 2, statistics.elements / 2),
            attend("reversed attention", total, tokens, self.dim, total, total * self.num_heads),
            projection("output", total, self.dim, self.dim),
        ]


class _Receive(torch.autograd.Function):
    """A^T values, (T, heads, E), for packed q, k and values (T, heads, .), without A in either direction.

    It is the gradient of ordinary attention's values. So the gradients go back through ordinary attention to the
    incoming gradient G: A G is that of the values, and with the values as what arrives at A G, its queries' and keys'
    are ours.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, values: Tensor, cuts: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, values, cuts)
        ctx.scale = scale
        _, rows = varlen_attention(q, k, torch.zeros_like(k[..., :1]), cuts, cuts, scale=scale)
        # Queries are now what keys were: token j asks how much each i gives it, less the log-sum-exp of i.
        bias = -rows.t()
        if q.device.type == "cpu":  # whose kernel would copy a bias for every query
            q, k = _with_bias(q, k, bias.t() / scale)
            out, columns = varlen_attention(k, q, values, cuts, cuts, scale=scale)
        else:
            out, columns = varlen_attention(k, q, values, cuts, cuts, key_bias=bias, scale=scale)
        return (out * columns.exp()[..., None]).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, values, cuts = ctx.saved_tensors
        grad = grad.contiguous()
        chosen = plan(q, k, grad, cuts, cuts, scale=ctx.scale).backend
        backend = "torch" if chosen == "reference" else chosen
        d_values, rows = varlen_attention_forward(q, k, grad, cuts, cuts, None, False, ctx.scale, backend)
        d_q, d_k, _, _ = varlen_attention_backward(
            values, None, q, k, grad, cuts, cuts, None, d_values, rows, False, ctx.scale, backend
        )
        return d_q, d_k, d_values, None, None


def _with_bias(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` and ``k`` with channels that add ``bias`` (T, heads) of ``q`` to their products, whatever their dtype."""
    coarse = bias.to(q.dtype)
    fine = (bias - coarse).to(q.dtype)
    return torch.cat([q, coarse[..., None], fine[..., None]], -1), F.pad(k, (0, 2), value=1)
