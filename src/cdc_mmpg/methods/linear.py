"""F-linear (paper section 4.4.1): the encoder is frozen, head and last layer train."""

from torch import Tensor

from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.methods.base import Traffic, check_virtual
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head, LastLayer


class OneLayer(Answering):
    """A method that answers with one static last layer; nothing travels.

    Attributes:
        layer: that one.
    """

    layer: StaticLayer

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return the one layer."""
        return self.layer

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the one layer, repeated."""
        return self.layer.repeated(len(frame_features))

    def traffic(self) -> Traffic:
        """Return no bytes: nothing is sent."""
        return Traffic(0, 0)


class Linear(OneLayer):
    """One last layer for all samples; nothing travels.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        virtual: virtual devices of each device that trains, which see each of its
            samples as often as itself.
    """

    trains_encoder = False

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
        virtual: int = 0,
    ) -> None:
        super().__init__(encoder, head, self.trains_encoder, learning_rate, weight_decay, seed)
        self.virtual = check_virtual(virtual)
        if not head.pooled:
            encoder.pooler.requires_grad_(False)  # nothing here reads it
        self.layer = StaticLayer(head.inputs, head.outputs)
