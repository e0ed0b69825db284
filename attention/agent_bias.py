"""What agent attention has in common with its form on stripes: position biases by low-rank tables, and the core."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.masking import key_mask
from attention.resizing import resize

COARSE = 7
"""Side of the tables that hold a bias for each place of a coarse map."""


class AgentBias(nn.Module):
    """Biases between agents and places of a map: a coarse table, and one for each axis, summed.

    Tables built for one size are resized linearly to others, those of the agents over the grid the agents form.

    Args:
        num_heads: heads h.
        agents: grid of the n agents.
        queries: size of the map whose tokens read from the agents.
        keys: size of the map that the agents read; smaller where keys are reduced.
        prefix: tokens in front of the map, with biases of their own.
    """

    def __init__(
        self, num_heads: int, agents: Sequence[int], queries: Sequence[int], keys: Sequence[int], prefix: int = 0
    ) -> None:
        super().__init__()
        axes, n = len(agents), math.prod(agents)
        self.agents = tuple(agents)
        self.letters = "dhw"[-axes:]
        self.an_bias = _table(num_heads, n, *[COARSE] * axes)
        self.na_bias = _table(num_heads, n, *[COARSE] * axes)
        for axis, letter in enumerate(self.letters):
            self.register_parameter(f"a{letter}_bias", _table(1, num_heads, n, *_only(axis, keys)))
            self.register_parameter(f"{letter}a_bias", _table(1, num_heads, *_only(axis, queries), n))
        self.prefix = prefix
        if prefix:
            self.ac_bias = _table(1, num_heads, n, prefix)
            self.ca_bias = _table(1, num_heads, prefix, n)

    def to_agents(self, grid: Sequence[int], agents: Sequence[int]) -> Tensor:
        """(1, h, n, prefix + N): what is added to the scores of agents (rows) for the places of ``grid``."""
        tables = [self.an_bias[None], *(getattr(self, f"a{letter}_bias") for letter in self.letters)]
        return self._sum(tables, self.ac_bias if self.prefix else None, grid, agents)

    def from_agents(self, grid: Sequence[int], agents: Sequence[int]) -> Tensor:
        """(1, h, prefix + N, n): what is added to the scores of the places of ``grid`` (rows) for agents."""
        tables = [getattr(self, f"{letter}a_bias").movedim(-1, 2) for letter in self.letters]
        front = self.ca_bias.transpose(2, 3) if self.prefix else None
        return self._sum([self.na_bias[None], *tables], front, grid, agents).transpose(2, 3)

    def _sum(self, tables: list[Tensor], front: Tensor | None, grid: Sequence[int], agents: Sequence[int]) -> Tensor:
        """(1, h, n, prefix + N) of tables (1, h, n, *sides), where a side is 1 for what is the same along an axis."""
        parts = []
        for table in tables:
            sides = table.shape[3:]
            size = [new if old > 1 or new == 1 else 1 for old, new in zip(sides, grid, strict=True)]
            resized = resize(self._of_agents(table, agents).flatten(1, 2), size)
            parts.append(resized.unflatten(1, (table.shape[1], math.prod(agents))))
        total = sum(parts[1:], parts[0])
        total = total.expand(*total.shape[:3], *grid).flatten(3)
        return total if front is None else torch.cat([self._of_agents(front, agents), total], 3)

    def _of_agents(self, table: Tensor, agents: Sequence[int]) -> Tensor:
        """``table`` (1, h, n, ...) for agents on another grid."""
        if tuple(agents) == self.agents:
            return table
        places = table.flatten(3).transpose(2, 3)
        places = resize(places.reshape(1, -1, *self.agents), agents)
        return places.reshape(1, table.shape[1], -1, math.prod(agents)).transpose(2, 3).unflatten(3, table.shape[3:])


def attend_agents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    to_agents: Tensor | None = None,
    from_agents: Tensor | None = None,
    key_seen: Tensor | None = None,
    agent_seen: Tensor | None = None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """What agents gather from all keys, handed on to the queries.

    Args:
        q: (B, h, N, D).
        k: (B, h, M, D).
        v: (B, h, M, E).
        agents: (B, h, n, D).
        to_agents: (1, h, n, M) bias.
        from_agents: (1, h, N, n) bias.
        key_seen: (B, M) bool, true for keys that exist; values are 0 elsewhere.
        agent_seen: (B, n) bool, the same for agents.
        scale: of both scores.
        dropout: on both softmaxes.

    Returns:
        (B, h, N, E).
    """
    hidden = _hide(to_agents, key_seen, q.dtype)
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=hidden, scale=scale, dropout_p=dropout)
    hidden = _hide(from_agents, agent_seen, q.dtype)
    return F.scaled_dot_product_attention(q, agents, gathered, attn_mask=hidden, scale=scale, dropout_p=dropout)


def _hide(bias: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask argument of PyTorch's attention; the bias is repeated over the batch only where the batch has a mask."""
    allowed = key_mask(seen)
    if bias is None:
        return allowed
    bias = bias.to(dtype)
    return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)


def _only(axis: int, size: Sequence[int]) -> list[int]:
    return [side if a == axis else 1 for a, side in enumerate(size)]


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
