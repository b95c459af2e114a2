"""Base class of all methods: training step, optimizer and seeding."""

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from cdc_mmpg.data.batch import FeatureBatch, SessionBatch, Split, VideoTextBatch, View
from cdc_mmpg.data.sampling import EpochDataModule
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.step_check import StepCheck
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import Adaptor
from cdc_mmpg.models.heads import Head
from cdc_mmpg.wire.payloads import Precision

Batch = VideoTextBatch | FeatureBatch | SessionBatch
# What a step's loss is averaged over: all samples, those with a known answer, or "step": the method averages itself.
Averages = Literal["samples", "known", "step"]

ANCHOR_BYTES = 4 * FEATURE_DIM  # size of an upload: 192 float32 values


class ParameterCounts(NamedTuple):
    """Parameter counts by place, as in the paper's tables."""

    device: int  # D-Param: encoder, head, one last layer
    cloud: int  # C-Param: additional parameters in the cloud
    trained: int  # parameters that this run changes


class Traffic(NamedTuple):
    """Bytes sent between device and cloud for one adaptation."""

    up: int
    down: int


class Method(LightningModule):
    """Training run with AdamW and polynomial decay to zero for all parameters that require a gradient.

    Every random draw of a training step (dropout, latents, anchor frames) depends on seed, epoch, batch and process
    only, so that a resumed run matches an uninterrupted one.

    Args:
        encoder: encoder, shared by cloud and device.
        head: head of the task.
        train_encoder: whether the encoder trains; a frozen one stays in evaluation mode, and its features are cached.
        learning_rate: initial learning rate.
        weight_decay: weight decay of AdamW.
        seed: seed of the run.
    """

    reads: ClassVar[View] = "samples"  # view of the dataset that the method trains on
    trains_in_turn: ClassVar[bool] = False  # whether a step may leave out some of the trained parameters
    averages: Averages = "samples"  # what the loss of a step is averaged over
    virtual: int = 0  # virtual devices per training device, see `FeatureDataModule`
    jitters: bool = False  # whether virtual devices jitter colours
    needs_whole_step: str = ""  # why batches cannot be accumulated; "" if they can
    monitor: str  # metric that selects the best epoch; the earlier one of equals
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        train_encoder: bool,
        learning_rate: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__()
        check_rate("learning_rate", learning_rate)
        if not 0 <= weight_decay < float("inf"):
            raise ConfigError(f"weight_decay is {weight_decay}: must be at least 0 and finite")
        self.encoder = encoder.requires_grad_(train_encoder)
        self.head = head
        self.train_encoder = train_encoder
        self.learning_rate, self.weight_decay, self.seed = learning_rate, weight_decay, seed
        self.encoder_learning_rate = learning_rate

    def frozen_modules(self) -> list[nn.Module]:
        """Return the modules that never train: without gradients, always in evaluation mode."""
        return [] if self.train_encoder else [self.encoder]

    def train(self, mode: bool = True) -> "Method":
        """Set the mode of all modules but the frozen ones."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def encode(self, batch: Batch) -> Any:
        """Return the encoder's features of a batch in float32; a batch of cached features is returned unchanged."""
        return self.head.encode(self.encoder, batch) if isinstance(batch, VideoTextBatch) else batch

    @abstractmethod
    def _step(self, batch: Batch, split: Split) -> Tensor:
        """Return the loss of a batch, a scalar; log metrics in validation and test.

        Only the encoder computes in the precision of the run. The modules after it are small, and rounding there would
        change labels, statistics and answers: they compute in `float32`.
        """

    def float32(self) -> torch.autocast:
        """Return a context that computes in float32 regardless of the precision of the run."""
        return torch.autocast(self.device.type, enabled=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch, whose mean over processes and accumulated batches is the step's loss."""
        return self._step(batch, "train") * self.weigh(batch_idx)

    def weigh(self, batch_idx: int) -> float:
        """Return the weight of a training batch in its optimizer step, see `EpochDataModule.weigh`."""
        data = getattr(self.trainer, "datamodule", None)
        if self.averages == "step" or not isinstance(data, EpochDataModule):
            return 1.0
        return data.weigh(batch_idx, known=self.averages == "known")

    def configure_callbacks(self) -> list[Callback]:
        """Add a `StepCheck` unless the trainer already has one."""
        present = any(isinstance(callback, StepCheck) for callback in self.trainer.callbacks)
        return [] if present else [StepCheck()]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Update the running means of the adaptors, once per step."""
        for module in self.modules():
            if isinstance(module, Adaptor):
                module.update_mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log metrics of a validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log metrics of a test batch."""
        self._step(batch, "test")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the random numbers of the step."""
        self.seed_step(batch_idx, self.global_rank)

    def seed_step(self, batch_idx: int, rank: int) -> None:
        """Seed the random numbers of a training step as process `rank` does."""
        place = f"{self.seed} {self.current_epoch} {batch_idx} {rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big"))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW with learning rates that decay linearly to zero over the steps (polynomial of power 1).

        Deviation: the paper names optimizer, schedule and rates only. The power is 1, the betas are PyTorch's
        (0.9, 0.999), all parameters decay, those of norms and biases too, and there is no warm-up; the encoder's own
        fine-tuning recipe has betas (0.9, 0.98) and warms up for a tenth of the steps.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = self.encoder_learning_rate if name.startswith("encoder.") else self.learning_rate
                groups.setdefault(rate, []).append(parameter)
        # Fused: six times as fast on a CPU for the hypernetwork's millions of weights.
        optimizer = AdamW(
            [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
            weight_decay=self.weight_decay,
            fused=True,
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": PolynomialLR(optimizer, total_iters=steps), "interval": "step"},
        }

    @abstractmethod
    def parameter_counts(self) -> ParameterCounts:
        """Return the counts of device, cloud and trained parameters (D-Param, C-Param)."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Return the bytes sent for one adaptation."""

    def payloads(self) -> dict[Precision, int]:
        """Return the download of one adaptation in bytes by precision, for methods that test several as cases."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the files that later runs build on into the folder of the run."""


def check_rate(name: str, rate: float, remedy: str = "") -> None:
    """Refuse a learning rate that is not a positive number.

    Raises:
        ConfigError: it is not; the message names the argument and ends with the remedy.
    """
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{name} {rate} must be positive and finite{remedy}")


def check_virtual(number: int) -> int:
    """Return a number of virtual devices, refusing negative ones.

    Raises:
        ConfigError: the number is negative.
    """
    if number < 0:
        raise ConfigError(f"virtual {number}: the number of virtual devices per device must not be negative")
    return number


def count(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
