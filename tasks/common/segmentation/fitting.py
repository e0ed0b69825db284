"""Fitting one segmentation network: a task's section ``training``, checked, and one call to Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from kernels.errors import InputError, unknown_name
from tasks.common.optimisation import Recipe, check_recipe
from tasks.common.progress import ProgressBars
from tasks.common.segmentation.losses import LOSSES, DeepSupervision, Loss
from tasks.common.segmentation.memory import explain_out_of_memory
from tasks.common.segmentation.module import Forward, SegmentationModule
from tasks.common.training import EpochSampler, Fitted, Plan, check_accelerator, fit

_SHOWN = (("loss", "train_loss"), ("val loss", "val_loss"), ("val Dice", "val_dice"))


def recipe_of(settings: DictConfig) -> Recipe:
    """Optimiser and schedule of the section ``training``.

    Raises:
        InputError: a setting that cannot be followed.
    """
    names = [field.name for field in fields(Recipe) if field.name != "betas"]
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    recipe = Recipe(**given, betas=tuple(settings.betas))
    check_recipe(recipe)
    return recipe


def plan_of(settings: DictConfig, validated: bool) -> Plan:
    """How long to train and what to keep; without validation cases that is the last epoch.

    Raises:
        InputError: settings that contradict each other.
    """
    return Plan(
        epochs=settings.epochs,
        select=settings.select if validated else "last",
        patience=settings.patience if validated and settings.select != "last" else None,
        min_epochs=settings.min_epochs,
        ema=settings.ema,
    )


def check_training(cfg: DictConfig, classes: int, own: Mapping[str, Loss] | None = None) -> DeepSupervision:
    """The loss of ``training``, once nothing in ``training`` and ``trainer`` would end the run later.

    Args:
        classes: K, with the background.
        own: losses of the task, by name, beside those that all tasks have.

    Raises:
        InputError: a setting that cannot be followed.
    """
    check_accelerator(cfg.trainer)
    recipe_of(cfg.training)
    plan_of(cfg.training, validated=True)
    if cfg.training.batch_size < 1:
        raise InputError(f"training.batch_size={cfg.training.batch_size} must be 1 or more.")
    known, name = {**LOSSES, **(own or {})}, str(cfg.training.loss)
    if name not in known:
        raise unknown_name("training.loss", name, known)
    return DeepSupervision(known[name], classes, plain(cfg.training.level_weights))


def fit_network(
    network: nn.Module,
    loss: DeepSupervision,
    loaders: tuple[Any, Any | None],
    cfg: DictConfig,
    folder: Path,
    bars: ProgressBars,
    seed: int,
    sampler: EpochSampler | None = None,
    forward: Forward | None = None,
    freeze: Callable[[nn.Module, int], None] | None = None,
    size: Sequence[int] = (),
    channels: int = 1,
    size_option: str = "data.size",
    per_item: int = 1,
) -> Fitted:
    """Train in ``folder`` and leave the weights worth keeping in ``network``, with a bar of epochs.

    Args:
        loaders: of training batches, and of validation batches or None.
        forward: logits of whole images in validation, see :class:`SegmentationModule`.
        size: of the images or patches that are trained on, to say what would fit when memory runs out.
        per_item: patches that a batch has of each of its volumes.
    """
    recipe = recipe_of(cfg.training)
    if cfg.training.norm_momentum is not None:
        set_norm_momentum(network, float(cfg.training.norm_momentum))
    module = SegmentationModule(network, loss, recipe, forward, freeze)
    name = folder.name
    with bars.add(name, total=recipe.epochs, unit="epochs", passing=True) as bar:

        def show(epoch: int, _epochs: int, row: Mapping[str, float]) -> None:
            bar.describe("  ".join([name, *(f"{label} {row[key]:.3f}" for label, key in _SHOWN if key in row)]))
            bar.reach(epoch)

        def step(batch: int, shape: tuple[int, ...]) -> None:
            image = torch.zeros(batch, channels, *shape, device=next(network.parameters()).device)
            loss(_levels(network, image), torch.zeros(batch, *shape, dtype=torch.long, device=image.device)).backward()

        options = ("training.batch_size", size_option)
        with explain_out_of_memory(step, cfg.training.batch_size, size, options=options, per_item=per_item):
            return fit(
                module,
                loaders[0],
                loaders[1],
                plan_of(cfg.training, validated=loaders[1] is not None),
                folder,
                plain(cfg.trainer),
                seed=seed,
                sampler=sampler,
                on_epoch=show,
                tensorboard=bool(cfg.training.tensorboard),
            )


def set_norm_momentum(network: nn.Module, momentum: float) -> None:
    """How quickly all batch normalisations forget: a run of few steps needs more than a published run of many.

    Raises:
        InputError: not a share.
    """
    if not 0 < momentum <= 1:
        raise InputError(f"training.norm_momentum={momentum} must be more than 0 and at most 1.")
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def plain(node: Any) -> Any:
    """A section of the configuration as ordinary dictionaries and lists."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _levels(network: nn.Module, image: Tensor) -> list[Tensor]:
    if hasattr(network, "forward_levels"):
        return network.forward_levels(image)  # type: ignore[operator]
    return [network(image)]
