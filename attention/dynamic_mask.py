"""Dynamic mask attention: softmax attention to the keys whose learned bias is largest.

Source: Shi et al., Trainable Dynamic Mask Sparse Attention (DMA), arXiv 2508.02124, made for language models. For each
key head

    bias_j = A softplus(dt(v_j)),   dt linear in the values of all key heads,

the w tokens with the largest bias are kept, and the bias is added to their scores; queries and keys are RMS-normalised.
The bias learns, the choice has no gradient; between equal biases (all are 0 at the start) it is arbitrary. Rotary
embedding, which the language model applies to queries and keys, is not part of this module.

Without a causal mask the kept keys are the same for all queries: they are gathered, and attention to w keys is dense.
With one, each query keeps w of the keys before it, and queries are handled in blocks whose scores are computed again
in the backward pass, so that memory grows with N and not with its square. ``block_size`` follows the released code's
majority vote; that only tokens a query may see have a vote is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.about import About
from attention.cost import Part, attend, elementwise, projection
from attention.layout import split_heads, weights_of
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import NotNegative
from attention.registry import register
from kernels.errors import InputError
from kernels.operators import precisely
from kernels.segment import segment_lengths, segment_top_k
from kernels.varlen_attention import varlen_attention

QUERY_ROWS = 256  # queries whose scores exist at one time, where each has keys of its own


@register("dynamic_mask", kind="mixer")
class DynamicMaskAttention(Mixer):
    """Dynamic mask attention: the w keys of largest learned bias, densely attended (DMA, Shi et al. 2025).

    Args:
        dim: channels C.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, each serving as many neighbouring query heads; None for one each.
        window: w, the keys that are kept; a map of no more tokens keeps all.
        causal: whether a token sees only those before it (in row-major order) and itself, keeping w of them.
        block_size: with more than 1, whole blocks of so many neighbouring keys are kept or dropped, as the majority of
            their tokens would be.
        bias: whether the projections have biases.
        rms_eps: of the normalisation of queries and keys.

    Raises:
        InputError: heads, window or block are not possible.
    """

    about = About("Shi et al. (DMA), 2025, 2508.02124", "O(N w)", "varlen_attention", "BSD-3-Clause")
    grids = (1, 2, 3)
    takes_choices = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        window: int = 2048,
        causal: bool = False,
        block_size: int = 1,
        bias: bool = False,
        rms_eps: NotNegative = 1e-6,
    ) -> None:
        super().__init__(dim, num_heads)
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if groups < 1 or num_heads % groups:
            fitting = [heads for heads in range(1, num_heads + 1) if num_heads % heads == 0]
            raise InputError(
                f"attention 'dynamic_mask': num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}; take it "
                f"from {', '.join(map(str, fitting))}."
            )
        if min(window, block_size) < 1:
            raise InputError(
                f"attention 'dynamic_mask': window={window} and block_size={block_size} must be at least 1."
            )
        self.num_kv_heads = groups
        self.window = window
        self.causal = causal
        self.block_size = block_size
        width = groups * self.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, width, bias=bias)
        self.v_proj = nn.Linear(dim, width, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=rms_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=rms_eps)
        self.A = nn.Parameter(torch.zeros(groups))
        self.dt_proj = nn.Linear(width, groups, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v, bias = self._project(x.flatten(1, -2), mask)
        return self.o_proj(self._core(q, k, v, bias).flatten(2)).view(x.shape)

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v, bias = self._project(x.flatten(1, -2), mask)
        return weights_of(lambda values: self._core(q, k, values, bias), v)

    def kept(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which keys are kept, bool (B, key heads, 1, N), or (B, key heads, N, N) with a causal mask."""
        self._check(x, mask)
        bias = self._project(blank(x, mask).flatten(1, -2), mask)[3]
        return self._keep(bias[:, :, None]) if not self.causal else self._keep(_before(bias, 0, bias.shape[2]))

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        if self.causal or self.block_size > 1:
            return super().packed(x, cu_seqlens, shapes)
        q, k, v, bias = (t[0] for t in self._project(x[None], None))
        cuts = cu_seqlens
        lengths = segment_lengths(cu_seqlens)
        if len(lengths) and lengths.max() > self.window:
            chosen, there = segment_top_k(bias.detach(), cu_seqlens, self.window)
            chosen = chosen[:, there]  # (key heads, kept tokens of one map after the other)
            k, v = (_take(t[None], chosen[None])[0] for t in (k, v))
            bias = bias.gather(1, chosen)
            cuts = F.pad(there.sum(1).cumsum(0), (1, 0)).to(cu_seqlens.dtype)
        out, _ = varlen_attention(q, k, v, cu_seqlens, cuts, key_bias=self._per_head(bias))
        return self.o_proj(out.flatten(1))

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, N, H, D), k and v (B, N, G, D), and the bias (B, G, N), float32 at least, -inf where masked."""
        values = self.v_proj(x)
        q = _normalised(self.q_norm, split_heads(self.q_proj(x), self.num_heads))
        k = _normalised(self.k_norm, split_heads(self.k_proj(x), self.num_kv_heads))
        steps = self.dt_proj(values)
        precise = torch.promote_types(steps.dtype, torch.float32)
        # Dense rows of tokens, small beside the keys: what the choice sorts, and what a compiled backward can view.
        steps = steps.to(precise).transpose(1, 2).contiguous()
        bias = self.A.to(precise)[:, None] * F.softplus(steps)
        if mask is not None:
            bias = bias.masked_fill(~mask.flatten(1)[:, None], -torch.inf)
        return q.to(values.dtype), k.to(values.dtype), split_heads(values, self.num_kv_heads), bias

    def _core(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """(B, N, H, E) of the projections as :meth:`_project` returns them."""
        batch, tokens = q.shape[:2]
        chooses = self.window < tokens or self.block_size > 1
        if self.causal and chooses:
            return self._causal(q, k, v, bias)
        if self.block_size > 1:
            bias = bias.masked_fill(~self._keep(bias), -torch.inf)
        elif chooses:
            chosen = bias.detach().topk(self.window, dim=-1).indices
            k, v = _take(k, chosen), _take(v, chosen)
            bias = bias.gather(2, chosen)
        cuts_q, cuts_k = (torch.arange(0, batch * n + 1, n, device=q.device) for n in (tokens, k.shape[1]))
        out, _ = varlen_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            cuts_q,
            cuts_k,
            causal=self.causal,
            key_bias=self._per_head(bias.transpose(0, 1).flatten(1)),
        )
        return out.unflatten(0, (batch, tokens))

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        tokens = q.shape[1]
        parts = []
        for start in range(0, tokens, QUERY_ROWS):
            stop = min(start + QUERY_ROWS, tokens)
            given = (q[:, start:stop], k[:, :stop], v[:, :stop], bias[:, :, :stop])
            if tokens > QUERY_ROWS and torch.is_grad_enabled():
                parts.append(checkpoint(self._rows, *given, use_reentrant=False))
            else:
                parts.append(self._rows(*given))
        return torch.cat(parts, 1)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """The outputs (B, R, H, E) of the last R of N tokens."""
        rows, tokens = q.shape[1], k.shape[1]
        keep = self._keep(_before(bias.detach(), tokens - rows, tokens))[:, :, None]  # (B, G, 1, R, N)
        queries = q.transpose(1, 2).unflatten(1, (self.num_kv_heads, -1)).to(bias.dtype)
        keys, values = (t.transpose(1, 2)[:, :, None].to(bias.dtype) for t in (k, v))
        with precisely(q):
            scores = queries @ keys.mT * self.head_dim**-0.5
            # Large instead of infinite: a query that sees nothing has a softmax all the same, cleared afterwards.
            scores = scores + bias.masked_fill(bias == -torch.inf, 0)[:, :, None, None]
            weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0)
            out = weights @ values
        return out.flatten(1, 2).transpose(1, 2).to(v.dtype)

    def _keep(self, bias: Tensor) -> Tensor:
        """Which of the last axis are kept, of those whose bias is not -inf."""
        seen = bias > -torch.inf
        keep = seen
        tokens = bias.shape[-1]
        if self.window < tokens:
            chosen = bias.detach().topk(self.window, dim=-1).indices
            keep = torch.zeros_like(seen).scatter(-1, chosen, True) & seen
        if self.block_size > 1:
            votes, voters = (
                F.pad(t.int(), (0, -tokens % self.block_size)).unflatten(-1, (-1, self.block_size)).sum(-1)
                for t in (keep, seen)
            )
            keep = (2 * votes > voters).repeat_interleave(self.block_size, -1)[..., :tokens] & seen
        return keep

    def _per_head(self, bias: Tensor) -> Tensor:
        """(G, T) as (H, T)."""
        return bias.repeat_interleave(self.num_heads // self.num_kv_heads, 0)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        total, keys = batch * tokens, min(self.window, tokens)
        width = self.num_kv_heads * self.head_dim
        # Causal scores are computed densely, half of them in vain.
        scored = tokens if self.causal else keys
        return [
            projection("q, k, v", total, self.dim, self.dim + 2 * width),
            projection("bias", total, width, self.num_kv_heads),
            elementwise("normalisation", total * (self.dim + width), flops=4),
            elementwise("choice", total * self.num_kv_heads, flops=math.log2(max(keys, 2))),
            attend("attention", total, scored, self.dim, batch * scored, batch * scored * self.num_kv_heads),
            projection("output", total, self.dim, self.dim),
        ]


def _before(bias: Tensor, start: int, stop: int) -> Tensor:
    """(B, G, N) as (B, G, stop - start, N): for each token of that part, -inf at those after it."""
    places = torch.arange(bias.shape[2], device=bias.device)
    later = places > torch.arange(start, stop, device=bias.device)[:, None]
    return bias[:, :, None].masked_fill(later, -torch.inf)


def _take(x: Tensor, chosen: Tensor) -> Tensor:
    """Of ``x`` (B, N, G, D) the tokens ``chosen`` (B, G, w) of each head, (B, w, G, D)."""
    return x.gather(1, chosen.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[3]))


def _normalised(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """``norm`` of ``x``, in the weight's dtype: under autocast ``x`` has another."""
    return norm(x.to(norm.weight.dtype))
