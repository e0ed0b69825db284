"""The outcomes of one validation epoch, from every process of a distributed run, and the metrics that are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.common.metrics import classification_metrics
from tasks.common.weighted_metrics import Kind


class Outcomes:
    """Collects batches of (position, probabilities, target, loss) and turns them into values to log."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, position: Tensor, probabilities: Tensor, target: Tensor, loss: Tensor) -> None:
        """One batch: positions (B,) in the data set, probabilities (B, C), targets (B,) or (B, C), losses (B,)."""
        self._batches.append(tuple(part.cpu() for part in (position, probabilities, target, loss)))

    def values(self, kind: Kind, world_size: int) -> dict[str, Any]:
        """``val_loss`` and every metric that is not of one class, of all batches so far, which are forgotten."""
        index, probabilities, target, losses = (
            torch.cat(parts) for parts in zip(*self._everywhere(world_size), strict=True)
        )
        self._batches.clear()
        # Processes of a distributed run pad their share with repeats: keep each sample once.
        order = torch.unique(index, sorted=True)
        first = torch.tensor([int((index == i).nonzero()[0]) for i in order])
        metrics = classification_metrics(probabilities[first].numpy(), target[first].numpy(), kind)
        named = {f"val_{name}": value for name, value in metrics.items() if "/" not in name}  # none per class
        return {"val_loss": losses[first].mean(), **named}

    def _everywhere(self, world_size: int) -> list[tuple[Tensor, ...]]:
        if world_size == 1:
            return self._batches
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, self._batches)
        return [batch for part in gathered for batch in part]
