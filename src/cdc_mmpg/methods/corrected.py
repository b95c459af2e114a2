"""Hand-crafted baselines: F-linear on frames whose hues the device rotates back by its estimated cast."""

from typing import Any, ClassVar

from torch import Tensor

from cdc_mmpg.data.batch import Split, View
from cdc_mmpg.data.control_cases import CORRECTION_CASES, Correction
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head


class Corrected(Linear):
    """Baseline for a known kind of shift: a few lines of code on the device, and nothing is sent.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        correction: see `CorrectedDataModule`; with the true cast it is the upper bound for hue corrections.
    """

    reads: ClassVar[View] = "sessions"

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        correction: Correction = "hue_mode",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, learning_rate, weight_decay, seed)
        self.correction, self.oracle = correction, correction == "true_cast"

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Return the outputs by case; the features (B, C, T, 192) hold one correction per case."""
        cases = ["own"] if self.oracle else CORRECTION_CASES
        return {case: self(features) for case, features in zip(cases, batch.frame_features.unbind(1), strict=False)}
