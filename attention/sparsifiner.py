"""Sparse attention with a learned choice of keys: a cheap low-rank estimate says which few keys each token attends.

Source: Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, CVPR
2023, arXiv 2303.13755. As in the released code the estimate's scale follows from the number of heads, and the choice is
a mask over all pairs, through which no gradient passes: the estimate learns from ``extras["reconstruction"]`` alone.
Tables of other sizes are resized linearly, which is ours, as is their initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, projection
from attention.layout import heads_first, heads_last, split_qkv, weights_of
from attention.masking import blank, key_mask
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.prefix import grid_behind
from attention.registry import register
from attention.resizing import resize
from kernels.errors import InputError


@dataclass(frozen=True)
class Connectivity:
    """Which keys each token attends, and why.

    Attributes:
        mask: (B, heads, N, N) bool, true for keys (columns) a token (row) attends.
        coefficients: (B, heads, rows, bases), shares of the bases in a token's estimate; prefix tokens have no row.
        estimate: (B, heads, rows, N), the estimated attention.
    """

    mask: Tensor
    coefficients: Tensor
    estimate: Tensor


class ConnectivityPredictor(nn.Module):
    """Estimates attention as a mixture of a few bases over the tokens.

    Args:
        head_dim: channels of a head.
        num_heads: heads.
        input_size: size of the map the bases are built for.
        prefix: tokens in front of the map.
        token_reduction: tokens per basis.
        channel_reduction: of the head's channels.
        threshold: entries of a basis that are not larger are 0.
        coefficients: how many bases a token's estimate mixes.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        input_size: Sequence[int],
        prefix: int,
        token_reduction: int,
        channel_reduction: int,
        threshold: float,
        coefficients: int,
    ) -> None:
        super().__init__()
        tokens = prefix + math.prod(input_size)
        bases, reduced = max(tokens // token_reduction, 1), max(head_dim // channel_reduction, 1)
        self.input_size, self.prefix = tuple(input_size), prefix
        self.scale, self.threshold, self.coefficients = num_heads**-0.5, threshold, min(coefficients, bases)
        self.proj_c_q = nn.Linear(head_dim, reduced)
        self.proj_c_k = nn.Linear(head_dim, reduced)
        self.proj_n = nn.Parameter(torch.randn(tokens, bases) / math.sqrt(tokens))
        self.proj_back_n = nn.Parameter(torch.randn(tokens, bases) / math.sqrt(bases))

    def forward(self, q: Tensor, k: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Coefficients and estimate of queries (B, heads, rows, D) and keys (B, heads, N, D), at least in float32.

        Masked keys must be 0 after ``proj_c_k``: see :meth:`keys`.
        """
        share = self.proj_n.shape[0] / k.shape[2]
        mixed = self._of(self.proj_n, grid).t().to(k.dtype) @ k * share
        scores = self.proj_c_q(q) @ mixed.transpose(2, 3) * self.scale
        all_shares = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        largest = all_shares.topk(self.coefficients, -1)
        shares = torch.zeros_like(all_shares).scatter(-1, largest.indices, largest.values)
        bases = self._of(self.proj_back_n, grid).abs().to(shares.dtype)
        return shares, shares @ bases.masked_fill(bases <= self.threshold, 0).t()

    def keys(self, k: Tensor, mask: Tensor | None) -> Tensor:
        """``k`` (B, *grid, heads, D) reduced, with zeros for masked tokens, as (B, heads, N, reduced D)."""
        reduced = self.proj_c_k(k)
        return heads_first(reduced if mask is None else reduced.masked_fill(~mask[..., None, None], 0))

    def _of(self, table: Tensor, grid: Sequence[int]) -> Tensor:
        """``table`` (prefix + tokens, bases) for a map of size ``grid``."""
        if tuple(grid) == self.input_size:
            return table
        front, places = table[: self.prefix], table[self.prefix :]
        resized = resize(places.t().unflatten(1, self.input_size)[None], grid)[0].flatten(1).t()
        return torch.cat([front, resized])


@register("sparsifiner", kind="mixer")
class SparsifinerAttention(Mixer):
    """Softmax attention to the keys that a low-rank estimate ranks highest for each token (Wei et al. 2023).

    ``extras["reconstruction"]`` is the mean squared distance of the estimate to the attention over all keys, from
    which the predictor learns; :meth:`connectivity` shows what it predicts.

    Args:
        dim: channels C.
        num_heads: heads.
        input_size: size of the map the predictor's bases are built for; its number of axes is that of the maps.
        keep_rate: share of the keys a token attends, rounded up; of the real ones under a mask.
        prefix: tokens in front of the map's, such as a class token, which attend all keys: the module then takes
            sequences (B, prefix + H W, C), and works out the height and width of other sizes from the proportions of
            ``input_size``.
        token_reduction: tokens per basis of the estimate.
        channel_reduction: by which the predictor's heads are narrower.
        coefficients: how many bases a token's estimate mixes.
        threshold: entries of a basis that are not larger are 0.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: a number is out of its range.
    """

    about = About("Wei et al., CVPR 2023, 2303.13755", "O(N^2)", "sdpa", "MIT", keeps_matrix=True)
    grids: tuple[int, ...] = (1, 2, 3)
    takes_choices = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: Sequence[int] = (14, 14),
        keep_rate: float = 0.25,
        prefix: int = 0,
        token_reduction: int = 6,
        channel_reduction: int = 2,
        coefficients: int = 8,
        threshold: float = 0.02,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        size = tuple(input_size)
        if len(size) not in (1, 2, 3) or min(size) < 1 or prefix < 0 or (prefix and len(size) != 2):
            raise InputError(
                f"attention 'sparsifiner': input_size={size} must be one to three sizes of at least 1, two behind "
                f"prefix={prefix} tokens."
            )
        if not 0 < keep_rate <= 1:
            raise InputError(f"attention 'sparsifiner': keep_rate={keep_rate} must be above 0 and at most 1.")
        if min(token_reduction, channel_reduction, coefficients) < 1 or threshold < 0:
            raise InputError(
                f"attention 'sparsifiner': token_reduction={token_reduction}, channel_reduction={channel_reduction} "
                f"and coefficients={coefficients} must be at least 1, and threshold={threshold} at least 0."
            )
        self.grids = (1,) if prefix else (len(size),)
        self.input_size = size
        self.keep_rate = keep_rate
        self.prefix = prefix
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.mask_predictor = ConnectivityPredictor(
            self.head_dim, num_heads, size, prefix, token_reduction, channel_reduction, threshold, coefficients
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        found = self._connect(q, k, mask)
        if extras is not None:
            extras["reconstruction"] = self._reconstruction(q, k, mask, found.estimate)
        out = self._core(q, k, v if mask is None else v.masked_fill(~mask[..., None, None], 0), found.mask)
        return self.proj_drop(self.proj(heads_last(out, x.shape[1:-1])))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        attended = self._connect(q, k, mask).mask

        def core(values: Tensor) -> Tensor:
            return self._core(q, k, values, attended).transpose(1, 2).unflatten(1, x.shape[1:-1])

        return weights_of(core, v)

    def connectivity(self, x: Tensor, mask: Tensor | None = None) -> Connectivity:
        """What the predictor says of ``x`` (B, *grid, C)."""
        self._check(x, mask)
        q, k, _ = split_qkv(self.qkv(blank(x, mask)), self.num_heads)
        return self._connect(q, k, mask)

    def _connect(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Connectivity:
        grid: tuple[int, ...] = tuple(q.shape[1:-2])
        if self.prefix:
            grid = grid_behind("sparsifiner", q.shape[1], self.prefix, self.input_size)
        predictor = self.mask_predictor
        rows = heads_first(q)[:, :, self.prefix :]
        coefficients, estimate = predictor(rows, predictor.keys(k, mask), grid)
        tokens = estimate.shape[-1]
        seen = key_mask(mask)
        ranked = estimate.detach() if seen is None else estimate.detach().masked_fill(~seen, -torch.inf)
        best = ranked.topk(_share(tokens, self.keep_rate), -1).indices
        chosen = torch.ones_like(best, dtype=torch.bool)
        if mask is not None:
            count = (mask.flatten(1).sum(1).double() * self.keep_rate).ceil().clamp_min(1)
            chosen = (torch.arange(best.shape[-1], device=q.device) < count[:, None, None, None]).expand_as(best)
        attended = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, chosen)
        attended = F.pad(attended, (0, 0, self.prefix, 0), value=True)
        return Connectivity(attended if seen is None else attended & seen, coefficients, estimate)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        """(B, heads, N, E)."""
        return F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), attn_mask=attended)

    def _reconstruction(self, q: Tensor, k: Tensor, mask: Tensor | None, estimate: Tensor) -> Tensor:
        """Mean squared distance between the estimate and the attention over all keys, between real tokens."""
        q, k = heads_first(q)[:, :, self.prefix :].detach().to(estimate.dtype), heads_first(k).detach()
        scores = q @ k.transpose(2, 3).to(estimate.dtype) * self.head_dim**-0.5
        if mask is None:
            return F.mse_loss(estimate, scores.softmax(-1))
        real = mask.flatten(1)
        pairs = real[:, None, self.prefix :, None] & real[:, None, None]
        full = scores.masked_fill(~real[:, None, None], torch.finfo(scores.dtype).min).softmax(-1)
        distance = (estimate - full).square().masked_fill(~pairs, 0).sum()
        return distance / (pairs.sum() * self.num_heads).clamp_min(1)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        tokens = math.prod(grid)
        total, heads = batch * tokens, self.num_heads
        predictor = self.mask_predictor
        bases, reduced = predictor.proj_n.shape[1], predictor.proj_c_q.out_features
        estimate = 4 * total * heads * bases * reduced + 2 * batch * heads * predictor.coefficients * tokens**2
        pairs = batch * heads * tokens**2
        return [
            projection("q, k, v", total, self.dim, 3 * self.dim),
            projection("predictor's queries and keys", 2 * total * heads, self.head_dim, reduced),
            Part("estimate and choice", estimate, 2 * total * heads * reduced + pairs),
            # The mask is over all pairs, yet only the chosen ones count as work.
            attend("attention", total, _share(tokens, self.keep_rate), self.dim, total, pairs),
            projection("output", total, self.dim, self.dim),
        ]


def _share(tokens: int, rate: float) -> int:
    """``rate`` of ``tokens``, rounded up."""
    return max(math.ceil(tokens * rate), 1)
