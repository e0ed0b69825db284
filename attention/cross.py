"""What every cross attention takes and returns: queries and another set of tokens in, one token per query out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part
from attention.masking import blank
from kernels.errors import InputError


class Cross(nn.Module):
    """Base of cross attention: queries (B, M, C) read from tokens (B, N, C).

    A subclass sets ``about`` and implements :meth:`read` and :meth:`cost`. Its constructor takes ``dim`` and
    ``num_heads`` first.
    """

    name: ClassVar[str] = ""
    """As registered; a class that is not has its own name."""
    about: ClassVar[About]
    takes_choices: ClassVar[bool] = False
    """Whether it selects, so that a small change of the input may change the output at once."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            fitting = [heads for heads in range(1, max(dim, 1) + 1) if dim > 0 and dim % heads == 0]
            raise InputError(
                f"attention '{self.name}': dim={dim} is not divisible into num_heads={num_heads} heads; take num_heads "
                f"from {', '.join(map(str, fitting)) or 'the divisors of a positive dim'}."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads

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
        fits = q.dim() == 3 == kv.dim() and q.shape[2] == kv.shape[2] == self.dim and len(q) == len(kv)
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

    def cost(self, shape: Sequence[int]) -> list[Part]:
        """What ``shape`` = (B, M, N) costs, step by step (see :mod:`attention.cost`)."""
        raise NotImplementedError

    def flops(self, shape: Sequence[int]) -> float:
        """Operations of the forward pass on (B, M, N)."""
        return sum(part.flops for part in self.cost(shape))

    def min_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """Bytes the forward pass on (B, M, N) must move when each step reads and writes once."""
        return sum(part.elements for part in self.cost(shape)) * dtype.itemsize
