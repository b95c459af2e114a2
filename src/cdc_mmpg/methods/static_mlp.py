"""Control: F-linear with as many additional parameters on the device as a session's generator has in the cloud."""

from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.methods.base import ParameterCounts, count
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head


class StaticMLP(Linear):
    """Control for capacity alone: an anchor of the clip itself contains nothing that the clip does not.

    Args:
        encoder, head, learning_rate, weight_decay, seed, virtual: see `Linear`.
        width: hidden units of the residual MLP; 424 give as many parameters as a rank-4 generator for 17 answers.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        width: int = 424,
        virtual: int = 0,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, learning_rate, weight_decay, seed, virtual)
        self.mlp = nn.Sequential(nn.Linear(FEATURE_DIM, width), nn.GELU(), nn.Linear(width, FEATURE_DIM))

    def fuse(self, frame_features: Tensor) -> Tensor:
        """Return the fused feature (..., 192) plus the MLP's residual."""
        fused = super().fuse(frame_features)
        return fused + self.mlp(fused)

    def parameter_counts(self) -> ParameterCounts:
        """Count the MLP as part of the device."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + count(self.mlp))
