"""Phase two of CDC-MMPG (paper sections 3.2, 3.3): one frame's feature -> reasoner -> hypernetwork -> last layer."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.adr_pretraining import select_anchor_feature
from cdc_mmpg.methods.answering import DeploymentParts, Generating
from cdc_mmpg.methods.base import check_rate, check_virtual
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import FDA, Init
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import Head


class CDCMMPG(Generating):
    """The paper's method with one adaptation per sample; the reasoner of phase one stays frozen.

    Deviation: eq. 1 adapts to a device, from its real-time samples. As in the paper's experiments every sample is
    adapted to by itself here; the devices' own distributions are what the session's methods read.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        adr: path of phase one's `adr.safetensors`.
        recipe: "paper" continues training the encoder in this phase, as printed, so that its features drift from those
            the reasoner was trained on; "frozen" freezes the encoder, which should come from a fine-tuning run.
        init: initialisation of the hypernetwork, see `FDA`. Deviation: not as printed by default, see there.
        encoder_learning_rate: learning rate of the encoder; None uses `learning_rate`, as in the paper.
        project: whether to put the MLP of eq. 11 before the hypernetwork. Deviation: left out by default, since the
            counts of the paper's tables have no room for its 74,496 parameters.
        virtual: number of virtual devices per training device.
    """

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        adr: str | None = None,
        recipe: Literal["paper", "frozen"] = "paper",
        init: Init = "hyperfan_in",
        project: bool = False,
        learning_rate: float = 1e-4,
        encoder_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        seed: int = 0,
        virtual: int = 0,
    ) -> None:
        if adr is None:
            raise ConfigError(
                "CDC-MMPG needs the reasoner of METHOD=adr_pretraining: set model.init_args.adr to its adr.safetensors"
            )
        fda = FDA(head.inputs, head.outputs, init, project)
        super().__init__(encoder, head, fda, recipe == "paper", learning_rate, weight_decay, seed)
        if encoder_learning_rate is not None:
            check_rate(
                "encoder_learning_rate",
                encoder_learning_rate,
                "; to freeze the encoder, use METHOD=cdc_mmpg_frozen",
            )
            self.encoder_learning_rate = encoder_learning_rate
        self.virtual = check_virtual(virtual)
        self.adr = ADR.load(Path(adr)).requires_grad_(False).eval()

    def frozen_modules(self) -> list[nn.Module]:
        """Return the reasoner, and with `recipe: frozen` the encoder."""
        return [self.adr, *super().frozen_modules()]

    def upload(self, frame_features: Tensor) -> Tensor:
        """Return the anchor feature f of one frame: a random one in training, the middle one when serving."""
        return select_anchor_feature(self.encoder, frame_features, draw=self.training)

    def deployment_parts(self) -> DeploymentParts:
        """Return reasoner and hypernetwork, and as offline layer the mean of the layers generated in training."""
        return DeploymentParts(Generator(self.adr, self.fda), super().deployment_parts().offline)

    def generator_input(self, frame_features: Tensor) -> Tensor:
        """Return the generated feature g (eq. 16) of one frame: sampled in training, the mean when serving."""
        anchor = self.upload(frame_features)
        return self.adr(anchor.flatten(0, -2), sample=self.training).generated.view_as(anchor)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Add a test case without the reasoner: the hypernetwork reads the anchor feature directly."""
        features = batch.frame_features
        cases = super().scores(batch, split)
        if split == "test":
            anchor = select_anchor_feature(self.encoder, self.head.condition(features), draw=False)
            cases["bypassed"] = self.head(self.fuse(features), lambda hidden: self.fda(anchor, hidden))
        return cases

    def export(self, folder: Path) -> None:
        """Write the reasoner next to the weights, so that the run can be loaded without that of phase one."""
        self.adr.save(folder / "adr.safetensors")

    def cloud_modules(self) -> list[nn.Module]:
        """Return reasoner and hypernetwork."""
        return [self.adr, *super().cloud_modules()]
