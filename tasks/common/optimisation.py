"""Optimiser and schedule of a training: what every task's LightningModule configures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch

from kernels.errors import InputError, unknown_name
from tasks.common.schedules import half_cosine, polynomial, steps_down

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "constant", "step", "polynomial")


@dataclass(frozen=True)
class Recipe:
    """Optimiser and schedule, set at every step; each schedule begins with a linear warm-up.

    Attributes:
        lr, min_lr: the highest rate and the lowest that the schedule goes down to.
        betas: of AdamW and Adam.
        momentum: of SGD, which is Nesterov's where it is not 0.
        epochs: length of the training.
        schedule: ``"cosine"``: half a cosine; ``"step"``: times ``step_factor`` every ``step_epochs``;
            ``"polynomial"``: (1 - share of the training done) to the ``power``; ``"constant"``.
    """

    lr: float = 1e-4
    min_lr: float = 0.0
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 50
    warmup_epochs: float = 0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    momentum: float = 0.9
    step_epochs: float = 50
    step_factor: float = 0.5
    power: float = 0.9

    def rate(self, epoch: float) -> float:
        """Learning rate after ``epoch`` epochs, fractional within one."""
        rates: dict[str, Callable[[float], float]] = {
            "cosine": lambda e: half_cosine(e, self.epochs, self.warmup_epochs, self.lr, self.min_lr),
            "constant": lambda _: self.lr,
            "step": lambda e: max(steps_down(e, self.step_epochs, self.step_factor, self.lr), self.min_lr),
            "polynomial": lambda e: max(polynomial(e, self.epochs, self.power, self.lr), self.min_lr),
        }
        if self.schedule not in rates:
            raise unknown_name("training.schedule", self.schedule, rates)
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        return rates[self.schedule](epoch)


def configure(recipe: Recipe, parameters: Iterable[Any], trainer: L.Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns, for parameters or groups of them.

    Raises:
        InputError: the optimiser or the schedule is not known.
    """
    check_optimizer(recipe.optimizer)
    build: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, betas=recipe.betas),
        "adam": partial(torch.optim.Adam, betas=recipe.betas),
        "sgd": partial(torch.optim.SGD, momentum=recipe.momentum, nesterov=recipe.momentum > 0),
    }
    optimizer = build[recipe.optimizer](parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps_per_epoch = max(1, int(trainer.estimated_stepping_batches) / max(1, recipe.epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.rate(step / steps_per_epoch) / recipe.lr
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_optimizer(name: str) -> None:
    """Raise InputError for an optimiser that is not known."""
    if name not in OPTIMIZERS:
        raise unknown_name("training.optimizer", name, OPTIMIZERS)


def check_recipe(recipe: Recipe) -> None:
    """Raise InputError for a recipe that cannot be followed."""
    check_optimizer(recipe.optimizer)
    if recipe.schedule not in SCHEDULES:
        raise unknown_name("training.schedule", recipe.schedule, SCHEDULES)
    if not recipe.lr > 0:
        raise InputError(f"training.lr={recipe.lr} must be more than 0.")
    if not 0 <= recipe.min_lr <= recipe.lr:
        raise InputError(f"training.min_lr={recipe.min_lr} must lie between 0 and training.lr={recipe.lr}.")
    if recipe.epochs < 1:
        raise InputError(f"training.epochs={recipe.epochs} must be 1 or more.")
