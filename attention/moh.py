"""Mixture-of-head attention: every token weighs the heads, some always on, of the others only the best for it.

Source: Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, in its vision form, whose
attention is that of TransNeXt (Shi, CVPR 2024, arXiv 2311.17132): cosine scores with a learned temperature that grows
with the logarithm of the number of keys, a query embedding, and a bias by log-spaced offsets. As in the released code
all heads are computed and those that are off are multiplied by 0. Unlike there, the number of keys is that of the map
at hand, which is the same at the trained size; sequences and volumes, of which the paper does not speak, differ in the
number of coordinates alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.continuous_bias import relative_coordinates, spread_bias
from attention.cost import Part, attend, elementwise, projection
from attention.layout import (
    heads_first,
    heads_last,
    split_heads,
    split_qkv,
    to_channels_first,
    to_channels_last,
    weights_of,
)
from attention.masked_mean import adaptive_mean
from attention.masking import blank, key_mask
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.dynamic_conv import neighborhood_av, neighborhood_qk
from kernels.errors import InputError, unknown_name

FORMS = ("full", "aggregated")
_HIDDEN = 512  # width of the network that makes the bias
_START = math.log(math.exp(1 / 0.24) - 1)  # a temperature whose softplus is 1 / 0.24


@register("moh", kind="mixer")
class MixtureOfHeadAttention(Mixer):
    """Mixture-of-head attention: gates by token over shared and routed heads (Jin et al. 2024).

    ``extras["load_balance"]`` is the loss that keeps routed heads in equal use; the paper adds 0.01 times its mean over
    the layers. The weights that are returned are those of each head before its gate.

    Args:
        dim: channels C.
        num_heads: heads, shared ones first.
        input_size: size of the map whose offsets the bias is scaled by; its number of axes is that of the maps.
        shared_heads: heads that are always on; a quarter of all by default.
        routed_heads: how many of the others are on for a token; half of all by default, which with the shared ones
            makes the paper's three quarters. If all heads are shared, 0.
        form: ``"full"``: every token sees every other. ``"aggregated"``: it sees its neighbours and the cells of a
            pooled map under one softmax, as in early stages; for images, and without weights between tokens.
        window_size: side of the neighbourhood of the aggregated form, an odd number.
        sr_ratio: side of the cells the aggregated form pools.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the heads cannot be shared and routed in these numbers, or a choice is not known.
    """

    about = About("Jin et al., 2024, 2410.11842", "O(N^2)", "sdpa", "Apache-2.0", keeps_matrix=True)
    grids: tuple[int, ...] = (1, 2, 3)
    takes_choices = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: Sequence[int] = (14, 14),
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        form: str = "full",
        window_size: int = 3,
        sr_ratio: int = 8,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        shared = max(num_heads // 4, 1) if shared_heads is None else shared_heads
        others = num_heads - shared
        routed = min(max(num_heads // 2, 1), others) if routed_heads is None else routed_heads
        if not 0 <= shared <= num_heads or not (1 <= routed <= others or routed == others == 0):
            raise InputError(
                f"attention 'moh': shared_heads={shared_heads} and routed_heads={routed_heads} are not possible with "
                f"num_heads={num_heads}; at most all are shared, and of the others at least 1 is routed."
            )
        if form not in FORMS:
            raise unknown_name("attention.form", form, FORMS)
        size = tuple(input_size)
        axes = len(size)
        if axes not in (1, 2, 3) or min(size) < 1 or (form == "aggregated" and axes != 2):
            raise InputError(
                f"attention 'moh': input_size={size} must be one to three sizes of at least 1, two for the form "
                "'aggregated'."
            )
        if window_size < 1 or window_size % 2 == 0 or sr_ratio < 1:
            raise InputError(
                f"attention 'moh': window_size={window_size} must be odd and positive, and sr_ratio={sr_ratio} at "
                "least 1."
            )
        self.grids = (axes,)
        self.has_weights = form == "full"
        self.input_size = size
        self.form = form
        self.shared_heads, self.routed_heads = shared, routed
        self.window_size, self.sr_ratio = window_size, sr_ratio
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), _START))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.cpb_fc1 = nn.Linear(axes, _HIDDEN)
        self.cpb_fc2 = nn.Linear(_HIDDEN, num_heads)
        if form == "full":
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            self.sr = nn.Conv2d(dim, dim, 1)
            self.norm = nn.LayerNorm(dim)
            taps = window_size**2
            self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, taps))
            self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, taps))
            self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, taps))
            nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.02)
            nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        if shared and others:
            self.wg_0 = nn.Linear(dim, 2, bias=False)
        if shared > 1:
            self.wg_1 = nn.Linear(dim, shared, bias=False)
        if others:
            self.wg = nn.Linear(dim, others, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        if self.form == "full":
            q, k, v = split_qkv(blank(self.qkv(x), mask), self.num_heads)
            out = split_heads(heads_last(self._full(q, k, v, mask), x.shape[1:-1]), self.num_heads)
        else:
            out = self._aggregated(x, mask)
        gates = self.gates(x, mask, extras)
        return self.proj_drop(self.proj((out * gates[..., None].to(out.dtype)).flatten(-2)))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_qkv(blank(self.qkv(x), mask), self.num_heads)

        def core(values: Tensor) -> Tensor:
            return self._full(q, k, values, mask).transpose(1, 2).unflatten(1, x.shape[1:-1])

        return weights_of(core, v)

    def gates(self, x: Tensor, mask: Tensor | None = None, extras: dict[str, Tensor] | None = None) -> Tensor:
        """What each head's output is multiplied by, (B, *grid, heads); 0 for routed heads that are off."""
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = []
        if self.shared_heads > 1:
            parts.append(self.shared_heads * self.wg_1(x).to(wide).softmax(-1))
        elif self.shared_heads:
            parts.append(torch.ones(*x.shape[:-1], 1, dtype=wide, device=x.device))
        if self.routed_heads:
            scores = self.wg(x).to(wide).softmax(-1)
            on = torch.zeros_like(scores).scatter(-1, scores.topk(self.routed_heads, -1).indices, 1.0)
            kept = scores * on
            parts.append(self.routed_heads * kept / kept.sum(-1, keepdim=True))
            if extras is not None:
                extras["load_balance"] = _load_balance(scores, on, mask)
        if len(parts) == 2:
            shares = 2 * self.wg_0(x).to(wide).softmax(-1)
            parts = [part * share for part, share in zip(parts, shares.split(1, -1), strict=True)]
        return torch.cat(parts, -1)

    def bias(self, size: Sequence[int], keys: Sequence[int]) -> Tensor:
        """(heads, N, N of keys), by offset, between a map of ``size`` and the cells it is pooled to."""
        weight = self.cpb_fc1.weight
        table, offsets, indices = relative_coordinates(size, keys, self.input_size, weight.device)
        return spread_bias(self.cpb_fc2(F.relu(self.cpb_fc1(table.to(weight.dtype)))), offsets, indices)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, N, E)."""
        grid = q.shape[1:-2]
        tokens = torch.full((1,), grid.numel(), device=q.device) if mask is None else mask.flatten(1).sum(1)
        q = heads_first(self._scaled(_unit(q), tokens.view(-1, *[1] * len(grid))).to(v.dtype))
        bias = self.bias(grid, grid)[None].to(v.dtype)
        seen = key_mask(mask)
        if seen is not None:
            bias = bias.masked_fill(~seen, -torch.inf)
        keys = heads_first(_unit(k).to(v.dtype))
        return F.scaled_dot_product_attention(q, keys, heads_first(v), attn_mask=bias, scale=1.0)

    def _scaled(self, q: Tensor, keys: Tensor) -> Tensor:
        """Queries of unit length (B, *grid, heads, D) for as many ``keys``, (B, *grid) or broadcastable."""
        shift = self.query_embedding[:, 0].to(q.dtype)
        heat = F.softplus(self.temperature[:, :, 0].to(q.dtype))
        return (q + shift) * heat * keys.clamp_min(1).to(q.dtype).log()[..., None, None]

    def _aggregated(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, W, heads, D): the neighbours of each token and the cells of a pooled map, under one softmax."""
        grid = tuple(x.shape[1:-1])
        cells = [max(side // self.sr_ratio, 1) for side in grid]
        reduced = blank(F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias)), mask)
        pooled, seen = adaptive_mean(to_channels_first(reduced), mask, cells)
        pooled = blank(self.kv(self.norm(to_channels_last(pooled))), seen)
        far_k, far_v = split_heads(pooled, 2 * self.num_heads).chunk(2, -2)
        near_k, near_v = split_heads(blank(self.kv(x), mask), 2 * self.num_heads).chunk(2, -2)
        unit = _unit(split_heads(self.q(x), self.num_heads))
        inside = self._inside(x, mask)
        count = inside.sum(-1) + (math.prod(cells) if seen is None else seen.sum((1, 2))[:, None, None])
        q = self._scaled(unit, count)
        near = neighborhood_qk(
            q.to(x.dtype), _unit(near_k).to(x.dtype), self.window_size, scale=1.0, padding="zero", heads_first=False
        )
        near = (near + self.relative_pos_bias_local).to(q.dtype)
        near = near.masked_fill(~inside[..., None, :], -torch.inf)
        far = heads_first(q) @ heads_first(_unit(far_k)).transpose(2, 3) + self.bias(grid, cells).to(q.dtype)
        allowed = key_mask(seen)
        if allowed is not None:
            far = far.masked_fill(~allowed, -torch.inf)
        scores = torch.cat([near, far.transpose(1, 2).unflatten(1, grid)], -1).softmax(-1)
        near, far = scores.split([self.window_size**2, math.prod(cells)], -1)
        tokens = self.learnable_tokens.to(q.dtype)
        near = near + torch.einsum("...hd,hdp->...hp", unit, tokens) + self.learnable_bias[:, 0]
        near_out = neighborhood_av(near.to(near_v.dtype), near_v, self.window_size, padding="zero", heads_first=False)
        far_out = heads_first(far.to(far_v.dtype)) @ heads_first(far_v)
        return near_out + split_heads(heads_last(far_out, grid), self.num_heads)

    def _inside(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Which neighbours of each token are real, (B or 1, H, W, taps)."""
        real = torch.ones(1, *x.shape[1:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        edge = self.window_size // 2
        windows = F.pad(real, [edge] * 4).unfold(1, self.window_size, 1).unfold(2, self.window_size, 1)
        return windows.flatten(3)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        tokens = math.prod(grid)
        total = batch * tokens
        gates = elementwise("gates", total * self.dim, tensors=1, flops=2 * (self.num_heads + 2))
        ends = [projection("output", total, self.dim, self.dim), gates]
        if self.form == "full":
            bias = self.num_heads * tokens**2
            core = attend("attention", total, tokens, self.dim, total, bias)
            return [projection("q, k, v", total, self.dim, 3 * self.dim), core, *ends]
        cells = math.prod(max(side // self.sr_ratio, 1) for side in grid)
        seen = self.window_size**2 + cells
        return [
            projection("q, k, v", total, self.dim, 3 * self.dim),
            projection("reduction", total, self.dim, self.dim),
            projection("pooled keys and values", batch * cells, self.dim, 2 * self.dim),
            attend("attention", total, seen, self.dim, total + batch * cells, self.num_heads * tokens * cells),
            *ends,
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state without the buffers that follow from the sizes."""
        buffers = ("relative_pos_index", "relative_coords_table", "seq_length_scale", "padding_mask")
        return {key: value for key, value in state.items() if not key.startswith(buffers)}


def _unit(x: Tensor) -> Tensor:
    """``x`` with vectors of unit length, at least in float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _load_balance(scores: Tensor, on: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the routed heads of their mean score times the share of tokens they are on for, times heads squared."""
    axes = list(range(scores.dim() - 1))
    if mask is None:
        score, share = scores.mean(axes), on.mean(axes)
    else:
        count = mask.sum().clamp_min(1)
        score, share = (blank(part, mask).sum(axes) / count for part in (scores, on))
    return (score * share).mean() * scores.shape[-1] ** 2
