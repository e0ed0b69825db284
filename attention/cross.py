"""What every cross attention takes and returns: queries and another set of tokens in, one token per query out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attention.base import AttentionModule, head_width
from attention.masking import blank
from kernels.errors import InputError


class Cross(AttentionModule):
    """Base of cross attention: queries (B, M, C) read from tokens (B, N, C).

    A subclass sets ``about`` and implements :meth:`read` and :meth:`cost`. Its constructor takes ``dim`` and
    ``num_heads`` first.
    """

    takes_choices: ClassVar[bool] = False
    """Whether it selects, so that a small change of the input may change the output at once."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_width(self.name, dim, num_heads)

    def forward(
        self, q: Tensor, kv: Tensor, mask: Tensor | None = None, *, return_attention: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read from ``kv`` what each query asks for.

        Args:
            q: (B, M, C) queries.
            kv: (B, N, C) tokens that are read; none (N = 0) is allowed.
            mask: (B, N) bool, true for real tokens of ``kv``; see :mod:`attention.masking`.
            return_attention: also return the weights.
            options: of the module, see its :meth:`read`.

        Returns:
            (B, M, C), 0 for an item without any real token to read; on request also the weights
            (B, heads, M, N), 0 there as well.

        Raises:
            InputError: shapes do not fit.
        """
        fits = q.dim() == 3 == kv.dim() and q.shape[2] == kv.shape[2] == self.dim and q.shape[0] == kv.shape[0]
        if not fits:
            raise InputError(
                f"attention '{self.name}' takes queries (B, M, {self.dim}) and tokens (B, N, {self.dim}); got "
                f"{tuple(q.shape)} and {tuple(kv.shape)}."
            )
        if mask is not None and (mask.shape != kv.shape[:2] or mask.dtype != torch.bool):
            raise InputError(
                f"attention '{self.name}': the mask must be bool {tuple(kv.shape[:2])}, true for real tokens; got "
                f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}."
            )
        out, weights = self.read(q, blank(kv, mask), mask, return_attention, **options)
        if mask is not None:
            nothing = ~mask.any(1)[:, None, None]
            out = out.masked_fill(nothing, 0)
            weights = None if weights is None else weights.masked_fill(nothing[..., None], 0)
        elif kv.shape[1] == 0:
            out = torch.zeros_like(out)
        if not return_attention:
            return out
        assert weights is not None
        return out, weights

    def read(
        self, q: Tensor, kv: Tensor, mask: Tensor | None, want_weights: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, when wanted, weights (B, heads, M, N) for checked arguments; masked tokens of ``kv`` are 0."""
        raise NotImplementedError
