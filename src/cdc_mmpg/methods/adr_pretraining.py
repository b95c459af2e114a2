"""Phase one of CDC-MMPG (paper section 3.3): training of the AnchorFrame Distribution Reasoner alone."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cdc_mmpg.data.batch import Split
from cdc_mmpg.methods.base import Batch, Method, ParameterCounts, Traffic, count
from cdc_mmpg.models.adr import ADR, Preset, choose_paper_preset
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head


def select_anchor_feature(encoder: AllInOne, frame_features: Tensor, draw: bool) -> Tensor:
    """Return the feature f (..., 192) of one frame per clip, from features of all its frames (..., T, 192).

    Deviation: the paper draws the frame when serving, too; there the middle one is taken, so that the same clip gets
    the same head.

    Deviation: f is read from the pass over all frames, in which neighbouring frames have exchanged patches and which
    the device computes anyway; the paper speaks of the feature of one frame. (A session's anchors are passes over one
    frame.)
    """
    *shape, frames, _ = frame_features.shape
    if draw:
        chosen = torch.randint(frames, shape, device=frame_features.device)
    else:
        chosen = torch.full(shape, frames // 2, device=frame_features.device)
    return encoder.pool(frame_features.take_along_dim(chosen[..., None, None], dim=-2).squeeze(-2))


class ADRPretraining(Method):
    """Training of the reasoner with the losses of eq. 14-18 on a frozen encoder's anchor features.

    The best epoch is the one with the lowest validation loss; the reasoner is written to `adr.safetensors`.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`; the head does not train in this phase.
        preset: sizes of the reasoner, see `ADR`; None uses those that match the paper's counts for the task.
        axis, target: see `ADR`.
    """

    monitor = "val/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        preset: Preset | None = None,
        axis: str = "feature",
        target: Literal["anchor", "global"] = "anchor",
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head.requires_grad_(False), False, learning_rate, weight_decay, seed)
        self.adr = ADR(preset or choose_paper_preset(head.task), axis, target)
        if axis == "batch":
            self.needs_whole_step = "the reasoner's statistics (axis: batch) are over all samples of a step"

    def _step(self, batch: Batch, split: Split) -> Tensor:
        frame_features = self.head.condition(self.encode(batch).frame_features).flatten(0, -3)
        training = split == "train"
        with self.float32():
            anchor = select_anchor_feature(self.encoder, frame_features, draw=training)
            fused = self.encoder.pool(frame_features.mean(1))
            losses = self.adr.losses(anchor, fused, self.adr(anchor, sample=training))
        if not training:
            size = float(len(batch.labels))
            for name in ("kl", "reconstruction", "generation"):
                self.log(f"{split}/{name}", getattr(losses, name), batch_size=size, sync_dist=True)
            self.log(f"{split}/loss", losses.total, batch_size=size, sync_dist=True, prog_bar=True)
        return losses.total

    def parameter_counts(self) -> ParameterCounts:
        """Return the counts of encoder (device) and reasoner (cloud and trained)."""
        return ParameterCounts(count(self.encoder), count(self.adr), count(self.adr))

    def traffic(self) -> Traffic:
        """Return no bytes: there is no layer to send yet."""
        return Traffic(0, 0)

    def export(self, folder: Path) -> None:
        """Write the reasoner for phase two."""
        self.adr.save(folder / "adr.safetensors")
