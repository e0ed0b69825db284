"""Loss, optimiser and validation Dice of a segmentation network, for Lightning; 2-D and 3-D alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor, nn

from tasks.common.optimisation import Recipe, configure
from tasks.common.segmentation.batch import Batch
from tasks.common.segmentation.layout import lay_out
from tasks.common.segmentation.losses import IGNORE, DeepSupervision

Forward = Callable[[nn.Module, Tensor], Tensor]


class SegmentationModule(L.LightningModule):
    """Trains a network of the kind that :mod:`tasks.common.segmentation` describes.

    Logged: ``train_loss``; ``val_loss``; ``val_dice``, the mean over the images of the foreground classes' mean Dice.
    A class that neither reference nor prediction has is left out of an image's mean; an image without any counts as 1.

    Args:
        forward: logits of whole images (B, C, *spatial) in validation; the network itself when left out.
        freeze: called with the network and the epoch before the first batch of each epoch, for parts that are
            trained later.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: DeepSupervision,
        recipe: Recipe,
        forward: Forward | None = None,
        freeze: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.recipe = model, loss, recipe
        self._forward: Forward = forward or (lambda model, image: model(image))
        self._freeze = freeze
        self._outcomes: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_fit_start(self) -> None:
        lay_out(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Not at the start of the epoch, a hook that is left out for the epoch that a stopped run goes on with.
        if self._freeze is not None and batch_idx == 0:
            self._freeze(self.model, self.current_epoch)

    def training_step(self, batch: Batch, _batch_index: int) -> Tensor:
        auxiliary: Mapping[str, Tensor] = {}
        if hasattr(self.model, "forward_training"):
            levels, auxiliary = self.model.forward_training(batch.image)  # type: ignore[operator]
        elif hasattr(self.model, "forward_levels"):
            levels = self.model.forward_levels(batch.image)  # type: ignore[operator]
        else:
            levels = [self.model(batch.image)]
        loss = self.loss(levels, batch.label) + sum(auxiliary.values())
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch.image), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, _batch_index: int) -> None:
        logits = self._forward(self.model, batch.image).float()
        for logit, label, position in zip(logits, batch.label, batch.position, strict=True):
            loss = self.loss([logit[None]], label[None])
            self._outcomes.append((position.cpu(), loss.cpu(), mean_dice(logit.argmax(0), label, len(logit)).cpu()))

    def on_validation_epoch_end(self) -> None:
        position, losses, dice = (torch.stack(parts) for parts in zip(*self._everywhere(), strict=True))
        self._outcomes.clear()
        # Processes of a distributed run pad their share with repeats: each image counts once.
        order, place = torch.unique(position, return_inverse=True)
        first = torch.full((len(order),), len(position)).scatter_reduce_(0, place, torch.arange(len(place)), "amin")
        self.log_dict({"val_loss": losses[first].mean(), "val_dice": dice[first].mean()}, sync_dist=True)

    def _everywhere(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        if self.trainer.world_size == 1:
            return self._outcomes
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, self._outcomes)
        return [outcome for part in gathered for outcome in part]

    def configure_optimizers(self) -> Mapping[str, Any]:  # type: ignore[override]
        spared = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()  # type: ignore[operator]
        groups = param_groups_weight_decay(self.model, self.recipe.weight_decay, no_weight_decay_list=tuple(spared))
        return configure(self.recipe, groups, self.trainer)


def mean_dice(predicted: Tensor, label: Tensor, classes: int) -> Tensor:
    """Mean Dice of the foreground classes that either side has; 1 where neither has any.

    Args:
        predicted, label: classes of the same shape; places labelled -1 do not count.
        classes: K, with the background.
    """
    counted = label != IGNORE
    cells = classes * label[counted].long() + predicted[counted].long()
    table = torch.bincount(cells, minlength=classes**2).view(classes, classes)[:, :].double()
    both = table.sum(0)[1:] + table.sum(1)[1:]
    there = both > 0
    if not there.any():
        return torch.ones((), dtype=torch.float64, device=label.device)
    return (2 * table.diagonal()[1:][there] / both[there]).mean()
