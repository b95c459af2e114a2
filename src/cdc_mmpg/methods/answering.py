"""Methods that answer questions: a last layer, cases of the test, outcomes; and those whose last layer is generated."""

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

KEPT_INPUTS = "read"  # case under which the inputs of head and hypernetwork are kept until the test ends
MAX_LAYERS_AT_ONCE = 256  # samples whose layers are applied at once


class SampleRows(Metric):
    """SampleRows that evaluation keeps of the samples of all processes, in the samples' order; each is counted once."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("indices", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Add rows of a batch: places of the samples (R,) and values (R, X)."""
        self.indices.append(indices)
        self.values.append(values)

    def compute(self) -> tuple[Any, Any]:
        """Return places (N,) and values (N, X) of all rows, as arrays."""
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
        self._rows: dict[str, SampleRows] = {}

    @property
    def monitor(self) -> str:  # type: ignore[override]  # which is best is for the task to say
        """See `Head`."""
        return self.head.monitor

    @property
    def averages(self) -> Averages:  # type: ignore[override]
        """Samples over which the task's loss is the mean."""
        return "known" if self.head.adds_up else "step"

    @property
    def needs_whole_step(self) -> str:  # type: ignore[override]
        """See `Head`."""
        return "" if self.head.adds_up else "every clip of a step is a negative of all others of the step"

    @abstractmethod
    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return the last layer that belongs to clips with these features (B, T, 192)."""

    @abstractmethod
    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same layers as a device installs them: weight (B, L, D), bias (B, L)."""

    def upload(self, frame_features: Tensor) -> Tensor:
        """Return the feature that a device uploads (..., 192) of clips whose condition is (..., T, 192)."""
        return self.encoder.pool(frame_features.mean(-2))

    def deployment_parts(self) -> "DeploymentParts":
        """Return what a deployment needs of the method, beside encoder and head.

        Raises:
            ConfigError: this method generates nothing, or nothing that an upload decides.
        """
        raise ConfigError(
            f"{type(self).__name__} sends nothing from a cloud: take a method that generates its last layer "
            "(METHOD=cdc_mmpg_session, cdc_mmpg or hyper)"
        )

    def fuse(self, frame_features: Tensor) -> Tensor:
        """Return what the head reads, (..., 192), of features (..., T, 192): m̄, or the mean before the pooler."""
        mean = frame_features.mean(-2)
        return self.encoder.pool(mean) if self.head.pooled else mean

    def forward(self, frame_features: Tensor) -> Tensor:
        """Return the head's outputs for clips with their texts, from their frame features (B, ..., T, 192)."""
        return self.head(self.fuse(frame_features), self.last_layer(frame_features))

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Return the head's outputs by case; the first is the method's own, which trains and decides the best epoch.

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
                known = float((encoded.labels != UNKNOWN_LABEL).sum())
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
        self._rows.setdefault(case, SampleRows().to(self.device)).update(indices, values)

    def on_validation_epoch_end(self) -> None:
        """Log metrics of the whole split, on every process the same."""
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        """Log metrics of the whole split, on every process the same."""
        self._evaluate("test")

    def _evaluate(self, split: Split) -> None:
        kept = {case: rows.compute() for case, rows in self._rows.items()}
        self._rows = {}
        self.outcomes[split] = self.complete_outcomes(kept)
        for name, value in self.head.evaluate(self.outcomes[split]).items():
            # The same on every process already; Lightning warns unless it is told to take their mean.
            self.log(f"{split}/{name}", value, prog_bar=f"{split}/{name}" == self.monitor, sync_dist=True)

    def complete_outcomes(self, outcomes: Outcomes) -> Outcomes:
        """Return the outcomes of a whole split, with those that need all of its samples."""
        return outcomes

    def cloud_modules(self) -> list[nn.Module]:
        """Return the modules that only the cloud has."""
        return []

    def parameter_counts(self) -> ParameterCounts:
        """Return D-Param, C-Param and what trains."""
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
        """Return what the hypernetwork reads, (..., 192), of clips whose condition is (..., T, 192)."""
        return self.upload(frame_features)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Add, in the test, cases with one layer for everyone and with layers sent in several precisions.

        What the head and the hypernetwork read is kept, to put other samples' layers to the test at the end of it.
        """
        features = batch.frame_features
        cases = {"own": self(features)}
        if split == "test":
            fused, read = self.fuse(features), self.generator_input(self.head.condition(features))
            cases["mean_head"] = self.head(fused, self.fda.average)
            for name in PAYLOAD_PRECISIONS:
                cases[name] = self.head(fused, lambda hidden, name=name: self.fda.apply_sent(read, hidden, name))
            self._shape = fused.shape[1:], read.shape[1:]
            known = batch.labels[:, None].to(fused.dtype)  # float32, which holds every label exactly
            self.keep(KEPT_INPUTS, batch.indices, torch.cat([known, fused.flatten(1), read.flatten(1)], dim=-1))
        return cases

    def complete_outcomes(self, outcomes: Outcomes) -> Outcomes:
        """Add, in the test, cases with the layer of another sample (see `draw_control_partners`)."""
        if KEPT_INPUTS not in outcomes:
            return outcomes
        indices, rows = (torch.from_numpy(part).to(self.device) for part in outcomes[KEPT_INPUTS])
        labels, values = rows[:, 0].long(), rows[:, 1:]
        fused_shape, shape = self._shape
        fused = values[:, : -shape.numel()].unflatten(1, fused_shape)
        read = values[:, -shape.numel() :].unflatten(1, shape)
        found = {case: outcomes[case] for case in outcomes if case != KEPT_INPUTS}
        for case, other in draw_control_partners(self.trainer.datamodule.origins("test"), self.seed).items():
            chunks, theirs = [], torch.tensor(other, device=self.device)
            for part in torch.arange(len(indices), device=self.device).split(MAX_LAYERS_AT_ONCE):
                given = self.head(fused[part], lambda hidden, own=read[theirs[part]]: self.fda(own, hidden))
                samples = FeatureBatch(fused[part], labels[part], indices[part])
                chunks.append(self.head.predictions(given, samples))
            found[case] = outcomes["own"][0], torch.cat(chunks).cpu().numpy()
        return found

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return a function that applies every sample's own layer, without holding the layers."""
        feature = self.generator_input(self.head.condition(frame_features))
        return lambda hidden: self.fda(feature, hidden)

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return every sample's own layer: weight (B, L, D), bias (B, L)."""
        return self.fda.generate(self.generator_input(self.head.condition(frame_features)))

    def deployment_parts(self) -> "DeploymentParts":
        """Return the hypernetwork; offline, the mean of the layers that training generated."""
        rows = self.fda.average(torch.eye(self.fda.inputs + 1, self.fda.inputs, device=self.device))
        return DeploymentParts(Generator(nn.Identity(), self.fda), torch.cat([rows[:-1] - rows[-1], rows[-1:]]).T)

    def cloud_modules(self) -> list[nn.Module]:
        """Return the modules of the hypernetwork."""
        return self.fda.cloud_modules()

    def traffic(self) -> Traffic:
        """Return the bytes of one feature up and one float32 layer down, for every layer of a sample."""
        return Traffic(self.head.layers * ANCHOR_BYTES, self.payloads()["float32"])

    def payloads(self) -> dict[Precision, int]:
        """Return the bytes of all layers of a sample, by precision."""
        return {name: self.head.layers * count_matrix_bytes(self.fda.shapes, name) for name in PAYLOAD_PRECISIONS}


class DeploymentParts(NamedTuple):
    """Parts of a method that a deployment needs, beside encoder and head."""

    generator: Generator  # in the cloud
    offline: Tensor  # (L, D + 1) the layer, its last column the bias, of a device that was sent none
