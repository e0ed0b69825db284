"""Kolmogorov-Arnold attention: a learned function of all scores of a token instead of the softmax.

Source: Maity et al., Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?, arXiv
2503.10632, in its form with a Fourier basis; written from the paper, whose code was not at hand. The paper's functions
belong to one number of tokens: here those of other sizes are resized linearly and divided by the growth of the number
of tokens, over which they are summed, which is ours. So is the initialisation, of which the paper says nothing: it
gives outputs of the size of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, projection
from attention.layout import heads_first, heads_last, split_qkv, weights_of
from attention.masking import key_mask
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from attention.resizing import resize
from kernels.errors import InputError
from kernels.operators import precisely


class FourierOperators(nn.Module):
    """For each head the function from a row of scores to a row of weights: r sums of G harmonics each, then a matrix.

    Args:
        num_heads: heads h.
        input_size: size of the map whose tokens the functions are for.
        rank: r.
        harmonics: G.
    """

    def __init__(self, num_heads: int, input_size: Sequence[int], rank: int, harmonics: int) -> None:
        super().__init__()
        self.input_size = tuple(input_size)
        tokens = math.prod(self.input_size)
        self.a = nn.Parameter(torch.randn(num_heads, rank, tokens, harmonics) / math.sqrt(tokens * harmonics))
        self.b = nn.Parameter(torch.randn(num_heads, rank, tokens, harmonics) / math.sqrt(tokens * harmonics))
        self.W = nn.Parameter(torch.randn(num_heads, tokens, rank) / math.sqrt(tokens * rank))

    def resized(self, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine and sine coefficients (heads, r, N, G) and the matrix (heads, N, r) for a map of size ``grid``."""
        if tuple(grid) == self.input_size:
            return self.a, self.b, self.W
        return self._resize(self.a, grid), self._resize(self.b, grid), self._resize(self.W[:, None], grid)[:, 0]

    def _resize(self, table: Tensor, grid: Sequence[int]) -> Tensor:
        """``table`` (heads, r, tokens, G) for another number of tokens."""
        maps = table.transpose(2, 3).flatten(0, 2).unflatten(1, self.input_size)[None]
        share = math.prod(self.input_size) / math.prod(grid)
        resized = resize(maps, grid)[0].flatten(1) * share
        return resized.unflatten(0, (table.shape[0], table.shape[1], -1)).transpose(2, 3)


@register("karat", kind="mixer")
class KolmogorovArnoldAttention(Mixer):
    """Kolmogorov-Arnold attention: weights are learned Fourier series of the scores (Maity et al. 2025).

    The functions of a head are in ``operators``; blocks that share them, the paper's universal form, take those of the
    first by :meth:`share_operators`, and keep their own in its blockwise form.

    Args:
        dim: channels C.
        num_heads: heads.
        input_size: size of the map the functions are for; its number of axes is that of the maps.
        rank: r, the width between the two steps.
        harmonics: G, the number of frequencies.
        simplex: whether the weights of each token are projected onto the simplex, after which they are positive and sum
            to 1; the paper finds it harmful.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: a size, the rank or the number of harmonics is less than 1.
    """

    about = About("Maity et al., 2025, 2503.10632", "O(N^2 r G)", keeps_matrix=True)
    grids: tuple[int, ...] = (1, 2, 3)
    rows_sum_to_one = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: Sequence[int] = (14, 14),
        rank: int = 12,
        harmonics: int = 3,
        simplex: bool = False,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        size = tuple(input_size)
        if len(size) not in (1, 2, 3) or min(size) < 1 or rank < 1 or harmonics < 1:
            raise InputError(
                f"attention 'karat': input_size={size} must be one to three sizes, and these, rank={rank} and "
                f"harmonics={harmonics} at least 1."
            )
        self.grids = (len(size),)
        self.rows_sum_to_one = simplex
        self.simplex = simplex
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.operators = FourierOperators(num_heads, size, rank, harmonics)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def share_operators(self, other: KolmogorovArnoldAttention) -> None:
        """Use the functions of ``other`` from now on.

        Raises:
            InputError: they are for another number of heads.
        """
        if other.num_heads != self.num_heads:
            raise InputError(
                f"attention 'karat': functions of {other.num_heads} heads cannot be shared with {self.num_heads}."
            )
        self.operators = other.operators

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        out = self._core(q, k, v, mask).to(v.dtype)
        return self.proj_drop(self.proj(heads_last(out, x.shape[1:-1])))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)

        def core(values: Tensor) -> Tensor:
            return self._core(q, k, values, mask).transpose(1, 2).unflatten(1, x.shape[1:-1])

        return weights_of(core, v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, N, E), at least in float32: series of large arguments need the digits."""
        wide = torch.promote_types(v.dtype, torch.float32)
        grid = v.shape[1:-2]
        with precisely(v):
            cosines, sines, back = (table.to(wide) for table in self.operators.resized(grid))
            if mask is not None:
                v = v.masked_fill(~mask[..., None, None], 0)
            values = heads_first(v).to(wide)
            scores = (heads_first(q).to(wide) * self.head_dim**-0.5) @ heads_first(k).to(wide).transpose(2, 3)
            seen = None if mask is None else mask.flatten(1)[:, None, None, :, None]
            cosines, sines = (t[None] if seen is None else t.masked_fill(~seen, 0) for t in (cosines, sines))
            features = _FourierSums.apply(scores, cosines, sines)
            if not self.simplex:
                return features @ (back.transpose(1, 2) @ values)
            return project_to_simplex(features @ back.transpose(1, 2), key_mask(mask)) @ values

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        tokens = math.prod(grid)
        total = batch * tokens
        _, rank, _, harmonics = self.operators.a.shape
        pairs = batch * self.num_heads * tokens**2
        tables = self.num_heads * rank * tokens * (2 * harmonics + 1)
        return [
            projection("q, k, v", total, self.dim, 3 * self.dim),
            Part("scores and series", pairs * (2 * self.head_dim + harmonics * (4 * rank + 6)), 2 * total * self.dim),
            Part("values", 4 * total * self.dim * rank, 2 * total * self.dim + tables),
            projection("output", total, self.dim, self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State in the paper's letters, with the functions under ``operators``."""
        return {f"operators.{key}" if key in ("a", "b", "W") else key: value for key, value in state.items()}


def project_to_simplex(x: Tensor, seen: Tensor | None = None) -> Tensor:
    """The nearest point of the simplex to each row of ``x`` (..., N); entries that are not ``seen`` become 0."""
    if seen is not None:
        # Far below the others, yet not so far that the sum of all overflows.
        x = x.masked_fill(~seen, torch.finfo(x.dtype).min / (2 * x.shape[-1]))
    ordered = x.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    kept = (ordered * count > excess).sum(-1, keepdim=True).clamp_min(1)
    return F.relu(x - excess.gather(-1, kept - 1) / kept)


class _FourierSums(torch.autograd.Function):
    """Sums over the keys of cos(m score) and sin(m score) times their coefficients, one frequency after the other.

    The backward pass computes the harmonics again, so that no more than the scores is kept, whatever their number.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """(B, h, N, r) of scores (B, h, N, M) and coefficients (B or 1, h, r, M, G)."""
        ctx.save_for_backward(scores, cosines, sines)
        first = cos, sin = scores.cos(), scores.sin()
        total = cos @ cosines[..., 0].transpose(-2, -1) + sin @ sines[..., 0].transpose(-2, -1)
        for m in range(1, cosines.shape[-1]):
            cos, sin = _next(cos, sin, *first)
            total = total + cos @ cosines[..., m].transpose(-2, -1) + sin @ sines[..., m].transpose(-2, -1)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, cosines, sines = ctx.saved_tensors
        first = cos, sin = scores.cos(), scores.sin()
        grad_scores = torch.zeros_like(scores)
        grad_cosines, grad_sines = [], []
        for m in range(cosines.shape[-1]):
            if m:
                cos, sin = _next(cos, sin, *first)
            grad_scores = grad_scores + (m + 1) * (cos * (grad @ sines[..., m]) - sin * (grad @ cosines[..., m]))
            grad_cosines.append((grad.transpose(-2, -1) @ cos).sum_to_size(cosines.shape[:-1]))
            grad_sines.append((grad.transpose(-2, -1) @ sin).sum_to_size(sines.shape[:-1]))
        return grad_scores, torch.stack(grad_cosines, -1), torch.stack(grad_sines, -1)


def _next(cos: Tensor, sin: Tensor, first_cos: Tensor, first_sin: Tensor) -> tuple[Tensor, Tensor]:
    """The next harmonic, by the theorem of addition."""
    return cos * first_cos - sin * first_sin, sin * first_cos + cos * first_sin
