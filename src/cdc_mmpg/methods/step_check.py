"""Check after every optimizer step, across all processes: is the loss finite, and should the run stop?

A GPU computes a step while the CPU prepares the next one; reading a loss immediately would stall both. Therefore the
result of a step is read during the next step, and always before anything is saved.
"""

from math import isfinite
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from cdc_mmpg.errors import DivergedError
from cdc_mmpg.models.processes import gather_from_processes, is_distributed, sum_over_processes


class PendingStep(NamedTuple):
    """Result of a step that is being copied to the host."""

    epoch: int
    step: int
    batches: list[tuple[Tensor, Tensor]]  # of this process: loss and indices of the samples (B,)
    values: Tensor  # (2,) sums over the processes of the losses and of the stop signals
    copied: torch.cuda.Event | None  # recorded after the copy to the host; None if the values are there already


class StepCheck(Callback):
    """Callback that ends a run with a non-finite loss on all processes; logs `train/loss` one step late.

    Attributes:
        stop_signal: number of the signal that asked this process to stop, 0 if none did.
        should_stop: whether any process was asked to stop; equal on all processes, one step late if there are several.
    """

    def __init__(self) -> None:
        self.stop_signal, self.should_stop = 0, False
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._pending: PendingStep | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start copying the result of this step to the host, and check that of the previous step.

        Raises:
            DivergedError: a loss of the previous step is not finite; the message names its samples.
        """
        self._batches.append((outputs["loss"].detach(), batch.indices))
        if not is_step_end(trainer, batch_idx):
            return
        previous, self._pending = self._pending, self._start_copy(trainer)
        if not is_distributed():
            self.should_stop = bool(self.stop_signal)
        if previous is not None:
            loss = self._check_loss(previous, trainer)
            pl_module.log("train/loss", torch.tensor(loss), prog_bar=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last step of the epoch."""
        self.check_pending(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the last step before its weights are saved."""
        self.check_pending(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last step."""
        self.check_pending(trainer)

    def check_pending(self, trainer: Trainer) -> None:
        """Check the step whose result has not been read yet, if any.

        Raises:
            DivergedError: see `on_train_batch_end`.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._check_loss(pending, trainer)

    def _start_copy(self, trainer: Trainer) -> PendingStep:
        """Sum the losses of the step over the processes and start copying the sum to the host."""
        batches, self._batches = self._batches, []
        loss = torch.stack([loss for loss, _ in batches]).sum().float()
        values = sum_over_processes(torch.stack([loss, torch.full_like(loss, float(self.stop_signal))]))
        copied = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return PendingStep(trainer.current_epoch, trainer.global_step - 1, batches, values, copied)

    def _check_loss(self, pending: PendingStep, trainer: Trainer) -> float:
        """Return the mean loss of a step.

        Raises:
            DivergedError: the loss is not finite.
        """
        if pending.copied is not None:
            pending.copied.synchronize()
        total, signals = pending.values.tolist()
        if is_distributed():
            self.should_stop = signals > 0
        if not isfinite(total):
            batches = [(loss.item(), indices.tolist()) for loss, indices in pending.batches]
            gathered = [batch for part in gather_from_processes(batches) for batch in part]
            loss, samples = next((batch for batch in gathered if not isfinite(batch[0])), gathered[0])
            rate = getattr(trainer.lightning_module, "learning_rate", None)
            raise DivergedError(
                f"the loss is {loss} in epoch {pending.epoch + 1}, step {pending.step}, on training samples {samples} "
                f"(indices from 0): lower the learning rate (--model.init_args.learning_rate, now {rate}), or inspect "
                "these samples"
            )
        return float(total) / trainer.world_size  # Lightning has already divided by the number of accumulated batches


def is_step_end(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether an optimizer step ends with this training batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 >= trainer.num_training_batches
