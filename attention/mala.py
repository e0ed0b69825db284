"""Magnitude-aware linear attention: linear attention that keeps the size of the query's features.

Source: Fan et al., Rectifying Magnitude Neglect in Linear Attention, ICCV 2025, arXiv 2507.00698; with
``form="softmax"`` the attention of the late stages of its network, with the same gate and local term. The paper rotates
on images. Here volumes have three axes of angles, and sequences none: their order is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.block_parts import ConditionalPosition, DropPath, depthwise
from attention.cost import Part, attend, elementwise, linear_attention, projection
from attention.cost import depthwise as depthwise_cost
from attention.layout import split_heads, weights_of
from attention.masking import blank, key_mask
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError, unknown_name
from kernels.linear_attention import linear_attention_2pass
from kernels.varlen_attention import varlen_attention

FORMS = ("linear", "softmax")


@register("mala", kind="mixer")
class MagnitudeAwareAttention(Mixer):
    """Linear attention aware of the query's magnitude, with rotary position and a gate (MALA, Fan et al. 2025).

    With features f, g = elu + 1 of queries and keys, f', g' the same rotated, and z_i = D^-0.5 f_i . mean g:
    ``out_i = (1 + 1 / (z_i + 1e-6)) D^-0.5 / N f'_i sum_j g'_j v_j^T - z_i mean v``. To it the convolved values are
    added; the sum is multiplied by a projection of the input. The weights sum to 1 where nothing is rotated.

    Args:
        dim: channels C.
        num_heads: heads of D channels.
        form: ``"linear"``, or ``"softmax"``: softmax attention of rotated queries and keys in its place.
        rotary: whether features are rotated by the token's place, on images and volumes. Angles per step are
            10000^-t, t evenly from 0 to 1 over the pairs of channels of an axis. The D / 2 pairs are shared out among
            the axes in their order, as evenly as possible, what is over to the last: half each to rows and columns.
        local_axes: how many of the last axes of a grid the local term's convolution reaches over, 0 to 3: with 2,
            images and the slices of volumes have it. Grids of fewer axes go without; 0 leaves it out.
        local_kernel: odd side of its kernels.
        qkv_bias: whether the projection to queries, keys, values and gate has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: a parameter is not possible, or rotated heads are not divisible by 4.
    """

    about = About("Fan et al. (MALA), ICCV 2025, 2507.00698", "O(N)", "linear_attention_2pass")
    grids = (1, 2, 3)
    rows_sum_to_one = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        form: str = "linear",
        rotary: bool = True,
        local_axes: int = 2,
        local_kernel: int = 5,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if form not in FORMS:
            raise unknown_name("attention.form", form, FORMS)
        if rotary and self.head_dim % 4:
            raise InputError(
                f"attention 'mala': heads of {self.head_dim} channels ({dim} in {num_heads} heads) cannot be rotated; "
                "take a multiple of 4, or rotary=false."
            )
        if local_axes not in (0, 1, 2, 3):
            raise InputError(f"attention 'mala': local_axes={local_axes} must be 0 (no local term), 1, 2 or 3.")
        if local_kernel < 1 or local_kernel % 2 == 0:
            raise InputError(f"attention 'mala': local_kernel={local_kernel} must be odd and at least 1, such as 5.")
        self.form = form
        self.rotary = rotary
        self.qkv_gate = nn.Linear(dim, 4 * dim, bias=qkv_bias)
        self.local_axes = local_axes
        self.lepe: nn.Conv1d | nn.Conv2d | nn.Conv3d | None = None
        if local_axes:
            convolution: type[nn.Conv1d | nn.Conv2d | nn.Conv3d] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[local_axes - 1]
            self.lepe = convolution(dim, dim, local_kernel, padding=local_kernel // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v, gate = self.qkv_gate(x).chunk(4, -1)
        grid = x.shape[1:-1]
        out = self._core(self._heads(q), self._heads(k), self._heads(v), grid, mask).flatten(2).view(x.shape)
        if self.lepe is not None and self.local_axes <= len(grid):
            out = out + depthwise(blank(v, mask), self.lepe.weight, self.lepe.bias)
        return self.proj_drop(self.proj(out * gate))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Of the attention, before local term and gate."""
        q, k, v = (self._heads(t) for t in self.qkv_gate(x).chunk(4, -1)[:3])
        return weights_of(lambda values: self._core(q, k, values, x.shape[1:-1], mask), v)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, *grid, C) as (B, N, heads, D)."""
        return split_heads(x.flatten(1, -2), self.num_heads)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], mask: Tensor | None) -> Tensor:
        """(B, N, heads, E)."""
        angles = None
        if self.rotary and len(grid) > 1:
            precise = torch.promote_types(q.dtype, torch.float32)
            angles = rotary_tables(grid, self.head_dim, q.device, precise)
        if self.form == "linear":
            weight = None if mask is None else mask.flatten(1)[..., None]
            return linear_attention_2pass(q, k, v, normaliser="mala", rotary=angles, key_weight=weight)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask(mask)).transpose(1, 2)

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        if shapes is not None or self.local_axes == 1:
            return super().packed(x, cu_seqlens, shapes)
        projected = self.qkv_gate(x).chunk(4, -1)
        q, k, v = (split_heads(t, self.num_heads) for t in projected[:3])
        if self.form == "linear":
            out = linear_attention_2pass(q, k, v, normaliser="mala", cu_seqlens=cu_seqlens)
        else:
            out, _ = varlen_attention(q, k, v, cu_seqlens, cu_seqlens)
        return self.proj_drop(self.proj(out.flatten(1) * projected[3]))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        tokens = batch * math.prod(grid)
        parts = [projection("q, k, v, gate", tokens, self.dim, 4 * self.dim)]
        if self.form == "linear":
            parts.append(linear_attention("attention", tokens, self.dim, self.head_dim))
        else:
            parts.append(attend("attention", tokens, math.prod(grid), self.dim, tokens))
        if self.lepe is not None and self.local_axes <= len(grid):
            parts.append(depthwise_cost("local term", tokens, self.dim, math.prod(self.lepe.kernel_size)))
        gate = elementwise("gate", tokens * self.dim, 3)
        return [*parts, gate, projection("output", tokens, self.dim, self.dim)]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, whose projections are 1 x 1 convolutions."""
        renamed = {key.replace("qkvo.", "qkv_gate."): value for key, value in state.items()}
        return {key: value if key.startswith("lepe.") else _as_linear(value) for key, value in renamed.items()}


def rotary_tables(
    grid: Sequence[int], head_dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, D / 2) of the angles of each token of a grid; see :class:`MagnitudeAwareAttention`."""
    pairs = head_dim // 2
    bounds = [pairs * axis // len(grid) for axis in range(len(grid) + 1)]
    angles = []
    for axis, length in enumerate(grid):
        steps = 10000 ** -torch.linspace(0, 1, bounds[axis + 1] - bounds[axis], device=device, dtype=dtype)
        along = torch.arange(length, device=device, dtype=dtype)[:, None] * steps
        others = [1] * len(grid)
        others[axis] = length
        angles.append(along.view(*others, len(steps)).expand(*grid, len(steps)))
    table = torch.cat(angles, -1).flatten(0, -2)
    return table.cos(), table.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (B, N, heads, D) with channels 2m and 2m + 1 rotated by the angle m of the token, in its dtype."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class MagnitudeAwareBlock(nn.Module):
    """MALA's block: position, attention and a convolving MLP, each added to the map.

    Args:
        dim: channels C.
        num_heads: heads.
        form: of the attention, ``"linear"`` in early stages and ``"softmax"`` in late ones.
        hidden_dim: of the MLP; 3.5 times ``dim`` by default.
        layer_scale: first value of the learned factors of attention and MLP, None for none.
        drop_path: probability of leaving out a branch of an item while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        form: str = "linear",
        hidden_dim: int | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pos = ConditionalPosition(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MagnitudeAwareAttention(dim, num_heads, form)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvolvingMlp(dim, int(3.5 * dim) if hidden_dim is None else hidden_dim)
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, W, C) to the same; ``mask`` (B, H, W) is true for real tokens, the others come out as 0."""
        x = self.pos(x, mask)
        mixed = self.attn(self.norm1(x), mask)
        x = x + self.drop_path(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        hidden = self.ffn(self.norm2(x), mask)
        return blank(x + self.drop_path(hidden if self.gamma_2 is None else self.gamma_2 * hidden), mask)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, whose projections are 1 x 1 convolutions and whose norms are wrapped."""
        renamed = {}
        for key, value in state.items():
            name = key.replace(".norm.", ".").replace(".qkvo.", ".qkv_gate.")
            if name.startswith("pos."):
                name = f"pos.proj.{name.removeprefix('pos.')}"
            renamed[name] = value.flatten() if name.startswith("gamma") else _as_linear(value)
        return renamed


def _as_linear(value: Tensor) -> Tensor:
    """The weight of a 1 x 1 convolution as that of a linear layer; others as they are."""
    return value.flatten(1) if value.dim() == 4 and value.shape[2:] == (1, 1) else value


class ConvolvingMlp(nn.Module):
    """Two linear layers; after the GELU between them, a 3 x 3 depthwise convolution is added."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = blank(F.gelu(self.fc1(x)), mask)
        return self.fc2(hidden + depthwise(hidden, self.dwconv.weight, self.dwconv.bias))
