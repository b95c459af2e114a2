"""Progress of a run: a bar on a terminal; else, and for parallel runs, a log line after every epoch."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

logger = logging.getLogger(__name__)


def draws_bar(enabled: bool | None) -> bool:
    """Return whether a progress bar is wanted and there is a terminal to draw it on."""
    return enabled is not False and sys.stderr is not None and sys.stderr.isatty()


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
    """Log line after each epoch: the loss, the monitored metric, and an estimate of the remaining time."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line; validation has already finished."""
        if not trainer.is_global_zero:
            return
        number, last = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = (time.monotonic() - self._begun) / (number - self._first)
        names = ("train/loss", str(getattr(pl_module, "monitor", "")))
        metrics: dict[str, Any] = trainer.callback_metrics
        shown = [f"{name} {float(metrics[name]):.4f}" for name in dict.fromkeys(names) if name in metrics]
        left = f", about {seconds * (last - number):.0f} s left" if last > number else ""
        logger.info("epoch %s: %s, %.1f s an epoch%s", describe_epoch(trainer), ", ".join(shown), seconds, left)


def describe_epoch(trainer: Trainer) -> str:
    """Return the current epoch, counted from 1, and the total unless `max_epochs` is -1, as text."""
    last = trainer.max_epochs or 0
    return f"{trainer.current_epoch + 1}" + (f" of {last}" if last > 0 else "")
