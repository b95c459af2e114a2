"""Control: session and clip features concatenated before a static last layer; nothing is generated or sent."""

import torch
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.methods.base import ParameterCounts, count
from cdc_mmpg.methods.cdc_mmpg_session import Axes, Session
from cdc_mmpg.methods.linear import OneLayer
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head


class SessionConcatenated(OneLayer, Session):
    """Control for the gain from generated weights: the device reads its session's feature as a second input.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        axes, reading, virtual: see `Session`.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        axes: Axes = "found",
        reading: str | None = None,
        virtual: int = 0,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, axes, reading, virtual, learning_rate, weight_decay, seed)
        self.layer = StaticLayer(head.inputs, head.outputs)
        self.mix = nn.Linear(2 * FEATURE_DIM, FEATURE_DIM)

    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """See `Session`."""
        fused = super().fuse(frame_features)
        session = torch.where(anchors[:, None] > 0, self.axes(upload), 0.0)
        session = session.unflatten(0, (-1, *[1] * (fused.dim() - 2))).expand_as(fused)
        both = torch.cat([fused, session], dim=-1)
        return self.head(self.mix(both), self.layer)

    def fuse(self, frame_features: Tensor) -> Tensor:
        """Return the mixed feature of a clip without a session: zeros take the place of the session's feature."""
        fused = super().fuse(frame_features)
        return self.mix(torch.cat([fused, torch.zeros_like(fused)], dim=-1))

    def parameter_counts(self) -> ParameterCounts:
        """Count axes and mixing layer as part of the device."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + count(self.axes) + count(self.mix))
