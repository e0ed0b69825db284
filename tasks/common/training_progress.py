"""The progress of training: Lightning's bar on a terminal, a log line now and then anywhere else."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

logger = logging.getLogger(__name__)


def training_progress(description: str = "training", log_every: float = 30.0, terminal: bool | None = None) -> Callback:
    """The callback to give a Trainer: a bar when standard error is a terminal, else :class:`LogProgress`.

    A Trainer that gets :class:`LogProgress` should be made with ``enable_progress_bar=False``.
    """
    if sys.stderr.isatty() if terminal is None else terminal:
        return RichProgressBar(leave=False)
    return LogProgress(description, log_every)


class LogProgress(Callback):
    """Logs the epoch and its metrics when ``log_every`` seconds have passed since the last line, and at the end."""

    def __init__(
        self, description: str = "training", log_every: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.description, self.log_every, self.clock = description, log_every, clock
        self._started = self._logged = 0.0
        self._first_epoch = self._logged_epoch = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started = self._logged = self.clock()
        self._first_epoch = self._logged_epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        now = self.clock()
        if trainer.is_global_zero and now - self._logged >= self.log_every:
            self._log(trainer, trainer.current_epoch + 1, now)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.current_epoch > self._logged_epoch:
            self._log(trainer, trainer.current_epoch, self.clock())

    def _log(self, trainer: Trainer, epochs: int, now: float) -> None:
        self._logged, self._logged_epoch = now, epochs
        seen = ", ".join(
            f"{name} {value:.4g}"
            for name, value in ((n, float(v)) for n, v in sorted(trainer.callback_metrics.items()))
            if math.isfinite(value)
        )
        per_epoch = (now - self._started) / max(1, epochs - self._first_epoch)
        of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        logger.info(
            "%s: epoch %d%s, %.2g s each%s", self.description, epochs, of, per_epoch, f"; {seen}" if seen else ""
        )
