"""F-hyper (paper section 4.4.1): a hypernetwork generates the last layer from the frozen encoder's fused feature."""

from cdc_mmpg.methods.answering import Generating
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import FDA, Init
from cdc_mmpg.models.heads import Head


class Hyper(Generating):
    """Hypernetwork without reasoner or MLP, which reads the feature of all frames, m̄ (eq. 5).

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        init: initialisation of the hypernetwork, see `FDA`. As printed, the paper's baseline is badly initialised, the
            likely cause of its results; "hyperfan_in" is the fair baseline.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        init: Init = "printed",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        fda = FDA(head.inputs, head.outputs, init, project=False)
        super().__init__(encoder, head, fda, False, learning_rate, weight_decay, seed)
