"""Fine-tuning (paper section 4.4.1): everything trains, and all samples share one last layer."""

from pathlib import Path

from cdc_mmpg.methods.base import check_rate
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head
from cdc_mmpg.models.weights import save_safetensors


class FineTuning(Linear):
    """F-linear with a trained encoder, from which runs with `recipe: frozen` start.

    Args:
        encoder, head, learning_rate, weight_decay, seed, virtual: see `Linear`.
        encoder_learning_rate: learning rate of the encoder; None uses `learning_rate`, as in the paper.
    """

    trains_encoder = True

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        learning_rate: float = 1e-4,
        encoder_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        seed: int = 0,
        virtual: int = 0,
    ) -> None:
        super().__init__(encoder, head, learning_rate, weight_decay, seed, virtual)
        if encoder_learning_rate is not None:
            check_rate("encoder_learning_rate", encoder_learning_rate, "; to freeze the encoder, use METHOD=linear")
            self.encoder_learning_rate = encoder_learning_rate

    def export(self, folder: Path) -> None:
        """Write the fine-tuned encoder."""
        save_safetensors(self.encoder.state_dict(), folder / "encoder.safetensors")
