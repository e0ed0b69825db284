"""What modules of all kinds have: a name, facts, and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from attention.about import About
from attention.cost import Part
from kernels.errors import InputError


class AttentionModule(nn.Module):
    """Base of the bases of each kind.

    A subclass sets ``about`` and implements :meth:`cost`.
    """

    name: ClassVar[str] = ""
    """As registered; a class that is not has its own name."""
    about: ClassVar[About]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__name__)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        """What an input costs, step by step (see :mod:`attention.cost`).

        Args:
            shape: (B, *grid) for mixers and gates, (B, M, N) for cross attention, (bags, instances in all) for poolers.
        """
        raise NotImplementedError

    def flops(self, shape: Sequence[int]) -> float:
        """Operations of the forward pass, for a shape as :meth:`cost` takes it."""
        return sum(part.flops for part in self.cost(shape))

    def min_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """Bytes the forward pass must move when each step reads and writes once, for a shape of :meth:`cost`."""
        return sum(part.elements for part in self.cost(shape)) * dtype.itemsize


def head_width(name: str, dim: int, num_heads: int) -> int:
    """Channels of each head of the module called ``name``.

    Raises:
        InputError: the heads do not divide the channels; it says which would.
    """
    if dim < 1 or num_heads < 1 or dim % num_heads:
        fitting = [heads for heads in range(1, max(dim, 1) + 1) if dim > 0 and dim % heads == 0]
        raise InputError(
            f"attention '{name}': dim={dim} is not divisible into num_heads={num_heads} heads; take num_heads "
            f"from {', '.join(map(str, fitting)) or 'the divisors of a positive dim'}."
        )
    return dim // num_heads
