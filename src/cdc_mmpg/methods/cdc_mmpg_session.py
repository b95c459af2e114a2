"""CDC-MMPG for a session, our extension: one last layer for all questions, from several clips of a device."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.batch import CASES, Split, View
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.base import ANCHOR_BYTES, Answering, Traffic
from cdc_mmpg.models.all_in_one import WIDTH, AllInOne
from cdc_mmpg.models.fda import FDA, LowRankFDA
from cdc_mmpg.models.heads import Head, LastLayer, StaticLayer


def session_feature(uploads: Tensor) -> Tensor:
    """The layer-normed mean of a session's anchor features: (..., 192) both."""
    return F.layer_norm(uploads, (WIDTH,))


class Session(Answering):
    """What methods with a session share: a frozen encoder, and an answer for every case of the test.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
    """

    reads: ClassVar[View] = "sessions"

    def __init__(self, encoder: AllInOne, head: Head, learning_rate: float, weight_decay: float, seed: int) -> None:
        if head.task != "open_ended":
            raise ConfigError(f"sessions answer open-ended questions, not {head.task}: take another method (METHOD=)")
        super().__init__(encoder, head, False, learning_rate, weight_decay, seed)

    @abstractmethod
    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """Scores (B, L) of clips with features (B, T, 192).

        Args:
            frame_features: of the questions.
            upload: (B, 192) means of anchor features.
            anchors: (B,) of how many; where 0, nothing was uploaded.
        """

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """In the test, a case for every number of anchors, and for another device's; in training, the one drawn."""
        cases = list(CASES) if split == "test" else list(CASES)[:1]
        features = batch.frame_features
        return {
            case: self.answer(features, batch.uploads[:, place], batch.anchors[:, place])
            for place, case in enumerate(cases)
        }


class CDCMMPGSession(Session):
    """The device averages the anchor features of n clips; the cloud makes the layer for the whole session.

    Anchors are other clips of the device, one frame each, with a neutral prompt, so that one layer serves all
    questions. Encoder and anchors are frozen, and the reasoner is left out: over a mean it has nothing to re-normalise.
    Without anchors the device answers with the layer that all devices share, which a tenth of the training samples
    keep able to.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        rank: of the residual that is generated (see `LowRankFDA`); None generates the whole layer.
        oracle: feed the hypernetwork the device's true hue cast in place of the anchors: a control, the ceiling.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        rank: int | None = 4,
        oracle: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, learning_rate, weight_decay, seed)
        self.oracle = oracle
        if rank is None:
            self.fda: FDA | LowRankFDA = FDA(head.inputs, head.outputs, "hyperfan_in", project=True)
            self.shared = StaticLayer(head.inputs, head.outputs)
        else:
            self.fda = LowRankFDA(head.inputs, head.outputs, rank)
            self.shared = self.fda.shared

    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """See `Session`."""
        feature = session_feature(upload)

        def layer(hidden: Tensor) -> Tensor:
            return torch.where(anchors[:, None] > 0, self.fda(feature, hidden), self.shared(hidden))

        return self.head(self.fused(frame_features), layer)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """See `Session`; the oracle has one case."""
        if not self.oracle:
            return super().scores(batch, split)
        cast = F.pad(batch.casts, (0, WIDTH - batch.casts.shape[-1]))  # cosine, sine and zeros
        return {"own": self.head(self.fused(batch.frame_features), lambda hidden: self.fda(cast, hidden))}

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Without a session: the shared one."""
        return self.shared

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Without a session: the shared one, repeated."""
        return self.shared.repeated(len(frame_features))

    def cloud_modules(self) -> list[nn.Module]:
        """MLP and hypernetwork; the shared layer is the device's."""
        return [self.fda.mlp, self.fda.hyper]

    def traffic(self) -> Traffic:
        """One mean feature up; the generated numbers down, in float32, once a session."""
        return Traffic(ANCHOR_BYTES, 4 * self.fda.numbers)
