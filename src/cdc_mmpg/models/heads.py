"""Heads: what stands on a device after the encoder, for each task, and what a prediction there costs and counts."""

from abc import abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.batch import UNKNOWN
from cdc_mmpg.models.all_in_one import WIDTH


class LastLayer(Protocol):
    """Scores from hidden units: a static layer, or generated ones."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


class Head(nn.Module):
    """A task: what the device computes between the encoder and the last layer, the loss, and what counts as right.

    Attributes:
        inputs: D, values that the last layer reads.
        outputs: L, values that it gives.
    """

    inputs: int
    outputs: int

    @abstractmethod
    def forward(self, fused: Tensor, last_layer: LastLayer) -> Tensor:
        """Scores (B, L) of fused features m̄ (B, 192)."""

    @abstractmethod
    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """A scalar for scores (B, L) and labels (B,)."""

    @abstractmethod
    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(B,) floats, 1 where the best score is the label's."""


class OpenEnded(Head):
    """Open-ended question answering: one class per known answer, and one for the rest.

    Source: eq. 7, scores = W φ(m̄) + b with φ = GELU∘LayerNorm∘Linear(192, hidden). φ is static, trains in all four
    methods and has no dropout; W and b come from the method.

    Args:
        num_classes: answers known in training + 1.
        hidden: D, width of φ.
    """

    def __init__(self, num_classes: int, hidden: int = 96) -> None:
        super().__init__()
        self.inputs, self.outputs = hidden, num_classes
        self.phi = nn.Sequential(nn.Linear(WIDTH, hidden), nn.LayerNorm(hidden), nn.GELU())

    def forward(self, fused: Tensor, last_layer: LastLayer) -> Tensor:
        """See `Head`."""
        return last_layer(self.phi(fused))

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the samples whose answer is known, 0 where none is."""
        total = F.cross_entropy(scores.float(), labels, ignore_index=UNKNOWN, reduction="sum")
        return total / (labels != UNKNOWN).sum().clamp(min=1)

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        """See `Head`; an unknown answer is never right."""
        return (scores.argmax(-1) == labels).float()


class StaticLayer(nn.Linear):
    """A last layer that is trained, not generated: the same for every sample."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, L), in float32 as the generated ones."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())

    def repeated(self, batch: int) -> tuple[Tensor, Tensor]:
        """As `batch` devices install it: weight (B, L, D), bias (B, L)."""
        return self.weight.expand(batch, -1, -1), self.bias.expand(batch, -1)
