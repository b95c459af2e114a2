"""What is looked at after every optimizer step: whether the loss is finite, on all processes, and whether to stop.

A GPU computes a step while the next one is prepared: who asks for a loss at once waits for the GPU, and lets it wait
afterwards. So the result of a step is read when the next one is under way, and always before anything is saved.
"""

from math import isfinite
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from cdc_mmpg.errors import DivergedError
from cdc_mmpg.models.processes import gather_from_processes, is_distributed, sum_over_processes


class Posted(NamedTuple):
    """A step on its way to the host."""

    epoch: int
    step: int
    batches: list[tuple[Tensor, Tensor]]  # of this process: loss, and the samples' indices (B,)
    values: Tensor  # (2,) sums over the processes: of the losses, and of the signals by which they were told to stop
    copied: torch.cuda.Event | None  # when the values are on the host; None where they are now


class StepCheck(Callback):
    """Ends a run whose loss is not finite, on all processes together; logs `train/loss`, a step late.

    Attributes:
        told: the signal by which this process was told to stop, 0 where it was not.
        stops: whether any process was, as all of them know it: a step late where there are several.
    """

    def __init__(self) -> None:
        self.told, self.stops = 0, False
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._posted: Posted | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send this step's result to the host, and look at that of the step before.

        Raises:
            DivergedError: a loss of the step before is not finite; names its samples.
        """
        self._batches.append((outputs["loss"].detach(), batch.indices))
        if not ends_step(trainer, batch_idx):
            return
        before, self._posted = self._posted, self._post(trainer)
        if not is_distributed():
            self.stops = bool(self.told)
        if before is not None:
            loss = self._examine(before, trainer)
            pl_module.log("train/loss", torch.tensor(loss), prog_bar=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last step of the epoch."""
        self.finish(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the last step before its weights are saved."""
        self.finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last step."""
        self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Look at the step whose result nobody has read yet.

        Raises:
            DivergedError: see `on_train_batch_end`.
        """
        if self._posted is not None:
            posted, self._posted = self._posted, None
            self._examine(posted, trainer)

    def _post(self, trainer: Trainer) -> Posted:
        """Add up the step's losses over the processes, and begin to copy the sum to the host."""
        batches, self._batches = self._batches, []
        loss = torch.stack([loss for loss, _ in batches]).sum().float()
        values = sum_over_processes(torch.stack([loss, torch.full_like(loss, float(self.told))]))
        copied = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return Posted(trainer.current_epoch, trainer.global_step - 1, batches, values, copied)

    def _examine(self, posted: Posted, trainer: Trainer) -> float:
        """Return the mean loss of a step.

        Raises:
            DivergedError: it is not finite.
        """
        if posted.copied is not None:
            posted.copied.synchronize()
        total, told = posted.values.tolist()
        if is_distributed():
            self.stops = told > 0
        if not isfinite(total):
            batches = [(loss.item(), indices.tolist()) for loss, indices in posted.batches]
            gathered = [batch for own in gather_from_processes(batches) for batch in own]
            loss, samples = next((batch for batch in gathered if not isfinite(batch[0])), gathered[0])
            rate = getattr(trainer.lightning_module, "learning_rate", None)
            raise DivergedError(
                f"the loss is {loss} at epoch {posted.epoch}, step {posted.step}, on the training samples {samples}: "
                f"look at them, or lower the learning rate ({rate})"
            )
        return float(total) / trainer.world_size  # Lightning has divided by the number of accumulated batches


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether an optimizer step ends with this training batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 >= trainer.num_training_batches
