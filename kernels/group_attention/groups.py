"""Sorted tokens cut into groups, and which sorted tokens each group attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.tables import made_once


@dataclass(frozen=True)
class Groups:
    """``tokens`` sorted positions in groups of ``size``, the last of which may be short.

    Group g attends to its own positions and the next group's: ``keys`` positions from g * size on. Past the last
    position the sequence is mirrored, again and again where one mirror image is too short.
    """

    tokens: int
    size: int

    @property
    def count(self) -> int:
        """Number of groups."""
        return -(-self.tokens // self.size)

    @property
    def padded(self) -> int:
        """Positions of all groups at full size."""
        return self.count * self.size

    @property
    def keys(self) -> int:
        """Keys of a group. A single group would see every token twice, which changes no weight: it sees them once."""
        return self.size if self.count == 1 else 2 * self.size

    @property
    def extended(self) -> int:
        """Positions that any group attends to, mirror images included."""
        return self.padded - self.size + self.keys

    def positions(self, device: torch.device) -> Tensor:
        """(extended,) int64: the sorted position behind each."""
        return _mirrored(self.extended, self.tokens, device)

    def fold(self, x: Tensor) -> Tensor:
        """(..., extended, D) as (..., tokens, D): mirror images are added to what they are images of."""
        n = self.tokens
        total = x[..., :n, :].clone()
        for start in range(n, self.extended, n):
            image = x[..., start : start + n, :]
            length = image.shape[-2]
            if start // n % 2:
                total[..., n - length :, :] += image.flip(-2)
            else:
                total[..., :length, :] += image
        return total


def groups(tokens: int, group_size: int) -> Groups:
    """Groups of ``group_size``, or a single one of all tokens where there are fewer."""
    return Groups(tokens, max(min(tokens, group_size), 1))


@made_once(64)
def _mirrored(length: int, tokens: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device) % (2 * tokens)
    return torch.minimum(position, 2 * tokens - 1 - position)
