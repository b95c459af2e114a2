"""Robust checkpoints: atomic saves, fallback to the previous one, and a clean stop on a signal."""

import logging
import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from cdc_mmpg.errors import CDCError, CheckpointError
from cdc_mmpg.files import atomic_write, remove_leftovers
from cdc_mmpg.methods.step_check import StepCheck, is_step_end
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.program import REQUEUE_SIGNAL, Stopped, drop_terminal, ignore_stop_signals, stop_signals
from cdc_mmpg.results import RESUME

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Atomic saves for Lightning, and loads that run no code.

    Lightning's default save writes the file elsewhere and moves it: across file systems, a kill during the move leaves
    a truncated file in place of the good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a temporary file in the same folder, sync it to disk, and rename it."""
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
        except (CDCError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            raise CheckpointError(
                f"{path}: cannot be saved; the previous checkpoint is unchanged: make room, or make the folder "
                f"writable, and run the same command again ({error.__cause__ or error.__context__ or error})"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU and verify its checksums."""
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it exists."""
        Path(path).unlink(missing_ok=True)


def build_checkpoint_callbacks(run: Path, monitor: str, mode: str) -> list[Callback]:
    """Return callbacks that save the best weights to `best.ckpt`, then the last two complete states for resuming.

    The order matters: a state must not refer to a best epoch whose weights are not yet on disk.
    """
    return [
        ModelCheckpoint(
            run, "best", monitor=monitor, mode=mode, save_weights_only=True,
            save_on_train_epoch_end=True, enable_version_counter=False,
        ),
        ModelCheckpoint(
            run / RESUME, "{epoch}-{step}", monitor="step", mode="max", save_top_k=2,
            save_on_train_epoch_end=True, enable_version_counter=False,
        ),
    ]  # fmt: skip


def find_newest_state(run: Path) -> Path | None:
    """Return the newest complete state of a run, None if there is none; delete temporaries of killed processes.

    A damaged state is logged, and the previous one used.

    Raises:
        CheckpointError: all states are damaged.
    """
    folder = run / RESUME
    if not folder.is_dir():
        return None
    for parent in (run, folder):
        remove_leftovers(parent)
    states = sorted(folder.glob("*.ckpt"), key=_step, reverse=True)
    for place, state in enumerate(states):
        try:
            load_checkpoint(state)
        except CheckpointError as error:
            logger.warning("%s; trying the state saved before it", error)
            continue
        for old in states[place + 2 :]:
            old.unlink(missing_ok=True)  # other processes of this run delete it, too
        return state
    if states:
        raise CheckpointError(f"{folder}: all {len(states)} states are damaged: delete {run} to train anew")
    return None


def _step(state: Path) -> tuple[int, str]:
    match = re.search(r"step=(\d+)", state.name)
    return (int(match[1]) if match else -1, state.name)


class StopOnSignal(StepCheck):
    """Clean stop on SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1: end the step, save the state, exit with 128 + number.

    A signal during validation takes effect at the end of the epoch, which saves the state anyway. A second signal more
    than 1 s later exits at once, except after SIGUSR1, which SLURM may repeat. All processes of a run stop together.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run
        self._signal_time = 0.0
        self._former_handlers: dict[int, Any] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Convert the epoch's batch counts to this run's number of devices: the saved run may have had another."""
        if trainer.state.fn == "fit":
            counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            more = trainer.datamodule.count_taken_batches(counts["processed"]) - counts["processed"]
            counts.update({name: count + more for name, count in counts.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        for number in stop_signals():
            self._former_handlers[number] = signal.signal(number, self._record_signal)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous signal handlers; exit if a signal came after the last step."""
        super().on_train_end(trainer, pl_module)
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        if self._is_asked_to_stop(trainer):
            self._exit(trainer)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        drop_terminal(number)
        # Within a second it is the same stop: a group may get the signal twice.
        if self.stop_signal not in (0, REQUEUE_SIGNAL) and time.monotonic() > self._signal_time + 1:
            raise Stopped(number)
        if not self.stop_signal:
            self.stop_signal, self._signal_time = number, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit at the end of a step, unless the epoch ends with it."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last = batch_idx + 1 >= trainer.num_training_batches
        if not self.should_stop or last or not is_step_end(trainer, batch_idx):
            return
        trainer.save_checkpoint(self.run / RESUME / f"stopped-step={trainer.global_step}.ckpt")
        self._exit(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exit if a signal came; the end of the previous epoch has saved the state."""
        if self._is_asked_to_stop(trainer):
            self._exit(trainer)

    def _is_asked_to_stop(self, trainer: Trainer) -> bool:
        """Return whether any process got a signal; the result is the same on all processes."""
        return trainer.strategy.reduce_boolean_decision(bool(self.stop_signal), all=False)

    def _exit(self, trainer: Trainer) -> None:
        received = torch.tensor(self.stop_signal, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))  # 0 on processes that got no signal
        if number == REQUEUE_SIGNAL:
            ignore_stop_signals()  # see `cdc_mmpg.program`
        raise Stopped(number)
