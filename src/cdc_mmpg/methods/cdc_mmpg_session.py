"""CDC-MMPG for a session, our extension: one last layer for all questions, from several clips of a device."""

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.data.batch import Split, View
from cdc_mmpg.data.control_cases import SESSION_CASES
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.answering import Answering, DeploymentParts
from cdc_mmpg.methods.base import ANCHOR_BYTES, ParameterCounts, Traffic, check_virtual, count
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA, StaticLayer
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import Head, LastLayer
from cdc_mmpg.models.modulation import BiasFDA, FiLMFDA, ModulatingFDA
from cdc_mmpg.models.reading import Reading
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS, Precision, count_matrix_bytes

logger = logging.getLogger(__name__)

Generated = Literal["full", "low_rank", "basis", "film", "bias"]
Axes = int | Literal["found"] | None
READING = "reading.safetensors"  # of a run


class Session(Answering):
    """What methods with a session share: a frozen encoder, and an answer for every case of the test.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        axes: how many of the axes in which devices differ are read of a session's mean (`DeviceAxes`), fitted before
            training; "found" finds how many there are, None reads all of the mean, layer-normed.
        reading: file of the `Reading` that a device makes of each anchor before it averages; None averages features.
        virtual: virtual devices of each device that trains, see `FeatureDataModule`.
    """

    reads: ClassVar[View] = "sessions"
    reads_sets: ClassVar[bool] = False  # whether it reads the anchors themselves, not their mean
    oracle: bool = False  # whether it is told the devices' true hue casts

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        axes: Axes,
        reading: str | None,
        virtual: int,
        learning_rate: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__(encoder, head, False, learning_rate, weight_decay, seed)
        self.axes: nn.Module = nn.LayerNorm(FEATURE_DIM, elementwise_affine=False)
        if axes is not None:
            self.axes = DeviceAxes(None if axes == "found" else axes)
        self.reading = Reading.load(Path(reading)) if reading else None
        self.virtual = check_virtual(virtual)

    def frozen(self) -> list[nn.Module]:
        """Return encoder and reading."""
        return [*super().frozen(), *([self.reading] if self.reading else [])]

    def upload(self, frame_features: Tensor) -> Tensor:
        """Return what a clip adds to a session (..., 192) of features (..., T, 192): its reading, or its feature."""
        feature = super().upload(frame_features)
        return self.reading(feature) if self.reading else feature

    def setup(self, stage: str) -> None:
        """Fit the axes on the devices that train."""
        if stage == "fit" and isinstance(self.axes, DeviceAxes):
            number = self.axes.fit(*self.trainer.datamodule.history())
            logger.info("devices differ along %d axes", number)

    def export(self, folder: Path) -> None:
        """Write the reading, with which the run opens again."""
        if self.reading:
            self.reading.save(folder / READING)

    def parameter_counts(self) -> ParameterCounts:
        """Count the reading on the device, too."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + (count(self.reading) if self.reading else 0))

    @abstractmethod
    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """Return the head's outputs for clips with features (B, ..., T, 192).

        Args:
            frame_features: of the samples.
            upload: (B, 192) means of what the anchors upload; with `reads_sets` the anchors themselves, (B, n, 192).
            anchors: (B,) of how many; where 0, nothing was uploaded.
        """

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Return the case drawn in training; in the test, one for every number of anchors and for another device's."""
        features, given = batch.samples.frame_features, batch.sets if self.reads_sets else batch.uploads
        cases = list(SESSION_CASES)[: given.shape[1] if split == "test" else 1]
        return {
            case: self.answer(features, given[:, place], batch.anchors[:, place]) for place, case in enumerate(cases)
        }


class CDCMMPGSession(Session):
    """The device averages the anchor features of n clips; the cloud makes the layer for the whole session.

    Anchors are other clips of the device, one frame each, with a neutral prompt, so that one layer serves all
    questions. Encoder and anchors are frozen, and the reasoner is left out: over a mean it has nothing to re-normalise.
    Without anchors the device answers with the layer that all devices share, which a tenth of the training samples
    keep able to.

    Args:
        encoder, head, axes, reading, virtual, learning_rate, weight_decay, seed: see `Session`.
        generated: what the cloud makes: the "full" layer (see `FDA`), a "low_rank" residual on the shared one
            (`LowRankFDA`), coefficients of a "basis" that the device keeps (`BasisFDA`), factors and offsets of the
            hidden units ("film", `FiLMFDA`) or a "bias" (`BiasFDA`).
        size: the rank, or how many layers the basis has; the others have none.
        payload: the precision in which it is sent, and in which validation and test answer.
        jitters: virtual devices jitter colours, as augmentation usually does, in place of rotating hues: a control that
            knows less of the shift.
        oracle: feed the hypernetwork the device's true hue cast in place of the anchors: a control, the ceiling.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        generated: Generated = "low_rank",
        size: int = 4,
        payload: Precision = "int8",
        axes: Axes = "found",
        reading: str | None = None,
        virtual: int = 0,
        jitters: bool = False,
        oracle: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        axes, reading = (None, None) if oracle else (axes, reading)
        super().__init__(encoder, head, axes, reading, virtual, learning_rate, weight_decay, seed)
        self.oracle, self.payload, self.jitters = oracle, payload, jitters
        self.fda: Adaptor
        if generated == "full":
            self.fda = FDA(head.inputs, head.outputs, "hyperfan_in", project=True)
            self.shared = StaticLayer(head.inputs, head.outputs)
        elif generated in ("low_rank", "basis"):
            fda = (LowRankFDA if generated == "low_rank" else BasisFDA)(head.inputs, head.outputs, size)
            self.fda, self.shared = fda, fda.shared
        else:
            modulating = (FiLMFDA if generated == "film" else BiasFDA)(head.inputs, head.outputs)
            self.fda, self.shared = modulating, modulating.shared

    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """See `Session`."""
        precision: Precision = "float32" if self.training else self.payload
        return self._answer(frame_features, self.axes(upload), anchors, precision)

    def _answer(self, frame_features: Tensor, feature: Tensor, anchors: Tensor, precision: Precision) -> Tensor:
        """Answer with layers that are made of (B, 192) and sent in that precision, or with the shared one.

        Where nothing was uploaded the layer is not used, and the mean of the layers that training makes does not hold
        it.
        """
        fused = self.fuse(frame_features)
        several = [1] * (fused.dim() - 2)  # hidden vectors of a sample, which share its layer
        feature, told = (part.unflatten(0, (-1, *several)) for part in (feature, anchors > 0))

        def layer(hidden: Tensor) -> Tensor:
            if precision == "float32":
                adapted = self.fda(feature, hidden, told)
            else:
                adapted = self.fda.apply_sent(feature, hidden, precision)
            return torch.where(told.unsqueeze(-1), adapted, self.shared(hidden))

        return self.head(fused, layer)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """See `Session`; in the test, also one layer for everyone, and every precision. The oracle has one case."""
        features = batch.samples.frame_features
        if self.oracle:
            # Cosine and sine, as long as a layer-normed feature, and zeros.
            cast = F.pad(batch.casts * FEATURE_DIM**0.5, (0, FEATURE_DIM - batch.casts.shape[-1]))
            return {"own": self._answer(features, cast, torch.ones_like(cast[:, 0]), "float32")}
        cases = super().scores(batch, split)
        if split == "test":
            feature, anchors = self.axes(batch.uploads[:, 0]), batch.anchors[:, 0]
            cases["mean_head"] = self.head(self.fuse(features), self.fda.average)
            cases |= {name: self._answer(features, feature, anchors, name) for name in PAYLOAD_PRECISIONS}
        return cases

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return the layer without a session: the shared one."""
        return self.shared

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer without a session: the shared one, repeated."""
        return self.shared.repeated(len(frame_features))

    def deployment_parts(self) -> DeploymentParts:
        """Return axes and what generates; offline, the shared layer."""
        if self.oracle:
            raise ConfigError("the oracle is told the camera's cast, which no device knows: it cannot be served")
        if isinstance(self.fda, ModulatingFDA):
            raise ConfigError(
                f"{type(self.fda).__name__} is there to be compared, and no layout sends what it makes: take another "
                "form (METHOD=cdc_mmpg_session)"
            )
        layer = torch.cat([self.shared.weight, self.shared.bias.unsqueeze(-1)], dim=-1)
        return DeploymentParts(Generator(self.axes, self.fda), layer)

    def cloud_modules(self) -> list[nn.Module]:
        """Return axes and what generates; the shared layer is the device's."""
        return [self.axes, *self.fda.cloud_modules()]

    def parameter_counts(self) -> ParameterCounts:
        """Count a basis on the device, too."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + self.fda.stored())

    def traffic(self) -> Traffic:
        """Return the bytes of one mean feature up and the generated numbers down, once a session."""
        return Traffic(ANCHOR_BYTES, self.payloads()[self.payload])

    def payloads(self) -> dict[Precision, int]:
        """Return the bytes of the generated numbers, by precision."""
        return {name: count_matrix_bytes(self.fda.shapes, name) for name in PAYLOAD_PRECISIONS}
