"""Softmax attention within windows of neighbouring tokens, with relative position bias and cyclic shift.

Source: Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030. With ``relative_bias=False, padding="released"`` this
is the spatial window attention of DaViT (Ding et al., ECCV 2022, arXiv 2204.03645).
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
from kernels.errors import InputError, unknown_name
from kernels.window_attention import relative_position_bias, window_attention

PADDINGS = ("hide", "released")


def two_sides(name: str, parameter: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one number for both or one for each, for the module called ``name``.

    Raises:
        InputError: it is neither, or below 1.
    """
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise InputError(
            f"attention '{name}': {parameter}={value} must be at least 1, one whole number or (height, width)."
        )
    return sides[0], sides[1]


def weights_on_map(weights: Tensor, extended: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Of weights between the tokens of a map that was extended at its ends, those (B, heads, N, N) of ``grid``."""
    if extended == grid:
        return weights
    inner = (..., *(slice(n) for n in grid))
    rows = weights.transpose(2, 3).unflatten(3, extended)[inner].flatten(3)
    return rows.transpose(2, 3).unflatten(3, extended)[inner].flatten(3)


@register("window", kind="mixer")
class WindowAttention(Mixer):
    """Window attention with relative position bias and cyclic shift (Swin, Liu et al. 2021).

    Windows at the bottom and the right of a map that they do not divide stick out of it.

    Args:
        dim: channels C.
        num_heads: heads.
        window_size: side of a window, or (height, width); P is the number of its tokens.
        shift: rows and columns by which the windows are moved: ``"alternate"`` moves those of every other block of a
            stage by half a window, as Swin does. Where one window covers an axis there is no shift.
        relative_bias: whether scores have a learned bias by offset.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        padding: ``"hide"``: what sticks out is not seen. ``"released"``: the map is extended with zeros before the
            projection and they are seen, as in the released code of Swin for detection and of DaViT.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the window or the shift is not possible.
    """

    about = About("Liu et al. (Swin), ICCV 2021, 2103.14030", "O(N P)", "window_attention", "MIT")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift: int | str = "alternate",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        padding: str = "hide",
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        h, w = two_sides(self.name, "window_size", window_size)
        if padding not in PADDINGS:
            raise unknown_name(f"attention '{self.name}': padding", padding, PADDINGS)
        offset = 0 if shift == "alternate" else shift
        if not isinstance(offset, int) or not 0 <= offset < min(h, w):
            raise InputError(
                f"attention '{self.name}': shift={shift} must be 'alternate' or from 0 to {min(h, w) - 1}, less than "
                "the window's side."
            )
        self.window_size = (h, w)
        self.shift = offset
        self.padding = padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative_bias:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    @classmethod
    def for_block(cls, params: Mapping[str, Any], index: int) -> dict[str, Any]:
        chosen = dict(params)
        if chosen.get("shift") == "alternate":
            size = chosen.get("window_size", 7)
            side = size if isinstance(size, int) else min(size)
            chosen["shift"] = side // 2 if index % 2 else 0
        return chosen

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = self._qkv(x, mask)
        out = self._core(q, k, v)[:, : x.shape[1], : x.shape[2]]
        return self.proj_drop(self.proj(out.flatten(-2)))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._qkv(x, mask)
        seen = weights_of(lambda values: self._core(q, k, values), v)
        return weights_on_map(seen, tuple(q.shape[1:3]), tuple(x.shape[1:3]))

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Views (B, H, W, heads, D) of the projection, of the extended map where zeros outside it are seen."""
        if self.padding == "released":
            below, right = (-n % w for n, w in zip(x.shape[1:3], self.window_size, strict=True))
            x = F.pad(x, (0, 0, 0, right, 0, below))
            mask = None if mask is None else F.pad(mask, (0, right, 0, below), value=True)
        q, k, v = self._split(blank(self.qkv(x), mask))
        q, k = hide_keys(q, k, mask, self.head_dim**-0.5)
        return q, k, v

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (B, H, W, heads, D) of the fused projection."""
        return split_qkv(qkv, self.num_heads)

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = self.relative_position_bias_table
        shift = tuple(0 if n <= w else self.shift for n, w in zip(q.shape[1:3], self.window_size, strict=True))
        out = window_attention(
            q,
            k,
            v,
            self.window_size,
            shift=(shift[0], shift[1]),
            bias=None if table is None else relative_position_bias(table, self.window_size),
            scale=self.head_dim**-0.5,
            padding="hide",
        )
        assert isinstance(out, Tensor)
        return out

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens = math.prod(shape)
        seen = math.prod(self.window_size)
        bias = 0 if self.relative_position_bias_table is None else self.num_heads * seen**2
        return [
            projection("q, k, v", tokens, self.dim, 3 * self.dim),
            attend("attention", tokens, seen, self.dim, tokens, bias),
            projection("output", tokens, self.dim, self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state without the tables that follow from the window's size."""
        return {key: value for key, value in state.items() if key != "relative_position_index"}
