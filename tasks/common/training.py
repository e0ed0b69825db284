"""Fitting one model with Lightning: the epoch worth keeping, history, early stop, and resuming where it stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from kernels.errors import InputError, unknown_name
from tasks.common.averaging import AverageLateWeights, ExponentialAverage
from tasks.common.files import atomic_path, explain_os_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long to train and which epoch to keep.

    Attributes:
        epochs: at most this many.
        select: ``"last"``, ``"val_loss"`` (smallest), or a sum of metrics (largest), as ``"val_f1_macro+val_auc"``.
        patience: stop after this many epochs without improvement; None never stops.
        min_epochs: never stop before.
        average_from: from this share of the epochs on, keep the running average of the weights instead.
        ema: keep the exponential moving average of the weights instead, with this decay per step; it begins quicker.
    """

    epochs: int
    select: str = "last"
    patience: int | None = None
    min_epochs: int = 1
    average_from: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(f"training.epochs={self.epochs} must be 1 or more.")
        if self.average_from is not None and self.select != "last":
            raise InputError("training.average_from keeps averaged weights and needs training.select=last.")
        if self.ema is not None and not (0 < self.ema < 1):
            raise InputError(f"training.ema={self.ema} must lie between 0 and 1, such as 0.999.")
        if self.ema is not None and (self.select != "last" or self.average_from is not None):
            raise InputError("training.ema keeps averaged weights: it needs training.select=last and no average_from.")
        if self.patience is not None and self.select == "last":
            raise InputError("training.patience needs a validation metric in training.select, such as val_loss.")


@dataclass
class Fitted:
    """Outcome of one fit.

    Attributes:
        epoch: the epoch kept, counted from 1.
        history: one row per epoch: losses, metrics, learning rate.
        stopped_early: whether patience ran out.
    """

    epoch: int
    history: pd.DataFrame
    stopped_early: bool


ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")

OnEpoch = Callable[[int, int, Mapping[str, float]], None]


def fit(
    module: L.LightningModule,
    train_loader: Any,
    val_loader: Any | None,
    plan: Plan,
    folder: Path,
    trainer_options: Mapping[str, Any],
    seed: int = 1,
    sampler: EpochSampler | None = None,
    on_epoch: OnEpoch | None = None,
    tensorboard: bool = False,
) -> Fitted:
    """Train ``module`` in ``folder`` and leave the weights worth keeping in it.

    An interrupted fit goes on from its last finished epoch: optimiser, schedule, best epoch and history included. What
    is random in an epoch follows from the seed and the epoch, so that it ends with the weights of one never stopped.

    Args:
        sampler: the training loader's, if its order is to follow from seed and epoch.

    Raises:
        InputError: the loss became NaN, a selected metric is never logged, or ``folder`` cannot be written.
        KeyboardInterrupt: the user stopped it; the last finished epoch is on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep = KeepBest(plan)
    history = History(folder / "history.csv", on_epoch, plan.epochs)
    resume = folder / "resume" / "last.ckpt"
    callbacks: list[Callback] = [SeedEpochs(seed, sampler), keep, history, StopOnNaN()]
    if plan.average_from is not None:
        callbacks.append(AverageLateWeights(math.floor(plan.average_from * plan.epochs)))
    if plan.ema is not None:
        callbacks.append(ExponentialAverage(plan.ema))
    # Written last, so that it holds what the callbacks above did in the epoch.
    callbacks.append(
        ModelCheckpoint(
            dirpath=resume.parent, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )
    )
    options = {**trainer_options}
    with _quiet(), explain_os_errors(folder):
        trainer = L.Trainer(
            max_epochs=plan.epochs,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name="", version="tensorboard") if tensorboard else False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **options,
        )
        if resume.exists():
            log.info("%s: going on after epoch %d", folder.name, _epochs_in(resume))
        try:
            trainer.fit(
                module, train_loader, val_loader, ckpt_path=resume if resume.exists() else None, weights_only=True
            )
        except SystemExit as error:  # Lightning ends the process after Ctrl-C; the caller decides here
            raise KeyboardInterrupt from error
    if keep.best_state is not None:
        module.load_state_dict(keep.best_state)
    return Fitted(keep.best_epoch + 1, history.frame(), keep.stopped)


@contextlib.contextmanager
def first_process() -> Iterator[bool]:
    """Whether this process should write results; the others of a distributed run wait until the block has run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    yield not distributed or torch.distributed.get_rank() == 0
    if distributed:
        torch.distributed.barrier()


def discard_resume_state(folder: Path) -> None:
    """Delete what only an unfinished fit needs."""
    (folder / "resume" / "last.ckpt").unlink(missing_ok=True)
    if (folder / "resume").is_dir():
        (folder / "resume").rmdir()


class EpochSampler(Protocol):
    """A sampler whose order follows from the epoch, which it asks for whenever it begins anew."""

    current_epoch: Callable[[], int]


class SeedEpochs(Callback):
    """Makes everything random in an epoch a function of the seed and the epoch.

    The sampler asks for the epoch, and the seed is set at the first batch, because Lightning leaves out the hooks
    at the start of the epoch it resumes with, and in distributed runs reaches only the wrapper around a sampler.
    """

    def __init__(self, seed: int, sampler: EpochSampler | None) -> None:
        self.seed = seed
        self.sampler = sampler

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.sampler is not None:
            self.sampler.current_epoch = lambda: trainer.current_epoch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch)


class KeepBest(Callback):
    """Holds the weights of the best epoch by ``Plan.select`` and ends training when patience runs out."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.best_score = -math.inf
        self.best_epoch = -1
        self.best_state: dict[str, Tensor] | None = None
        self.stopped = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.plan.select == "last":
            self.best_epoch = epoch
            return
        score = self._score(trainer.callback_metrics)
        if score > self.best_score or self.best_state is None:
            self.best_score, self.best_epoch = score, epoch
            self.best_state = {k: v.detach().cpu().clone() for k, v in pl_module.state_dict().items()}
        patience = self.plan.patience
        if patience is not None and epoch + 1 >= self.plan.min_epochs and epoch - self.best_epoch >= patience:
            self.stopped = True
            trainer.should_stop = True

    def _score(self, metrics: Mapping[str, Tensor]) -> float:
        total = 0.0
        for name in self.plan.select.split("+"):
            if name not in metrics:
                there = ", ".join(sorted(metrics))
                raise InputError(f"training.select={self.plan.select}: '{name}' is not logged; there is {there}.")
            value = float(metrics[name])
            # An undefined metric (a validation set of one class has no AUC) must not decide anything.
            total += 0.0 if math.isnan(value) else (-value if name.endswith("loss") else value)
        return total

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


class History(Callback):
    """One row per epoch, written after each, complete also after a resumed run."""

    def __init__(self, path: Path, on_epoch: OnEpoch | None, epochs: int) -> None:
        self.path = path
        self.on_epoch = on_epoch
        self.epochs = epochs
        self.rows: list[dict[str, float]] = []

    def frame(self) -> pd.DataFrame:
        """Columns epoch, lr and every logged value."""
        return pd.DataFrame(self.rows)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = {"epoch": float(trainer.current_epoch + 1), "lr": float(trainer.optimizers[0].param_groups[0]["lr"])}
        row |= {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        self.rows.append(row)
        if trainer.is_global_zero:
            with atomic_path(self.path) as temporary:
                self.frame().to_csv(temporary, index=False)
            if self.on_epoch is not None:
                self.on_epoch(trainer.current_epoch + 1, self.epochs, row)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class StopOnNaN(Callback):
    """Ends training with a sentence when the loss is no longer a number."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        # Looking at every loss would wait for the GPU at every step.
        if trainer.global_step % 16 == 0 and isinstance(loss, Tensor) and not torch.isfinite(loss):
            raise InputError(
                f"the loss became {float(loss)} at step {trainer.global_step}; lower training.lr or set "
                "trainer.gradient_clip_val=1."
            )


def check_accelerator(options: Mapping[str, Any]) -> None:
    """Refuse an accelerator that this machine has not, before anything is written.

    Raises:
        InputError: ``trainer.accelerator`` asks for a GPU and there is none.
    """
    wanted = str(options.get("accelerator", "auto"))
    if wanted not in ACCELERATORS:
        raise unknown_name("trainer.accelerator", wanted, ACCELERATORS)
    there = {"gpu": torch.cuda.is_available() or torch.backends.mps.is_available()}
    there |= {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise InputError(f"trainer.accelerator={wanted}: this machine has no such device; use auto or cpu.")


def _epochs_in(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"]) + 1


class _quiet(warnings.catch_warnings):
    """Lightning's advice on workers, loggers and checkpoint folders is about choices made here on purpose."""

    _MESSAGES = (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*number of training batches.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*Starting from v1.9.0, `tensorboardX`.*",
        ".*GPU available but not used.*",
        ".*Consider setting `persistent_workers=True`.*",
        ".*The dirpath has changed from.*",
        ".*treespec.*",
        ".*isinstance.treespec.*",
    )

    def __enter__(self) -> None:
        super().__enter__()
        for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.WARNING)
        for message in self._MESSAGES:
            warnings.filterwarnings("ignore", message=message)
