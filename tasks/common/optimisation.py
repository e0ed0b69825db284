"""Optimiser and schedule of a training: what every task's LightningModule configures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from kernels.errors import unknown_name
from tasks.common.schedules import half_cosine

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class Recipe:
    """Optimiser and schedule: a linear warm-up, then half a cosine, set at every step."""

    lr: float = 1e-4
    min_lr: float = 0.0
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 50
    warmup_epochs: float = 0
    optimizer: str = "adamw"


def configure(recipe: Recipe, parameters: Iterable[Any], trainer: L.Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns, for parameters or groups of them.

    Raises:
        InputError: the optimiser is not known.
    """
    check_optimizer(recipe.optimizer)
    optimizer = _OPTIMIZERS[recipe.optimizer](
        parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    steps_per_epoch = max(1, int(trainer.estimated_stepping_batches) / max(1, recipe.epochs))

    def factor(step: int) -> float:
        progress = step / steps_per_epoch
        return half_cosine(progress, recipe.epochs, recipe.warmup_epochs, 1.0, recipe.min_lr / recipe.lr)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_optimizer(name: str) -> None:
    """Raise InputError for an optimiser that is not known."""
    if name not in _OPTIMIZERS:
        raise unknown_name("training.optimizer", name, _OPTIMIZERS)
