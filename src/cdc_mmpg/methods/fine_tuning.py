"""Fine-tuning (paper section 4.4.1): everything trains, the last layer is one for all samples."""

from pathlib import Path

from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.weights import save_safetensors


class FineTuning(Linear):
    """F-linear with the encoder trained, too; its encoder is where `recipe: frozen` begins.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
    """

    trains_encoder = True

    def export(self, folder: Path) -> None:
        """Write the fine-tuned encoder."""
        save_safetensors(self.encoder.state_dict(), folder / "encoder.safetensors")
