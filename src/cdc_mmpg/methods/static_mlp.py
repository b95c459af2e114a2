"""A control: F-linear with as many further parameters on the device as a session's generator has in the cloud."""

from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.methods.base import ParameterCounts, count
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head


class StaticMLP(Linear):
    """Asks whether capacity alone does it: an anchor of the clip itself holds nothing that the clip does not.

    Args:
        encoder, head, learning_rate, weight_decay, seed, virtual: see `Linear`.
        width: hidden units of the residual MLP; 424 have as many parameters as a rank-4 generator of 17 answers.
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
        """Return the feature (..., 192) and what the MLP adds to it."""
        fused = super().fuse(frame_features)
        return fused + self.mlp(fused)

    def parameter_counts(self) -> ParameterCounts:
        """Count the MLP on the device, too."""
        counts = super().parameter_counts()
        return counts._replace(device=counts.device + count(self.mlp))
