"""Progress of a run: a bar on a terminal; else, and for parallel runs, a log line after every epoch and minute."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from cdc_mmpg.progress import Pace, describe_seconds, has_terminal

logger = logging.getLogger(__name__)


def draws_bar(enabled: bool | None) -> bool:
    """Return whether a progress bar is wanted and there is a terminal to draw it on."""
    return enabled is not False and has_terminal()


def choose_progress(enabled: bool | None, callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that show the progress of a run; none if its configuration has a progress bar.

    Args:
        enabled: whether the configuration wants a bar.
        callbacks: callbacks of the configuration.
    """
    if not draws_bar(enabled):
        return [EpochLines()]
    return [] if any(isinstance(callback, ProgressBar) for callback in callbacks) else [RunBar()]


class RunBar(TQDMProgressBar):
    """Lightning's progress bar, with epochs counted from 1 and without the version number of the log."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the bar of an epoch."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"epoch {describe_epoch(trainer)}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics beside the bar."""
        shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name != "v_num"}


class EpochLines(Callback):
    """Log line after each epoch: the loss, the monitored metric, and an estimate of the remaining time.

    Between them a long epoch, validation or test logs its step once a minute.
    """

    def __init__(self) -> None:
        self._pace, self._first = Pace(), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._pace, self._first = Pace(), trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step, if a minute has passed."""
        step, steps = batch_idx + 1, trainer.num_training_batches
        if trainer.is_global_zero and self._pace.is_line_due():
            rest = self._describe_rest(trainer, step / steps)
            shown = _list_metrics(trainer, ["train/loss"])
            logger.info("epoch %s: %s%s", describe_epoch(trainer), ", ".join([f"step {step} of {steps}", *shown]), rest)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line of the epoch; validation has already finished."""
        if not trainer.is_global_zero:
            return
        self._pace.last_line = time.monotonic()
        seconds = (time.monotonic() - self._pace.begun) / (trainer.current_epoch + 1 - self._first)
        shown = _list_metrics(trainer, ["train/loss", str(getattr(pl_module, "monitor", ""))])
        shown.append(f"{describe_seconds(seconds)} an epoch{self._describe_rest(trainer, 1)}")
        logger.info("epoch %s: %s", describe_epoch(trainer), ", ".join(shown))

    def _describe_rest(self, trainer: Trainer, share: float) -> str:
        """Return an estimate of the remaining time; `share` is how much of the current epoch is done."""
        epochs = (trainer.max_epochs or 0) - self._first
        return self._pace.describe_rest((trainer.current_epoch - self._first + share) / epochs) if epochs > 0 else ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a test."""
        self._pace = Pace()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Log the batch, if a minute has passed."""
        self._log_batch(trainer, "validating", batch_idx + 1, trainer.num_val_batches)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Log the batch, if a minute has passed."""
        self._log_batch(trainer, "testing", batch_idx + 1, trainer.num_test_batches)

    def _log_batch(self, trainer: Trainer, doing: str, number: int, batches: Sequence[int | float]) -> None:
        if trainer.is_global_zero and self._pace.is_line_due():
            logger.info("%s: batch %d of %d", doing, number, sum(batches))


def _list_metrics(trainer: Trainer, names: Sequence[str]) -> list[str]:
    """Return those of the metrics that there are, with their names."""
    metrics: dict[str, Any] = trainer.callback_metrics
    return [f"{name} {float(metrics[name]):.4f}" for name in dict.fromkeys(names) if name in metrics]


def describe_epoch(trainer: Trainer) -> str:
    """Return the current epoch, counted from 1, and the total unless `max_epochs` is -1, as text."""
    last = trainer.max_epochs or 0
    return f"{trainer.current_epoch + 1}" + (f" of {last}" if last > 0 else "")
