"""Checkpoints that survive: atomic saves, a fall-back to the one before, and a clean stop on a signal."""

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
from cdc_mmpg.methods.step_check import StepCheck, ends_step
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.program import REQUEUE, Stopped, drop_terminal, ignore_stop_signals, stop_signals
from cdc_mmpg.results import RESUME

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's saves, each whole or not at all, and loads that run no code.

    Lightning's own save stages the file elsewhere and moves it: killed at the wrong moment across file systems, it
    leaves a truncated file in place of the good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a temporary in the same folder, make it durable, and rename it."""
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
        except (CDCError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            raise CheckpointError(
                f"{path}: cannot be saved; the checkpoint before it is untouched: make room, or make the folder "
                f"writable, and type the same command again ({error.__cause__ or error.__context__ or error})"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, its checksums verified, on the CPU."""
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it is there."""
        Path(path).unlink(missing_ok=True)


def build_checkpoint_callbacks(run: Path, monitor: str, mode: str) -> list[Callback]:
    """Return callbacks that keep the best weights in `best.ckpt`, then the last two complete states for resuming.

    The best comes first: a state must never know of a best epoch whose weights are not on the disk.
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
    """Return the newest complete state of a run, None where there is none yet; clear what a killed process left.

    A damaged state is reported, and the one before it taken.

    Raises:
        CheckpointError: there are states, all damaged.
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
            logger.warning("%s; going on from the state before it", error)
            continue
        for old in states[place + 2 :]:
            old.unlink(missing_ok=True)  # other processes of this run clear, too
        return state
    if states:
        raise CheckpointError(f"{folder}: all {len(states)} states are damaged: delete {run} to train anew")
    return None


def _step(state: Path) -> tuple[int, str]:
    match = re.search(r"step=(\d+)", state.name)
    return (int(match[1]) if match else -1, state.name)


class StopOnSignal(StepCheck):
    """SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1 end the step, save the state, and leave with 128 + their number.

    While validation runs, the epoch's end, which saves by itself, is waited for; a second signal leaves at once, but
    not after SIGUSR1: SLURM sends more of them by itself. All processes of a run stop together.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run
        self._when = 0.0
        self._former: dict[int, Any] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the batches of the epoch as this run shares them out: before, there may have been other devices."""
        if trainer.state.fn == "fit":
            counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            more = trainer.datamodule.count_taken(counts["processed"]) - counts["processed"]
            counts.update({name: count + more for name, count in counts.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        for number in stop_signals():
            self._former[number] = signal.signal(number, self._note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, and leave if one came too late for training."""
        super().on_train_end(trainer, pl_module)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._is_asked_to_stop(trainer):
            self._leave(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        drop_terminal(number)
        # A second signal, and not the same one to a whole group.
        if self.told not in (0, REQUEUE) and time.monotonic() > self._when + 1:
            raise Stopped(number)
        if not self.told:
            self.told, self._when = number, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave at the end of a step, unless the epoch is about to end, too."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last = batch_idx + 1 >= trainer.num_training_batches
        if not self.stops or last or not ends_step(trainer, batch_idx):
            return
        trainer.save_checkpoint(self.run / RESUME / f"stopped-step={trainer.global_step}.ckpt")
        self._leave(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave; the end of the epoch before has saved."""
        if self._is_asked_to_stop(trainer):
            self._leave(trainer)

    def _is_asked_to_stop(self, trainer: Trainer) -> bool:
        """Return the same answer on every process."""
        return trainer.strategy.reduce_boolean_decision(bool(self.told), all=False)

    def _leave(self, trainer: Trainer) -> None:
        told = torch.tensor(self.told, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(told, reduce_op="max"))  # of whichever process was told
        if number == REQUEUE:
            ignore_stop_signals()  # see `training.cli`
        raise Stopped(number)
