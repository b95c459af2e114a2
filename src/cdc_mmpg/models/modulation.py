"""Hypernetworks that modulate a shared last layer: smaller adaptations than a residual on it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.models.fda import Adaptor, Parts, StaticLayer, build_projection


class ModulatingFDA(Adaptor):
    """Hypernetwork from features (B, 192) to vectors that modulate a shared last layer.

    Subclasses define the vectors. They start at zero, which leaves the shared layer unchanged.

    Args:
        inputs, outputs, shapes: see `Adaptor`.
    """

    mean_vectors: Tensor

    def __init__(self, inputs: int, outputs: int, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__(inputs, outputs, shapes)
        self.register_buffer("mean_vectors", torch.zeros(shapes[0]))
        self.shared = StaticLayer(inputs, outputs)
        self.mlp = build_projection()
        self.hyper = nn.Linear(FEATURE_DIM, self.numbers)
        nn.init.zeros_(self.hyper.weight)
        nn.init.zeros_(self.hyper.bias)

    @property
    def mean(self) -> Tensor:
        """Running mean of the vectors."""
        return self.mean_vectors

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the vectors, (..., number, length)."""
        vectors = self.hyper(self.mlp(feature))
        self.record(vectors, counted)
        return (vectors.unflatten(-1, self.shapes[0]),)

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.apply_parts((self.mean_vectors,), hidden)

    def cloud_modules(self) -> list[nn.Module]:
        """Return MLP and H; the shared layer is on the device."""
        return [self.mlp, self.hyper]


class BiasFDA(ModulatingFDA):
    """Hypernetwork from features (B, 192) to a bias (L) that is added to the shared layer's bias.

    Source: adapting biases alone is the smallest change (Ben Zaken et al. 2022, "BitFit", trains only biases); here
    the bias is generated.

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
    """Hypernetwork from features (B, 192) to scales and offsets (2, D) of the inputs of a shared layer.

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
