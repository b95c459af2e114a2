"""CDC-MMPG for sessions, our extension: one last layer for all questions, from several clips of a device."""

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
from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA, StaticLayer, round_parts
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import Head, LastLayer
from cdc_mmpg.models.modulation import BiasFDA, FiLMFDA, ModulatingFDA
from cdc_mmpg.models.reading import Reading
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS, Precision, count_matrix_bytes

logger = logging.getLogger(__name__)

Generated = Literal["full", "low_rank", "basis", "film", "bias"]
Axes = int | Literal["found"] | None
READING_FILE = "reading.safetensors"  # file in the folder of a run


class Session(Answering):
    """Base of methods with a session: a frozen encoder, and an answer for every test case.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        axes: number of device axes that a session's mean is projected onto (`DeviceAxes`), fitted before training;
            "found" estimates it, None reads the complete mean, layer-normed.
        reading: file of the `Reading` that a device applies to each anchor before averaging; None averages features.
        virtual: number of virtual devices per training device, see `FeatureDataModule`.
    """

    reads: ClassVar[View] = "sessions"
    reads_sets: ClassVar[bool] = False  # whether the method reads the individual anchors, not their mean
    oracle: bool = False  # whether the method receives the true hue casts of the devices

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

    def frozen_modules(self) -> list[nn.Module]:
        """Return encoder and reading."""
        return [*super().frozen_modules(), *([self.reading] if self.reading else [])]

    def upload(self, frame_features: Tensor) -> Tensor:
        """Return the contribution (..., 192) of clips with features (..., T, 192) to a session: reading or feature."""
        feature = super().upload(frame_features)
        return self.reading(feature) if self.reading else feature

    def setup(self, stage: str) -> None:
        """Fit the axes on the training devices."""
        if stage == "fit" and isinstance(self.axes, DeviceAxes):
            number = self.axes.fit(*self.trainer.datamodule.history())
            logger.info("devices differ along %d axes", number)

    def export(self, folder: Path) -> None:
        """Write the reading, which reopening the run needs."""
        if self.reading:
            self.reading.save(folder / READING_FILE)

    def parameter_counts(self) -> ParameterCounts:
        """Count the reading as part of the device."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + (count(self.reading) if self.reading else 0))

    @abstractmethod
    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """Return the head's outputs for clips with features (B, ..., T, 192).

        Args:
            frame_features: features of the samples.
            upload: (B, 192) means over the anchors' uploads; with `reads_sets` the individual anchors, (B, n, 192).
            anchors: (B,) number of anchors in `upload`; 0 means that nothing was uploaded.
        """

    def session_layer(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer that a device installs for a session with anchors (n, 192): weight (L, D), bias (L).

        Raises:
            ConfigError: the method generates no layer from a session.
        """
        raise ConfigError(
            f"{type(self).__name__} generates no layer from a session: use a method that does (METHOD=cdc_mmpg_session)"
        )

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Return the case drawn in training; in the test, one case per number of anchors and one for another device."""
        features, sessions = batch.samples.frame_features, batch.sets if self.reads_sets else batch.uploads
        cases = list(SESSION_CASES)[: sessions.shape[1] if split == "test" else 1]
        return {case: self.answer(features, sessions[:, i], batch.anchors[:, i]) for i, case in enumerate(cases)}


class CDCMMPGSession(Session):
    """Session method: the device averages n anchor features, and the cloud generates one layer for the session.

    Anchors are other clips of the device, one frame each, with a neutral prompt, so that one layer serves all
    questions. Encoder and anchors are frozen, and the reasoner is left out: a mean leaves it nothing to re-normalise.
    Without anchors the device answers with the layer shared by all devices; a tenth of the training samples have no
    anchors to train it.

    Args:
        encoder, head, axes, reading, virtual, learning_rate, weight_decay, seed: see `Session`.
        generated: what the cloud generates: the "full" layer (see `FDA`), a "low_rank" residual on the shared one
            (`LowRankFDA`), coefficients of a "basis" that the device stores (`BasisFDA`), factors and offsets of the
            hidden units ("film", `FiLMFDA`) or a "bias" (`BiasFDA`).
        size: the rank, or the number of basis layers; ignored for the other forms.
        payload: precision in which the parts are sent, also used for answers in validation and test.
        jitters: whether virtual devices jitter colours, as usual in augmentation, instead of rotating hues: a control
            with less knowledge of the shift.
        oracle: whether the hypernetwork reads the true hue cast instead of the anchors: a control, the upper bound.
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
        return self._apply_layers(frame_features, self.axes(upload), anchors, precision)

    def _apply_layers(self, frame_features: Tensor, feature: Tensor, anchors: Tensor, precision: Precision) -> Tensor:
        """Answer with layers generated from features (B, 192) and sent in a precision; without upload, the shared one.

        Samples without an upload do not enter the running mean of the generated layers.
        """
        fused = self.fuse(frame_features)
        ones = [1] * (fused.dim() - 2)  # the hidden vectors of a sample share its layer
        feature, is_adapted = (part.unflatten(0, (-1, *ones)) for part in (feature, anchors > 0))

        def layer(hidden: Tensor) -> Tensor:
            if precision == "float32":
                adapted = self.fda(feature, hidden, is_adapted)
            else:
                adapted = self.fda.apply_rounded(feature, hidden, precision)
            return torch.where(is_adapted.unsqueeze(-1), adapted, self.shared(hidden))

        return self.head(fused, layer)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """See `Session`; add test cases with the mean layer and with every precision. The oracle has one case."""
        features = batch.samples.frame_features
        if self.oracle:
            # Cosine and sine, scaled to the norm of a layer-normed feature and padded with zeros.
            cast = F.pad(batch.casts * FEATURE_DIM**0.5, (0, FEATURE_DIM - batch.casts.shape[-1]))
            return {"own": self._apply_layers(features, cast, torch.ones_like(cast[:, 0]), "float32")}
        cases = super().scores(batch, split)
        if split == "test":
            feature, anchors = self.axes(batch.uploads[:, 0]), batch.anchors[:, 0]
            cases["mean_head"] = self.head(self.fuse(features), self.fda.average)
            cases |= {name: self._apply_layers(features, feature, anchors, name) for name in PAYLOAD_PRECISIONS}
        return cases

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return the shared layer, used without a session."""
        return self.shared

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shared layer, used without a session, repeated for every clip."""
        return self.shared.repeat(len(frame_features))

    def session_layer(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """See `Session`; without anchors, the shared layer. Its parts are rounded as they are sent."""
        if not len(anchors):
            return self.shared.weight, self.shared.bias
        parts = self.fda.parts(self.axes(anchors.mean(0, keepdim=True)))
        weight, bias = self.fda.install(round_parts(parts, self.payload))
        return weight[0], bias[0]

    def deployment_parts(self) -> DeploymentParts:
        """Return axes and hypernetwork, and as offline layer the shared one."""
        if self.oracle:
            raise ConfigError("the oracle reads the camera's true cast, which no device knows: it cannot be deployed")
        if isinstance(self.fda, ModulatingFDA):
            raise ConfigError(
                f"{type(self.fda).__name__} is a control without a layout for sending its layers: deploy another "
                "method (METHOD=cdc_mmpg_session)"
            )
        layer = torch.cat([self.shared.weight, self.shared.bias.unsqueeze(-1)], dim=-1)
        return DeploymentParts(Generator(self.axes, self.fda), layer)

    def cloud_modules(self) -> list[nn.Module]:
        """Return axes and hypernetwork; the shared layer is on the device."""
        return [self.axes, *self.fda.cloud_modules()]

    def parameter_counts(self) -> ParameterCounts:
        """Count the stored basis, if any, as part of the device."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + self.fda.count_stored())

    def traffic(self) -> Traffic:
        """Return the bytes per session: one mean feature up, the generated numbers down."""
        return Traffic(ANCHOR_BYTES, self.payloads()[self.payload])

    def payloads(self) -> dict[Precision, int]:
        """Return the bytes of the generated numbers by precision."""
        return {name: count_matrix_bytes(self.fda.shapes, name) for name in PAYLOAD_PRECISIONS}
