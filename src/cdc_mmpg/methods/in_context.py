"""Baseline without backpropagation: the device's anchors and the clip as tokens of a small transformer."""

import torch
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.methods.base import ParameterCounts, count
from cdc_mmpg.methods.cdc_mmpg_session import Session
from cdc_mmpg.methods.linear import OneLayer
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head


class InContext(OneLayer, Session):
    """In-context reading of unlabelled clips of the device; nothing is sent, and every answer reads all clips.

    Source: Gupta et al. 2023, "Context is Environment", attends to unlabelled samples of a domain together with the
    query; here on features of a frozen encoder.

    Args:
        encoder, head, learning_rate, weight_decay, seed, virtual, reading: see `Session`.
        layers: number of layers of the transformer.
    """

    reads_sets = True
    HEADS = 4

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        layers: int = 1,
        reading: str | None = None,
        virtual: int = 0,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, None, reading, virtual, learning_rate, weight_decay, seed)
        self.layer = StaticLayer(head.inputs, head.outputs)
        block = nn.TransformerEncoderLayer(
            FEATURE_DIM, self.HEADS, 2 * FEATURE_DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mix = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.clip, self.anchor = nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.Linear(FEATURE_DIM, FEATURE_DIM)

    def answer(self, frame_features: Tensor, upload: Tensor, anchors: Tensor) -> Tensor:
        """See `Session`; here `upload` holds the anchors themselves, (B, n, 192), and the first `anchors` are valid."""
        fused = self.fuse(frame_features)
        tokens = torch.cat([self.clip(fused).unsqueeze(1), self.anchor(upload)], dim=1)
        absent = torch.arange(tokens.shape[1], device=anchors.device) > anchors.unsqueeze(1)
        mixed = self.mix(tokens, src_key_padding_mask=absent)[:, 0]
        return self.head(fused + mixed, self.layer)

    def parameter_counts(self) -> ParameterCounts:
        """Count the transformer as part of the device."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + sum(map(count, (self.mix, self.clip, self.anchor))))
