"""Softmax attention of every token to the window of tokens around it, on sequences, images and volumes.

Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143; with dilation: Hassani and Shi,
Dilated Neighborhood Attention Transformer, 2022, arXiv 2209.15001; with stride: Hassani et al., Generalized
Neighborhood Attention, 2025, arXiv 2504.16922. At an edge of the map a window is shifted inwards, so that every token
sees as many. Parameter names are those of the released models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, projection
from attention.layout import split_qkv, weights_of
from attention.masking import blank, hide_keys
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from attention.window import weights_on_map
from kernels.errors import InputError, unknown_name
from kernels.neighborhood_attention import fit_window, neighborhood_attention

SMALL_MAPS = ("pad", "clamp", "error")


@register("neighborhood", kind="mixer")
class NeighborhoodAttention(Mixer):
    """Neighbourhood attention, dilated and strided where wanted (NAT, DiNAT, GNA, Hassani et al. 2022-2025).

    Windows follow the edges of the map, not those of the mask: masked tokens within a window are left out of it, and
    the window does not move. Maps of several sizes that must be as if alone go through :meth:`packed`.

    Args:
        dim: channels C; heads of the papers are 32 wide.
        num_heads: heads.
        kernel_size: tokens of a window on each axis, at least 2, one number or one per axis; P is their product. Even
            ones reach one further towards the start.
        dilation: distance between neighbouring tokens of a window, one number or one per axis. In the settings of a
            stage a list gives one for each block in turn, as in DiNAT.
        stride: this many neighbouring tokens share the window of one of them, from 1 to ``kernel_size``, which makes
            blocks.
        causal: whether a window ends at its own token, one value or one per axis; without relative bias alone.
        axes: of the maps, 1 to 3: the bias has as many.
        relative_bias: whether scores have a learned bias by offset, counted in steps of the dilation.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        small_maps: what happens on an axis shorter than ``kernel_size * dilation``. ``"pad"``: zeros are put behind the
            map before the projection, and are seen, as the released models were trained. ``"clamp"``: a smaller
            dilation, then a smaller window with the middle of the bias. ``"error"``: the map is refused.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the window is not possible, or options exclude each other.
    """

    about = About("Hassani et al. (NAT), CVPR 2023, 2204.07143", "O(N P)", "neighborhood_attention", "MIT")
    grids: tuple[int, ...] = (1, 2, 3)
    rows_sum_to_one = False  # zeros behind a small map take weight

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        axes: int = 2,
        relative_bias: bool = True,
        qkv_bias: bool = True,
        small_maps: str = "pad",
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if axes not in (1, 2, 3):
            raise InputError(f"attention 'neighborhood': axes={axes} must be 1, 2 or 3.")
        if small_maps not in SMALL_MAPS:
            raise unknown_name("attention 'neighborhood': small_maps", small_maps, SMALL_MAPS)
        self.grids = (axes,)
        self.kernel_size = _per_axis("kernel_size", kernel_size, axes, 2)
        self.dilation = _per_axis("dilation", dilation, axes, 1)
        self.stride = _per_axis("stride", stride, axes, 1)
        self.causal = tuple(map(bool, _per_axis("causal", causal, axes, 0)))
        if any(s > k for s, k in zip(self.stride, self.kernel_size, strict=True)):
            raise InputError(
                f"attention 'neighborhood': stride={self.stride} must be at most kernel_size={self.kernel_size}."
            )
        if relative_bias and any(self.causal):
            raise InputError("attention 'neighborhood': causal windows have no relative bias; set relative_bias=False.")
        self.small_maps = small_maps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpb: nn.Parameter | None = None
        if relative_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    @classmethod
    def for_block(cls, params: Mapping[str, Any], index: int) -> dict[str, Any]:
        chosen = dict(params)
        dilations = chosen.get("dilation")
        if isinstance(dilations, Sequence):
            chosen["dilation"] = dilations[index % len(dilations)]
        return chosen

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = self._qkv(x, mask)
        out = self._core(q, k, v)
        for axis, length in enumerate(x.shape[1:-1], 1):
            out = out.narrow(axis, 0, length)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._qkv(x, mask)
        seen = weights_of(lambda values: self._core(q, k, values), v)
        return weights_on_map(seen, tuple(q.shape[1:-2]), tuple(x.shape[1:-1]))

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Views (B, *grid, heads, D) of the projection, of the extended map where the policy extends it."""
        if self.small_maps == "pad":
            behind = fit_window(x.shape[1:-1], self.kernel_size, self.dilation, "pad").padding
            if any(behind):
                ends = [end for length in reversed(behind) for end in (0, length)]
                x = F.pad(x, (0, 0, *ends))
                mask = None if mask is None else F.pad(mask, ends, value=True)
        q, k, v = split_qkv(blank(self.qkv(x), mask), self.num_heads)
        q, k = hide_keys(q, k, mask, self.head_dim**-0.5)
        return q, k, v

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = tuple(q.shape[1:-2])
        rpb: Tensor | None = self.rpb
        kernel, dilation = self.kernel_size, self.dilation
        if self.small_maps == "clamp":
            dilation = tuple(max(1, min(d, n // k)) for n, k, d in zip(grid, kernel, dilation, strict=True))
            kernel = tuple(min(n, k) for n, k in zip(grid, kernel, strict=True))
        elif self.small_maps == "error":
            fit_window(grid, kernel, dilation, "error")
        if rpb is not None:
            for axis, (whole, part) in enumerate(zip(self.kernel_size, kernel, strict=True), 1):
                rpb = rpb.narrow(axis, whole - part, 2 * part - 1)
        # The operator's windows have two tokens at least; where one is all there is, the axis is left out.
        kept = [axis for axis, size in enumerate(kernel) if size > 1]
        if not kept:
            return v
        lengths = [grid[axis] for axis in kept]
        q, k, v = (t.reshape(t.shape[0], *lengths, *t.shape[-2:]) for t in (q, k, v))
        out = neighborhood_attention(
            q,
            k,
            v,
            [kernel[axis] for axis in kept],
            stride=[min(self.stride[axis], kernel[axis]) for axis in kept],
            dilation=[dilation[axis] for axis in kept],
            is_causal=[self.causal[axis] for axis in kept],
            rpb=None if rpb is None else rpb.reshape(len(rpb), *(2 * kernel[axis] - 1 for axis in kept)),
            scale=self.head_dim**-0.5,
        )
        return out.reshape(out.shape[0], *grid, *out.shape[-2:])

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens = math.prod(shape)
        bias = 0 if self.rpb is None else self.rpb.numel()
        return [
            projection("q, k, v", tokens, self.dim, 3 * self.dim),
            attend("attention", tokens, math.prod(self.kernel_size), self.dim, tokens, bias),
            projection("output", tokens, self.dim, self.dim),
        ]


def _per_axis(name: str, value: int | Sequence[int], axes: int, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or not all(isinstance(v, int) and v >= least for v in values):
        raise InputError(
            f"attention 'neighborhood': {name}={value} must be one value, or one for each of the {axes} axes"
            + (f", of at least {least}." if least else ".")
        )
    return values
