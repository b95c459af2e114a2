"""Baseline without backpropagation: features minus the mean of the device's anchors, with a static last layer."""

from torch import Tensor

from cdc_mmpg.methods.cdc_mmpg_session import Session
from cdc_mmpg.methods.linear import OneLayer
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head


class MeanAnchor(OneLayer, Session):
    """Centering of a device's features, as with batch statistics of a domain; nothing is sent.

    Source: Sun and Saenko 2016, "Deep CORAL", and Li et al. 2018, "Adaptive Batch Normalization", align domains by
    statistics of their features; a few clips only determine the mean reliably.

    Args:
        encoder, head, learning_rate, weight_decay, seed, virtual: see `Session`.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        virtual: int = 0,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, None, None, virtual, learning_rate, weight_decay, seed)
        self.layer = StaticLayer(head.inputs, head.outputs)

    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """See `Session`; without anchors the mean is zero and nothing is subtracted."""
        fused = self.fuse(frame_features)
        return self.head(fused - upload.unflatten(0, (-1, *[1] * (fused.dim() - 2))), self.layer)
