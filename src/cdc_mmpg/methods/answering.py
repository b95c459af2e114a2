"""Base classes of methods that answer questions: last layer, test cases and outcomes; static or generated."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, SessionBatch, Split
from cdc_mmpg.data.control_cases import draw_control_partners
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import Outcomes
from cdc_mmpg.methods.base import ANCHOR_BYTES, Averages, Batch, Method, ParameterCounts, Traffic, count
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import FDA
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import Head, LastLayer
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS, Precision, count_matrix_bytes

KEPT_INPUTS = "read"  # case under which the inputs of head and hypernetwork are kept until the end of the test
MAX_LAYERS_AT_ONCE = 256  # samples whose layers are applied in one pass


class SampleRows(Metric):
    """Rows that evaluation keeps of the samples of all processes, in the order of the samples."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("indices", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Add the rows of a batch: indices of the samples (R,) and values (R, X)."""
        self.indices.append(indices)
        self.values.append(values)

    def compute(self) -> tuple[Any, Any]:
        """Return indices (N,) and values (N, X) of all rows, as numpy arrays."""
        indices, values = dim_zero_cat(self.indices), dim_zero_cat(self.values)
        order = torch.argsort(indices, stable=True)
        return indices[order].cpu().numpy(), values[order].cpu().numpy()


class Answering(Method):
    """Base of methods that answer questions with encoder, head, and a last layer that the subclass provides.

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
        self.outcomes: dict[Split, Outcomes] = {}  # results of the last evaluation of each split
        self._rows: dict[str, SampleRows] = {}

    @property
    def monitor(self) -> str:  # type: ignore[override]  # depends on the task
        """Metric that selects the best epoch, see `Head`."""
        return self.head.monitor

    @property
    def averages(self) -> Averages:  # type: ignore[override]
        """Samples that the task's loss is averaged over."""
        return "known" if self.head.has_sample_loss else "step"

    @property
    def needs_whole_step(self) -> str:  # type: ignore[override]
        """Reason why batches cannot be accumulated, see `Method`."""
        return "" if self.head.has_sample_loss else "every clip of a step is a negative for all other clips of the step"

    @abstractmethod
    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return the last layer for clips with features (B, ..., T, 192)."""

    @abstractmethod
    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layers of `last_layer` as a device installs them: weight (B, L, D), bias (B, L)."""

    def upload(self, frame_features: Tensor) -> Tensor:
        """Return the feature (..., 192) that a device uploads for clips with condition (..., T, 192)."""
        return self.encoder.pool(frame_features.mean(-2))

    def deployment_parts(self) -> "DeploymentParts":
        """Return the parts of the method that a deployment needs, apart from encoder and head.

        Raises:
            ConfigError: the method generates no layers, or none that can be generated from an upload.
        """
        raise ConfigError(
            f"{type(self).__name__} sends nothing from a cloud: use a method that generates its last layer "
            "(METHOD=cdc_mmpg_session, cdc_mmpg or hyper)"
        )

    def fuse(self, frame_features: Tensor) -> Tensor:
        """Return the input of the head (..., 192) for features (..., T, 192): m̄, or the mean before the pooler."""
        mean = frame_features.mean(-2)
        return self.encoder.pool(mean) if self.head.pooled else mean

    def forward(self, frame_features: Tensor) -> Tensor:
        """Return the head's outputs for clips with their texts, given frame features (B, ..., T, 192)."""
        return self.head(self.fuse(frame_features), self.last_layer(frame_features))

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Return the head's outputs by case; the first case is used for training and for selecting the best epoch.

        The other cases are test-time controls, in which an input of the adaptation is replaced.
        """
        return {"own": self(batch.frame_features)}

    def training_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss that training minimises: the task's, unless a method defines another."""
        return self.head.loss(outputs, batch)

    def _step(self, batch: Batch, split: Split) -> Tensor:
        encoded = self.encode(batch)
        with self.float32():
            return self._evaluate_batch(encoded, split)

    def _evaluate_batch(self, encoded: Any, split: Split) -> Tensor:
        """Return the loss of a batch returned by `encode`, and record its outcomes; see `_step`."""
        cases = self.scores(encoded, split)
        samples = encoded.samples if isinstance(encoded, SessionBatch) else encoded
        outputs = next(iter(cases.values()))
        loss = self.training_loss(outputs, samples) if split == "train" else self.head.loss(outputs, samples)
        if split != "train":
            if self.head.has_sample_loss:
                # A float: Lightning truncates integer batch sizes when it averages over processes.
                known = float((encoded.labels != UNKNOWN_LABEL).sum())
                self.log(f"{split}/loss", loss, batch_size=known, sync_dist=True)
            for case, rows in self.head.outcomes(cases, samples).items():
                self.keep(case, *rows)
            # The same order on all processes: every log call is a collective operation.
            for case in (name for name in self.payloads() if name in cases):
                for name, value in self.head.compare(cases["float32"], cases[case]).items():
                    self.log(f"{split}/{case}_{name}", value, batch_size=float(len(encoded.labels)), sync_dist=True)
        return loss

    def keep(self, case: str, indices: Tensor, values: Tensor) -> None:
        """Add rows to a case: indices of the samples (R,) and values (R, X)."""
        self._rows.setdefault(case, SampleRows().to(self.device)).update(indices, values)

    def on_validation_epoch_end(self) -> None:
        """Log metrics of the complete split, equal on every process."""
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        """Log metrics of the complete split, equal on every process."""
        self._evaluate("test")

    def _evaluate(self, split: Split) -> None:
        kept = {case: rows.compute() for case, rows in self._rows.items()}
        self._rows = {}
        self.outcomes[split] = self.complete_outcomes(kept)
        for name, value in self.head.evaluate(self.outcomes[split]).items():
            # The values are equal on every process; without sync_dist Lightning would warn.
            self.log(f"{split}/{name}", value, prog_bar=f"{split}/{name}" == self.monitor, sync_dist=True)

    def complete_outcomes(self, outcomes: Outcomes) -> Outcomes:
        """Return the outcomes of a complete split, with cases added that need all of its samples."""
        return outcomes

    def cloud_modules(self) -> list[nn.Module]:
        """Return the modules that run in the cloud only."""
        return []

    def parameter_counts(self) -> ParameterCounts:
        """Return the counts of device, cloud and trained parameters (D-Param, C-Param)."""
        last_layer = self.head.outputs * (self.head.inputs + 1)
        return ParameterCounts(
            device=count(self.encoder) + count(self.head) + last_layer,
            cloud=sum(map(count, self.cloud_modules())),
            trained=sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
        )


class Generating(Answering):
    """Base of methods whose last layer is generated by a hypernetwork in the cloud.

    Args:
        encoder, head, train_encoder, learning_rate, weight_decay, seed: see `Method`.
        fda: hypernetwork that generates the last layer.
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
        """Return the input of the hypernetwork (..., 192) for clips with condition (..., T, 192)."""
        return self.upload(frame_features)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Add test cases with the mean layer for all samples, and with layers sent in several precisions.

        The inputs of head and hypernetwork are kept, to apply the layers of other samples at the end of the test.
        """
        features = batch.frame_features
        cases = {"own": self(features)}
        if split == "test":
            fused, read = self.fuse(features), self.generator_input(self.head.condition(features))
            cases["mean_head"] = self.head(fused, self.fda.average)
            for name in PAYLOAD_PRECISIONS:
                cases[name] = self.head(fused, lambda hidden, name=name: self.fda.apply_rounded(read, hidden, name))
            self._shape = fused.shape[1:], read.shape[1:]
            known = batch.labels[:, None].to(fused.dtype)  # float32, which holds every label exactly
            self.keep(KEPT_INPUTS, batch.indices, torch.cat([known, fused.flatten(1), read.flatten(1)], dim=-1))
        return cases

    def complete_outcomes(self, outcomes: Outcomes) -> Outcomes:
        """Add test cases with the layer of another sample (see `draw_control_partners`)."""
        if KEPT_INPUTS not in outcomes:
            return outcomes
        indices, rows = (torch.from_numpy(part).to(self.device) for part in outcomes[KEPT_INPUTS])
        labels, values = rows[:, 0].long(), rows[:, 1:]
        fused_shape, shape = self._shape
        fused = values[:, : -shape.numel()].unflatten(1, fused_shape)
        read = values[:, -shape.numel() :].unflatten(1, shape)
        complete = {case: outcomes[case] for case in outcomes if case != KEPT_INPUTS}
        for case, partners in draw_control_partners(self.trainer.datamodule.origins("test"), self.seed).items():
            chunks, sources = [], torch.tensor(partners, device=self.device)
            for part in torch.arange(len(indices), device=self.device).split(MAX_LAYERS_AT_ONCE):
                outputs = self.head(fused[part], lambda hidden, feature=read[sources[part]]: self.fda(feature, hidden))
                samples = FeatureBatch(fused[part], labels[part], indices[part])
                chunks.append(self.head.predictions(outputs, samples))
            complete[case] = outcomes["own"][0], torch.cat(chunks).cpu().numpy()
        return complete

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return a function that applies the layer of each sample without storing the layers."""
        feature = self.generator_input(self.head.condition(frame_features))
        return lambda hidden: self.fda(feature, hidden)

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer of each sample: weight (B, L, D), bias (B, L)."""
        return self.fda.generate(self.generator_input(self.head.condition(frame_features)))

    def deployment_parts(self) -> "DeploymentParts":
        """Return the hypernetwork, and as offline layer the mean of the layers generated in training."""
        rows = self.fda.average(torch.eye(self.fda.inputs + 1, self.fda.inputs, device=self.device))
        return DeploymentParts(Generator(nn.Identity(), self.fda), torch.cat([rows[:-1] - rows[-1], rows[-1:]]).T)

    def cloud_modules(self) -> list[nn.Module]:
        """Return the cloud's modules of the hypernetwork."""
        return self.fda.cloud_modules()

    def traffic(self) -> Traffic:
        """Return the bytes per sample: for each layer one feature up and one float32 layer down."""
        return Traffic(self.head.layers * ANCHOR_BYTES, self.payloads()["float32"])

    def payloads(self) -> dict[Precision, int]:
        """Return the bytes of all layers of a sample by precision."""
        return {name: self.head.layers * count_matrix_bytes(self.fda.shapes, name) for name in PAYLOAD_PRECISIONS}


class DeploymentParts(NamedTuple):
    """Parts of a method that a deployment needs, apart from encoder and head."""

    generator: Generator  # in the cloud
    offline: Tensor  # (L, D + 1) layer, its last column the bias, of a device without a download
