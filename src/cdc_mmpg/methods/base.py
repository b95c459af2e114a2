"""What all methods share: the one step, the optimizer, the seeds; and what those that answer questions share."""

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import PolynomialLR
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cdc_mmpg.data.batch import (
    UNKNOWN,
    EpochDataModule,
    FeatureBatch,
    SessionBatch,
    Split,
    VideoTextBatch,
    View,
    others,
)
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import Outcomes
from cdc_mmpg.methods.step_check import StepCheck
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import FDA, Adaptor
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import Head, LastLayer
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS, Precision, count_matrix_bytes

Batch = VideoTextBatch | FeatureBatch | SessionBatch
# The samples, those with a known answer, or what the method itself averages over the whole step.
Averages = Literal["samples", "known", "step"]

ANCHOR_BYTES = 4 * FEATURE_DIM  # of the upload: 192 float32
READ = "read"  # rows that hold what head and hypernetwork read
CHUNK = 256  # samples whose layers are applied at once


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
        """Parts that never train: no gradients, always in evaluation mode."""
        return [] if self.train_encoder else [self.encoder]

    def train(self, mode: bool = True) -> "Method":
        """Training mode for all but the frozen parts."""
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
        """Metrics of a validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics of a test batch."""
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
        """D-Param, C-Param and what trains."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes for one adaptation."""

    def payloads(self) -> dict[Precision, int]:
        """Bytes down for one adaptation by precision, where the test tries several: its cases by these names."""
        return {}

    def export(self, folder: Path) -> None:
        """Write what later runs build on into the run's folder."""


class Rows(Metric):
    """What evaluation keeps of the samples, of all processes, in the samples' order; each is counted once."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("indices", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Rows (R,) and (R, X) of a batch."""
        self.indices.append(indices)
        self.values.append(values)

    def compute(self) -> tuple[Any, Any]:
        """All rows, as arrays."""
        indices, values = dim_zero_cat(self.indices), dim_zero_cat(self.values)
        order = torch.argsort(indices, stable=True)
        return indices[order].cpu().numpy(), values[order].cpu().numpy()


class Answering(Method):
    """A method that answers: encoder, head, and a last layer that the subclass provides.

    Args:
        encoder, head, train_encoder, learning_rate, weight_decay, seed: see `Method`.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        train_encoder: bool,
        learning_rate: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__(encoder, head, train_encoder, learning_rate, weight_decay, seed)
        self.outcomes: dict[Split, Outcomes] = {}  # of the last evaluation of each split
        self._rows: dict[str, Rows] = {}

    @property
    def monitor(self) -> str:  # type: ignore[override]  # which is best is for the task to say
        """See `Head`."""
        return self.head.monitor

    @property
    def averages(self) -> Averages:  # type: ignore[override]
        """Over what the task's loss is the mean."""
        return "known" if self.head.adds_up else "step"

    @property
    def needs_whole_step(self) -> str:  # type: ignore[override]
        """See `Head`."""
        return "" if self.head.adds_up else "every clip of a step is a negative of all others of the step"

    @abstractmethod
    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """The last layer that belongs to clips with these features (B, T, 192)."""

    @abstractmethod
    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """The same layers as a device installs them: weight (B, L, D), bias (B, L)."""

    def upload(self, frame_features: Tensor) -> Tensor:
        """The feature that a device uploads (..., 192) of clips whose condition is (..., T, 192)."""
        return self.encoder.pool(frame_features.mean(-2))

    def served(self) -> "Served":
        """What a deployment needs of the method, beside encoder and head.

        Raises:
            ConfigError: this method generates nothing, or nothing that an upload decides.
        """
        raise ConfigError(
            f"{type(self).__name__} sends nothing from a cloud: take a method that generates its last layer "
            "(METHOD=cdc_mmpg_session, cdc_mmpg or hyper)"
        )

    def fused(self, frame_features: Tensor) -> Tensor:
        """What the head reads, (..., 192), of clips with features (..., T, 192): m̄, or the mean before the pooler."""
        mean = frame_features.mean(-2)
        return self.encoder.pool(mean) if self.head.pooled else mean

    def forward(self, frame_features: Tensor) -> Tensor:
        """The head's outputs for clips with their texts, from their frame features (B, ..., T, 192)."""
        return self.head(self.fused(frame_features), self.last_layer(frame_features))

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """The head's outputs by case; the first is the method's own, which trains and decides the best epoch.

        The others are controls of the test: what becomes of the answers when an input of the adaptation is another.
        """
        return {"own": self(batch.frame_features)}

    def _step(self, batch: Batch, split: Split) -> Tensor:
        encoded = self.encode(batch)
        with self.float32():
            return self._evaluate_batch(encoded, split)

    def _evaluate_batch(self, encoded: Any, split: Split) -> Tensor:
        """Do what `_step` does with a batch as `encode` returns it."""
        cases = self.scores(encoded, split)
        samples = encoded.samples if isinstance(encoded, SessionBatch) else encoded
        loss = self.head.loss(next(iter(cases.values())), samples)
        if split != "train":
            if self.head.adds_up:
                # The loss is the mean of these; whole numbers are cut over processes.
                known = float((encoded.labels != UNKNOWN).sum())
                self.log(f"{split}/loss", loss, batch_size=known, sync_dist=True)
            for case, rows in self.head.outcomes(cases, samples).items():
                self.keep(case, *rows)
            # In one order on all processes: each of these is a collective.
            for case in (name for name in self.payloads() if name in cases):
                for name, value in self.head.compare(cases["float32"], cases[case]).items():
                    self.log(f"{split}/{case}_{name}", value, batch_size=float(len(encoded.labels)), sync_dist=True)
        return loss

    def keep(self, case: str, indices: Tensor, values: Tensor) -> None:
        """Add to the rows of a case: (R,) of which sample, (R, X) what."""
        self._rows.setdefault(case, Rows().to(self.device)).update(indices, values)

    def on_validation_epoch_end(self) -> None:
        """Metrics of the whole split, on every process the same."""
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        """Metrics of the whole split, on every process the same."""
        self._evaluate("test")

    def _evaluate(self, split: Split) -> None:
        kept = {case: rows.compute() for case, rows in self._rows.items()}
        self._rows = {}
        self.outcomes[split] = self.completed(kept)
        for name, value in self.head.evaluate(self.outcomes[split]).items():
            # The same on every process already; Lightning warns unless it is told to take their mean.
            self.log(f"{split}/{name}", value, prog_bar=f"{split}/{name}" == self.monitor, sync_dist=True)

    def completed(self, outcomes: Outcomes) -> Outcomes:
        """The outcomes of a whole split, after what can only be said when all of it is known."""
        return outcomes

    def cloud_modules(self) -> list[nn.Module]:
        """What only the cloud has."""
        return []

    def parameter_counts(self) -> ParameterCounts:
        """D-Param, C-Param and what trains."""
        last_layer = self.head.outputs * (self.head.inputs + 1)
        return ParameterCounts(
            device=count(self.encoder) + count(self.head) + last_layer,
            cloud=sum(map(count, self.cloud_modules())),
            trained=sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
        )


class Generating(Answering):
    """A method whose last layer is made by a hypernetwork in the cloud.

    Args:
        encoder, head, train_encoder, learning_rate, weight_decay, seed: see `Method`.
        fda: the hypernetwork.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        fda: FDA,
        train_encoder: bool,
        learning_rate: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__(encoder, head, train_encoder, learning_rate, weight_decay, seed)
        self.fda = fda

    def generator_input(self, frame_features: Tensor) -> Tensor:
        """What the hypernetwork reads, (..., 192), of clips whose condition is (..., T, 192)."""
        return self.upload(frame_features)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Also, in the test: with one layer for everyone, and with layers sent in several precisions.

        What the head and the hypernetwork read is kept, to put other samples' layers to the test at the end of it.
        """
        features = batch.frame_features
        cases = {"own": self(features)}
        if split == "test":
            fused, read = self.fused(features), self.generator_input(self.head.condition(features))
            cases["mean_head"] = self.head(fused, self.fda.average)
            for name in PAYLOAD_PRECISIONS:
                cases[name] = self.head(fused, lambda hidden, name=name: self.fda.sent(read, hidden, name))
            self._shape = fused.shape[1:], read.shape[1:]
            known = batch.labels[:, None].to(fused.dtype)  # float32, which holds every label exactly
            self.keep(READ, batch.indices, torch.cat([known, fused.flatten(1), read.flatten(1)], dim=-1))
        return cases

    def completed(self, outcomes: Outcomes) -> Outcomes:
        """Also, in the test: with the layer of another sample (see `batch.others`)."""
        if READ not in outcomes:
            return outcomes
        indices, rows = (torch.from_numpy(part).to(self.device) for part in outcomes[READ])
        labels, values = rows[:, 0].long(), rows[:, 1:]
        fused_shape, shape = self._shape
        fused = values[:, : -shape.numel()].unflatten(1, fused_shape)
        read = values[:, -shape.numel() :].unflatten(1, shape)
        found = {case: outcomes[case] for case in outcomes if case != READ}
        for case, other in others(self.trainer.datamodule.origins("test"), self.seed).items():
            chunks, theirs = [], torch.tensor(other, device=self.device)
            for part in torch.arange(len(indices), device=self.device).split(CHUNK):
                given = self.head(fused[part], lambda hidden, own=read[theirs[part]]: self.fda(own, hidden))
                samples = FeatureBatch(fused[part], labels[part], indices[part])
                chunks.append(self.head.predictions(given, samples))
            found[case] = outcomes["own"][0], torch.cat(chunks).cpu().numpy()
        return found

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Every sample's own layer, applied without being held."""
        feature = self.generator_input(self.head.condition(frame_features))
        return lambda hidden: self.fda(feature, hidden)

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Every sample's own layer."""
        return self.fda.generate(self.generator_input(self.head.condition(frame_features)))

    def served(self) -> "Served":
        """The hypernetwork; offline, the mean of the layers that training generated."""
        rows = self.fda.average(torch.eye(self.fda.inputs + 1, self.fda.inputs, device=self.device))
        return Served(Generator(nn.Identity(), self.fda), torch.cat([rows[:-1] - rows[-1], rows[-1:]]).T)

    def cloud_modules(self) -> list[nn.Module]:
        """The hypernetwork."""
        return self.fda.cloud_modules()

    def traffic(self) -> Traffic:
        """One feature up, one float32 layer down, for every layer of a sample."""
        return Traffic(self.head.layers * ANCHOR_BYTES, self.payloads()["float32"])

    def payloads(self) -> dict[Precision, int]:
        """Every layer of a sample, whole."""
        return {name: self.head.layers * count_matrix_bytes(self.fda.shapes, name) for name in PAYLOAD_PRECISIONS}


class Served(NamedTuple):
    """What a deployment needs of a method, beside encoder and head."""

    generator: Generator  # in the cloud
    offline: Tensor  # (L, D + 1) the layer, its last column the bias, of a device that was sent none


def check_rate(name: str, rate: float, remedy: str = "") -> None:
    """Refuse a learning rate that is not a positive number.

    Raises:
        ConfigError: it is not; names the argument and says the remedy.
    """
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{name} {rate} must be positive and finite{remedy}")


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
