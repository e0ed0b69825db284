"""Orders of samples that follow from a seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffles, or draws with weights, from a seed and the epoch: a resumed run sees the same order.

    Yields pairs of an index and a seed for what is drawn inside the bag.

    ``current_epoch`` is set by :class:`tasks.common.training.SeedEpochs`.
    """

    def __init__(self, length: int, seed: int, weights: Sequence[float] | None = None) -> None:
        self.length = length
        self.seed = seed
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.double)
        self.current_epoch: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.current_epoch())
        if self.weights is None:
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator)
        seeds = torch.randint(2**62, (self.length,), generator=generator)
        return iter(list(zip(order.tolist(), seeds.tolist(), strict=True)))
