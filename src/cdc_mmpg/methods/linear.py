"""F-linear (paper section 4.4.1): the encoder is frozen, head and last layer train."""

from torch import Tensor

from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.methods.base import Traffic, check_virtual
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head, LastLayer


class OneLayer(Answering):
    """Base of methods that answer with one static last layer; nothing is sent.

    Attributes:
        layer: static last layer of all samples.
    """

    layer: StaticLayer

    def last_layer(self, frame_features: Tensor) -> LastLayer:
        """Return the static layer."""
        return self.layer

    def device_layers(self, frame_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the static layer, repeated for every clip."""
        return self.layer.repeat(len(frame_features))

    def traffic(self) -> Traffic:
        """Return no bytes: nothing is sent."""
        return Traffic(0, 0)


class Linear(OneLayer):
    """F-linear: one last layer for all samples; nothing is sent.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        virtual: number of virtual devices per training device; each sees every sample of it as often as the device.
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
            encoder.pooler.requires_grad_(False)  # this head does not use it
        self.layer = StaticLayer(head.inputs, head.outputs)
