"""Loss, optimiser and validation metrics of a slide model, for Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from tasks.common.optimisation import Recipe, configure
from tasks.common.validation import Outcomes
from tasks.wsi_mil.data import PackedBatch
from tasks.wsi_mil.model import SlideModel
from tasks.wsi_mil.targets import Target


class SlideModule(L.LightningModule):
    """Trains a :class:`SlideModel`; logs every loss term of the pooler and the validation metrics."""

    def __init__(self, model: SlideModel, target: Target, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.target = target
        self.recipe = recipe
        self._outcomes = Outcomes()

    def training_step(self, batch: PackedBatch, _batch_index: int) -> Tensor:
        bags = self.model(batch.features, batch.cu_seqlens)
        losses = self.model.pooler.loss(bags, batch.target, batch.cu_seqlens, self.target)
        values = {f"train_{name.replace('total', 'loss')}": value.detach() for name, value in losses.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch.target), sync_dist=True)
        return losses["total"]

    def validation_step(self, batch: PackedBatch, _batch_index: int) -> None:
        logits = self.model(batch.features, batch.cu_seqlens).logits.float()
        losses = self.target.loss(logits, batch.target)
        self._outcomes.add(batch.position, self.target.probabilities(logits), batch.target, losses)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._outcomes.values(self.target.kind, self.trainer.world_size), sync_dist=True)

    def configure_optimizers(self) -> Mapping[str, Any]:  # type: ignore[override]
        return configure(self.recipe, self.parameters(), self.trainer)
