"""Loss, mixing of images, optimiser and validation metrics of an image classifier, for Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from timm.data.mixup import Mixup
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.early_exit import exit_loss
from kernels.errors import InputError
from tasks.classification.loading import Batch, seeded
from tasks.common.optimisation import Recipe, configure
from tasks.common.validation import Outcomes
from tasks.common.weighted_metrics import Kind


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        num_classes: K.
        label_smoothing: share of each target that goes to all classes alike.
        mixup, cutmix: concentration of the Beta distribution; 0 for none.
        mix_prob: share of the batches that are mixed.
        weights: loss weight of each class, or None.
    """

    num_classes: int
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "mix_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        if self.mixup < 0 or self.cutmix < 0:
            raise InputError("augment.mixup and augment.cutmix must be 0 or more.")

    def loss(self, logits: Tensor, target: Tensor, smoothing: float | None = None) -> Tensor:
        """Cross-entropy of logits (B, K) with classes (B,) or shares of classes (B, K)."""
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        smoothing = self.label_smoothing if smoothing is None else smoothing
        return F.cross_entropy(logits.float(), target, weight=weights, label_smoothing=smoothing)


class ClassifierModule(L.LightningModule):
    """Trains a network that gives logits (B, K); one with ``forward_exits`` learns to answer at every exit."""

    def __init__(self, model: nn.Module, objective: Objective, kind: Kind, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.model, self.objective, self.kind, self.recipe, self.seed = model, objective, kind, recipe, seed
        self._outcomes = Outcomes()
        self._mix = None
        if objective.mixup > 0 or objective.cutmix > 0:
            self._mix = Mixup(
                mixup_alpha=objective.mixup,
                cutmix_alpha=objective.cutmix,
                prob=objective.mix_prob,
                label_smoothing=0.0,  # the loss smooths
                num_classes=objective.num_classes,
            )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        images, target = self._mixed(batch, batch_index)
        if hasattr(self.model, "forward_exits"):
            loss = exit_loss(self.model.forward_exits(images), target, loss=self.objective.loss)  # type: ignore[operator]
        else:
            loss = self.objective.loss(self.model(images), target)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def _mixed(self, batch: Batch, batch_index: int) -> tuple[Tensor, Tensor]:
        if self._mix is None or len(batch.images) < 2:
            return batch.images, batch.target
        even = len(batch.images) // 2 * 2  # images are mixed in pairs
        with seeded((self.seed * 1_000_003 + self.trainer.current_epoch) * 10_007 + batch_index):
            return self._mix(batch.images[:even].clone(), batch.target[:even])

    def validation_step(self, batch: Batch, _batch_index: int) -> None:
        logits = self.model(batch.images).float()
        losses = F.cross_entropy(logits, batch.target, reduction="none")
        self._outcomes.add(batch.position, logits.softmax(1), batch.target, losses)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._outcomes.values(self.kind, self.trainer.world_size), sync_dist=True)

    def configure_optimizers(self) -> Mapping[str, Any]:  # type: ignore[override]
        # Biases, norms and what the network itself names are not pulled towards zero.
        spared = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()  # type: ignore[operator]
        groups = param_groups_weight_decay(self.model, self.recipe.weight_decay, no_weight_decay_list=tuple(spared))
        return configure(self.recipe, groups, self.trainer)
