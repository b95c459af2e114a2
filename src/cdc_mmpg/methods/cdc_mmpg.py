"""Phase two of CDC-MMPG (paper sections 3.2, 3.3): one frame's feature -> reasoner -> hypernetwork -> last layer."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.adr_pretraining import anchor_feature
from cdc_mmpg.methods.answering import DeploymentParts, Generating
from cdc_mmpg.methods.base import check_rate, check_virtual
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import FDA, Init
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import Head


class CDCMMPG(Generating):
    """The method, one adaptation a sample; the reasoner is phase one's and stays as it is.

    Deviation: eq. 1 adapts to a device, from its real-time samples. As in the paper's experiments every sample is
    adapted to by itself here; the devices' own distributions are what the session's methods read.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`.
        adr: `adr.safetensors` of phase one.
        recipe: "paper" trains the encoder on in this phase, as printed, which leaves the reasoner with features that
            have moved since phase one; "frozen" keeps the encoder, which a fine-tuning run should have adapted first.
        init: of the hypernetwork, see `FDA`. Deviation: not as printed by default, see there.
        encoder_learning_rate: the encoder's own; None, as the paper has it, is `learning_rate`.
        project: put the MLP of eq. 11 before the hypernetwork. Deviation: left out by default, since the counts of the
            paper's tables have no room for its 74,496 parameters.
        virtual: virtual devices of each device that trains.
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
            raise ConfigError("phase two builds on phase one: give model.init_args.adr, its adr.safetensors")
        fda = FDA(head.inputs, head.outputs, init, project)
        super().__init__(encoder, head, fda, recipe == "paper", learning_rate, weight_decay, seed)
        if encoder_learning_rate is not None:
            check_rate(
                "encoder_learning_rate",
                encoder_learning_rate,
                "; to keep the encoder as it is, take METHOD=cdc_mmpg_frozen",
            )
            self.encoder_learning_rate = encoder_learning_rate
        self.virtual = check_virtual(virtual)
        self.adr = ADR.load(Path(adr)).requires_grad_(False).eval()

    def frozen(self) -> list[nn.Module]:
        """Return the reasoner always, the encoder by recipe."""
        return [self.adr, *super().frozen()]

    def upload(self, frame_features: Tensor) -> Tensor:
        """Return the anchor feature f of one frame: drawn in training, the middle one when serving."""
        return anchor_feature(self.encoder, frame_features, draw=self.training)

    def deployment_parts(self) -> DeploymentParts:
        """Return reasoner and hypernetwork; offline, the mean of the layers that training generated."""
        return DeploymentParts(Generator(self.adr, self.fda), super().deployment_parts().offline)

    def generator_input(self, frame_features: Tensor) -> Tensor:
        """Return the generated feature g (eq. 16) of one frame's: drawn in training, the mean when serving."""
        anchor = self.upload(frame_features)
        return self.adr(anchor.flatten(0, -2), sample=self.training).generated.view_as(anchor)

    def scores(self, batch: Any, split: Split) -> dict[str, Tensor]:
        """Add, in the test, the case without the reasoner, the hypernetwork reading the anchor feature itself."""
        features = batch.frame_features
        cases = super().scores(batch, split)
        if split == "test":
            anchor = anchor_feature(self.encoder, self.head.condition(features), draw=False)
            cases["bypassed"] = self.head(self.fuse(features), lambda hidden: self.fda(anchor, hidden))
        return cases

    def export(self, folder: Path) -> None:
        """Write the reasoner beside the weights, so that the run can be read without phase one's."""
        self.adr.save(folder / "adr.safetensors")

    def cloud_modules(self) -> list[nn.Module]:
        """Return the modules of reasoner and hypernetwork."""
        return [self.adr, *super().cloud_modules()]
