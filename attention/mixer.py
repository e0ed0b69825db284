"""What every mixer takes and returns: a map of tokens in, a map of the same shape out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attention.base import AttentionModule, head_width
from attention.masking import blank
from kernels.errors import InputError


class Mixer(AttentionModule):
    """Base of the mixers: token maps (B, *grid, C) in and out, of any size at least 1 on each axis.

    A subclass sets ``about`` and ``grids``, and implements :meth:`mix` and :meth:`cost`; :meth:`weights` where it has
    weights between tokens. An instance may narrow ``grids``, ``rows_sum_to_one`` and ``has_weights``. Its constructor
    takes ``dim`` and ``num_heads`` first. Tables that depend on the size of the map are built for an ``input_size`` and
    resized to others.
    """

    grids: tuple[int, ...] = (2,)
    """How many axes a grid may have: 1 for sequences, 2 for images, 3 for volumes."""
    rows_sum_to_one: bool = True
    """Whether a token's weights sum to 1, everywhere and whatever the parameters."""
    has_weights: bool = True
    takes_half: ClassVar[bool] = True
    """Whether bfloat16 and float16 are accepted."""
    takes_choices: ClassVar[bool] = False
    """Whether it selects or rounds, so that a small change of the input may change the output at once."""
    exact_gradient: ClassVar[bool] = True
    """Whether the gradient is that of the function computed; a straight-through estimator's is not."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_width(self.name, dim, num_heads)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_attention: bool = False,
        extras: dict[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens of ``x``.

        Args:
            x: (B, *grid, C).
            mask: (B, *grid) bool, true for real tokens; see :mod:`attention.masking`.
            return_attention: also return the weights.
            extras: filled with what a training loss needs beside the output, by name.

        Returns:
            The output, of the shape of ``x``, 0 where masked; on request also the weights (B, heads, N, N), from each
            token of the flattened grid (rows) to each other.

        Raises:
            InputError: shapes or dtypes do not fit, or weights are asked for where there are none.
        """
        self._check(x, mask)
        x = blank(x, mask)
        out = blank(self.mix(x, mask, extras), mask)
        if not return_attention:
            return out
        if not self.has_weights:
            raise InputError(f"attention '{self.name}' has no weights between tokens; leave return_attention out.")
        return out, self.weights(x, mask)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        """The output for checked arguments; masked tokens of ``x`` are 0, and the output there is of no account."""
        raise NotImplementedError

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The weights (B, heads, N, N) for checked arguments; see :func:`attention.layout.weights_of`."""
        raise NotImplementedError

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        """Mix maps of several sizes, stored end to end, each as if it were alone.

        Args:
            x: (T, C), the tokens of one map after the other.
            cu_seqlens: (S + 1,) int32 or int64, boundaries of the maps; one may be empty.
            shapes: the grid of each map; sequences when left out.

        Returns:
            (T, C).
        """
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        grids = [(length,) for length in lengths] if shapes is None else [tuple(shape) for shape in shapes]
        if [math.prod(grid) for grid in grids] != lengths or bounds[0] != 0 or bounds[-1] != len(x):
            raise InputError(
                f"attention '{self.name}': maps of {grids} do not fill the {len(x)} tokens cut at {bounds}."
            )
        out = torch.zeros_like(x)
        # Maps of one shape go through together: their number, not that of the maps, is what is looped over.
        for grid in dict.fromkeys(g for g in grids if math.prod(g)):
            starts = torch.tensor([s for s, g in zip(bounds, grids, strict=False) if g == grid], device=x.device)
            places = starts[:, None] + torch.arange(math.prod(grid), device=x.device)
            mixed = self(x[places].unflatten(1, grid))
            out = out.index_copy(0, places.flatten(), mixed.flatten(0, -2).to(out.dtype))
        return out

    @classmethod
    def for_block(cls, params: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Parameters for the block ``index`` of a stage, where a paper alternates between forms."""
        return dict(params)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() - 2 not in self.grids or x.shape[-1] != self.dim or min(x.shape[1:-1], default=1) < 1:
            takes = " or ".join(
                f"(B, {', '.join('DHW'[-axes:]) if axes > 1 else 'N'}, {self.dim})" for axes in self.grids
            )
            raise InputError(f"attention '{self.name}' takes {takes}, every axis at least 1; got {tuple(x.shape)}.")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise InputError(
                f"attention '{self.name}': the mask must be bool {tuple(x.shape[:-1])}, true for real tokens; got "
                f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}."
            )
        if not self.takes_half and x.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"attention '{self.name}' does not work in {str(x.dtype).removeprefix('torch.')}; keep it in float32."
            )
