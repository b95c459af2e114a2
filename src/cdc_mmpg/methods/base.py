"""The base of all methods: the one step, the optimizer, the seeds."""

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
# The samples, those with a known answer, or what the method itself averages over the whole step.
Averages = Literal["samples", "known", "step"]

ANCHOR_BYTES = 4 * FEATURE_DIM  # of the upload: 192 float32


class ParameterCounts(NamedTuple):
    """Parameters by place, as the paper's tables count them; `trained` is those that this run changes."""

    device: int  # D-Param: encoder, head, one last layer
    cloud: int  # C-Param: what the cloud has beside them
    trained: int


class Traffic(NamedTuple):
    """Bytes between device and cloud for one adaptation."""

    up: int
    down: int


class Method(LightningModule):
    """A training run: AdamW with polynomial decay to zero on whatever has a gradient.

    Every random draw of a training step (dropout, latents, anchor frames) follows from seed, epoch, batch and process
    alone, so that a run which goes on after an interruption does what an uninterrupted one does.

    Args:
        encoder: shared by cloud and device.
        head: the task.
        train_encoder: a frozen encoder stays in evaluation mode, and its features can be computed once.
        learning_rate: at the start.
        weight_decay: AdamW's.
        seed: of the run.
    """

    reads: ClassVar[View] = "samples"  # which view of a dataset it trains on
    trains_in_turn: ClassVar[bool] = False  # whether a step may leave some of the parameters that train out
    averages: Averages = "samples"  # over what the loss of a step is the mean
    virtual: int = 0  # virtual devices of each device that trains, see `FeatureDataModule`
    jitters: bool = False  # whether these jitter colours
    needs_whole_step: str = ""  # why a step's batches cannot be accumulated; "" where they can
    monitor: str  # the best epoch is where this is best; the earlier one of two equals
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
            raise ConfigError(f"weight_decay {weight_decay} must not be negative")
        self.encoder = encoder.requires_grad_(train_encoder)
        self.head = head
        self.train_encoder = train_encoder
        self.learning_rate, self.weight_decay, self.seed = learning_rate, weight_decay, seed
        self.encoder_learning_rate = learning_rate

    def frozen(self) -> list[nn.Module]:
        """Return the parts that never train: no gradients, always in evaluation mode."""
        return [] if self.train_encoder else [self.encoder]

    def train(self, mode: bool = True) -> "Method":
        """Set training mode for all but the frozen parts."""
        super().train(mode)
        for module in self.frozen():
            module.eval()
        return self

    def encode(self, batch: Batch) -> Any:
        """Return a batch as the encoder sees it, in float32: from the encoder, or as it was kept."""
        return self.head.encode(self.encoder, batch) if isinstance(batch, VideoTextBatch) else batch

    @abstractmethod
    def _step(self, batch: Batch, split: Split) -> Tensor:
        """Return the loss of a batch, a scalar; log metrics in validation and test.

        The encoder alone computes in the precision of the run. What stands behind it is small, and rounding there
        would change labels, statistics and answers: it computes in `float32`.
        """

    def float32(self) -> torch.autocast:
        """Return a context in which nothing is rounded below float32, whatever the precision of the run."""
        return torch.autocast(self.device.type, enabled=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch: the mean over processes and accumulated batches is the step's."""
        return self._step(batch, "train") * self.weigh(batch_idx)

    def weigh(self, batch_idx: int) -> float:
        """Return the weight of a training batch in its optimizer step, see `EpochDataModule.weigh`."""
        data = getattr(self.trainer, "datamodule", None)
        if self.averages == "step" or not isinstance(data, EpochDataModule):
            return 1.0
        return data.weigh(batch_idx, known=self.averages == "known")

    def configure_callbacks(self) -> list[Callback]:
        """Add the check of the losses, where nothing that is one is there."""
        present = any(isinstance(callback, StepCheck) for callback in self.trainer.callbacks)
        return [] if present else [StepCheck()]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Update what adaptors remember of the layers that they generated, once a step."""
        for module in self.modules():
            if isinstance(module, Adaptor):
                module.settle()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log metrics of a validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log metrics of a test batch."""
        self._step(batch, "test")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step."""
        self.seed_step(batch_idx, self.global_rank)

    def seed_step(self, batch_idx: int, rank: int) -> None:
        """Begin the random numbers of a training step as the process `rank` begins them."""
        place = f"{self.seed} {self.current_epoch} {batch_idx} {rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big"))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW, its rates falling linearly to zero with every step (polynomial decay of power one).

        Deviation: the paper names optimizer, schedule and rates only. The power is 1, the betas are PyTorch's
        (0.9, 0.999), all parameters decay, those of norms and biases too, and there is no warm-up; the encoder's own
        fine-tuning recipe has betas (0.9, 0.98) and warms up for a tenth of the steps.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = self.encoder_learning_rate if name.startswith("encoder.") else self.learning_rate
                groups.setdefault(rate, []).append(parameter)
        # Fused: on a CPU six times as fast for the hypernetwork's millions of weights.
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
        """Return D-Param, C-Param and what trains."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Return the bytes of one adaptation."""

    def payloads(self) -> dict[Precision, int]:
        """Return bytes down for one adaptation by precision, where the test tries several: its cases by these names."""
        return {}

    def export(self, folder: Path) -> None:
        """Write what later runs build on into the run's folder."""


def check_rate(name: str, rate: float, remedy: str = "") -> None:
    """Refuse a learning rate that is not a positive number.

    Raises:
        ConfigError: it is not; names the argument and says the remedy.
    """
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{name} {rate} must be positive and finite{remedy}")


def check_virtual(number: int) -> int:
    """Return a number of virtual devices.

    Raises:
        ConfigError: it is negative.
    """
    if number < 0:
        raise ConfigError(f"virtual {number}: how many virtual devices each device becomes, 0 or more")
    return number


def count(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
