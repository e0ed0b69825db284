"""Loss, optimiser and validation metrics of a slide model, for Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from kernels.errors import unknown_name
from tasks.common.metrics import classification_metrics
from tasks.common.schedules import half_cosine
from tasks.wsi_mil.data import PackedBatch
from tasks.wsi_mil.model import SlideModel
from tasks.wsi_mil.targets import Target


@dataclass(frozen=True)
class Recipe:
    """Optimiser and schedule; the defaults are those of the ACMIL paper's code."""

    lr: float = 1e-4
    min_lr: float = 0.0
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 50
    warmup_epochs: float = 0
    optimizer: str = "adamw"


class SlideModule(L.LightningModule):
    """Trains a :class:`SlideModel`; logs every loss term of the pooler and the validation metrics."""

    def __init__(self, model: SlideModel, target: Target, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.target = target
        self.recipe = recipe
        self._validation: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: PackedBatch, _batch_index: int) -> Tensor:
        bags = self.model(batch.features, batch.cu_seqlens)
        losses = self.model.pooler.loss(bags, batch.target, batch.cu_seqlens, self.target)
        values = {f"train_{name.replace('total', 'loss')}": value.detach() for name, value in losses.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch.target), sync_dist=True)
        return losses["total"]

    def validation_step(self, batch: PackedBatch, _batch_index: int) -> None:
        logits = self.model(batch.features, batch.cu_seqlens).logits.float()
        losses = self.target.loss(logits, batch.target)
        outcome = (batch.position, self.target.probabilities(logits), batch.target, losses)
        self._validation.append(tuple(part.cpu() for part in outcome))  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        index, probabilities, target, losses = (torch.cat(parts) for parts in zip(*self._everywhere(), strict=True))
        self._validation.clear()
        # Processes of a distributed run pad their share with repeats: keep each bag once.
        order = torch.unique(index, sorted=True)
        first = torch.tensor([int((index == i).nonzero()[0]) for i in order])
        metrics = classification_metrics(probabilities[first].numpy(), target[first].numpy(), self.target.kind)
        values = {f"val_{name}": value for name, value in metrics.items() if "/" not in name}  # none per class
        self.log_dict({"val_loss": losses[first].mean(), **values}, sync_dist=True)

    def _everywhere(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        if self.trainer.world_size == 1:
            return self._validation
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, self._validation)
        return [batch for part in gathered for batch in part]

    def configure_optimizers(self) -> Mapping[str, Any]:  # type: ignore[override]
        recipe = self.recipe
        kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
        if recipe.optimizer not in kinds:
            raise unknown_name("training.optimizer", recipe.optimizer, kinds)
        optimizer = kinds[recipe.optimizer](
            self.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        steps_per_epoch = max(1, int(self.trainer.estimated_stepping_batches) / max(1, recipe.epochs))

        def factor(step: int) -> float:
            progress = step / steps_per_epoch
            return half_cosine(progress, recipe.epochs, recipe.warmup_epochs, 1.0, recipe.min_lr / recipe.lr)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
