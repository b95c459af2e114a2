"""Hypernetworks that modulate a shared last layer: what less than a residual on it does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.models.fda import Adaptor, Parts, StaticLayer, projection


class ModulatingFDA(Adaptor):
    """Feature (B, 192) -> vectors that modulate a shared last layer: what less than a residual does.

    Subclasses say what the vectors are; they start at zero, which is the shared layer.

    Args:
        inputs, outputs, shapes: see `Adaptor`.
    """

    mean_vectors: Tensor

    def __init__(self, inputs: int, outputs: int, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__(inputs, outputs, shapes)
        self.register_buffer("mean_vectors", torch.zeros(shapes[0]))
        self.shared = StaticLayer(inputs, outputs)
        self.mlp = projection()
        self.hyper = nn.Linear(FEATURE_DIM, self.numbers)
        nn.init.zeros_(self.hyper.weight)
        nn.init.zeros_(self.hyper.bias)

    @property
    def mean(self) -> Tensor:
        """Of the vectors."""
        return self.mean_vectors

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the vectors, (..., number, length)."""
        vectors = self.hyper(self.mlp(feature))
        self.remember(vectors, counted)
        return (vectors.unflatten(-1, self.shapes[0]),)

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.apply_parts((self.mean_vectors,), hidden)

    def cloud_modules(self) -> list[nn.Module]:
        """Return MLP and H; the shared layer is the device's."""
        return [self.mlp, self.hyper]


class BiasFDA(ModulatingFDA):
    """Feature (B, 192) -> a bias (L) that is added to a shared layer's.

    Source: bias alone is the least that adapts (Ben Zaken et al. 2022, "BitFit", trains no more of a model), here
    generated.

    Args:
        inputs, outputs: see `Adaptor`.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, ((1, outputs),))

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.shared(hidden) + parts[0].squeeze(-2)

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        bias = self.shared.bias + parts[0].squeeze(-2)
        return self.shared.weight.expand(*bias.shape, -1), bias


class FiLMFDA(ModulatingFDA):
    """Feature (B, 192) -> factors and offsets (2, D) of the hidden units that a shared layer reads.

    Source: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer": a unit h becomes
    (1 + gamma) h + beta.

    Args:
        inputs, outputs: see `Adaptor`.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, ((2, inputs),))

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        factors, offsets = parts[0].unbind(-2)
        return self.shared((1 + factors) * hidden + offsets)

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        factors, offsets = parts[0].unbind(-2)
        return self.shared.weight * (1 + factors).unsqueeze(-2), F.linear(offsets, self.shared.weight, self.shared.bias)
