"""AnchorFrame Distribution Reasoner (paper section 3.3): a VAE over the anchor feature, then a re-normalisation."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.models.processes import compute_moments_over_processes, is_distributed
from cdc_mmpg.models.weights import read_metadata, read_state_dict, save_safetensors

if TYPE_CHECKING:  # imports Lightning, which the cloud service does not install
    from cdc_mmpg.data.batch import Task

Preset = Literal["small", "paper_qa", "paper_mc"]

# Hidden sizes of the encoder (the decoder mirrors them) and size of the latent. `paper_qa` has 27,802,816 parameters,
# `paper_mc` 20,213,984, and `small`, which suffices for the synthetic dataset, 554,880.
PRESETS: dict[str, tuple[tuple[int, int], int]] = {
    "small": ((384, 384), 96),
    "default": ((384, 384), 96),  # former name of `small`, in saved files
    "paper_qa": ((4096, 2048), 1536),
    "paper_mc": ((3072, 3072), 16),
}


def choose_paper_preset(task: "Task") -> Preset:
    """Return the preset that matches the paper's parameter counts for a task.

    The paper prints no counts for TGIF's action and transition, which are multiple choice, nor for retrieval: its
    generated projection has 49,408 values, closer to the 97,097 of question answering than to the 193 of multiple
    choice.
    """
    return "paper_mc" if task == "multiple_choice" else "paper_qa"


class Reasoned(NamedTuple):
    """Outputs of the reasoner for a batch of anchor features."""

    generated: Tensor  # (B, 192) g, eq. 16
    decoded: Tensor  # (B, 192) f̃, eq. 13
    mean: Tensor  # (B, Z) of the latent distribution
    log_variance: Tensor  # (B, Z)


class ReasonerLosses(NamedTuple):
    """Losses of eq. 14, 15 and 17, scalars."""

    kl: Tensor
    reconstruction: Tensor
    generation: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the losses, eq. 18."""
        return self.kl + self.reconstruction + self.generation


class ADR(nn.Module):
    """Reasoner of the paper, a variational autoencoder of anchor features.

    It encodes f, decodes f̃, and returns g, which is f re-normalised to the statistics of f̃.

    Source: eq. 8-10 and 12-18.

    Deviation: eq. 16's "channel-wise" statistics of a single 192-vector are two scalars, so with axis "feature" g is
    a·f + b, which the LayerNorm of eq. 11 undoes but for the sign of a. "group:G" takes G equal parts of the vector;
    "batch" takes each channel's statistics over the batch, of all processes together, and running ones when evaluating
    and for a batch of one, which has no deviation.

    Everything is computed in float32, regardless of the run's precision.

    Deviation: the sizes. The paper prints none, only totals of the cloud's parameters, which leave 27.75-27.81M for the
    reasoner in question answering and 20.21-20.31M in multiple choice. `paper_qa` and `paper_mc` are sizes that fit
    these totals; nothing says that they are the authors'.

    Deviation: z is drawn in training only; serving takes its mean, so that the same upload always gets the same layer.

    Args:
        preset: sizes, see `PRESETS`.
        axis: axis of eq. 16's mean and deviation: "feature", "group:G" with G a divisor of 192, or "batch".
        target: what f̃ and g approximate: the "anchor" feature (eq. 15, 17) or the "global" feature of all frames.

    Raises:
        ConfigError: the axis is unknown.
    """

    EPSILON = 1e-5
    LAMBDA = 0.1  # weight in eq. 17
    MOMENTUM = 0.1  # update rate of the running statistics

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self, preset: Preset = "small", axis: str = "feature", target: Literal["anchor", "global"] = "anchor"
    ) -> None:
        super().__init__()
        kind, _, parts = axis.partition(":")
        if kind == "group" and parts.isdigit() and int(parts) > 0 and FEATURE_DIM % int(parts) == 0:
            self.groups = int(parts)
        elif axis in ("feature", "batch"):
            self.groups = 1
        else:
            raise ConfigError(f"axis {axis!r}: use 'feature', 'batch', or 'group:G' with G a divisor of {FEATURE_DIM}")
        self.preset, self.axis, self.target = preset, axis, target
        (first, second), latent = PRESETS[preset]
        self.encoder = _build_mlp(FEATURE_DIM, first, second, 2 * latent)
        self.decoder = _build_mlp(latent, second, first, FEATURE_DIM)
        if axis == "batch":  # statistics of f in row 0, of f̃ in row 1
            self.register_buffer("running_mean", torch.zeros(2, FEATURE_DIM))
            self.register_buffer("running_std", torch.ones(2, FEATURE_DIM))

    def forward(self, anchor: Tensor, sample: bool) -> Reasoned:
        """Reason about anchor features (B, 192).

        Args:
            anchor: f, the pooled feature of one frame per clip.
            sample: whether to draw z from its distribution (training) or to take the mean (serving, where the same
                upload must give the same layer).
        """
        with torch.autocast(anchor.device.type, enabled=False):
            anchor = anchor.float()
            mean, log_variance = self.encoder(anchor).chunk(2, dim=-1)
            latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean) if sample else mean
            decoded = self.decoder(latent)
            return Reasoned(self._renormalise(anchor, decoded), decoded, mean, log_variance)

    def _renormalise(self, anchor: Tensor, decoded: Tensor) -> Tensor:
        """Shift and scale the anchor to the mean and deviation of the decoded feature (eq. 16); all are (B, 192)."""
        if self.axis != "batch":
            parts = anchor.unflatten(-1, (self.groups, -1)), decoded.unflatten(-1, (self.groups, -1))
            (std, mean), (new_std, new_mean) = (
                torch.std_mean(part, dim=-1, correction=0, keepdim=True) for part in parts
            )
            return (new_std * (parts[0] - mean) / (std + self.EPSILON) + new_mean).flatten(-2)
        if self.training and (len(anchor) > 1 or is_distributed()):
            both = torch.stack([anchor, decoded])  # (2, B, 192)
            if is_distributed():
                mean, std = compute_moments_over_processes(both)
            else:
                std, mean = torch.std_mean(both, dim=1, correction=0)  # (2, 192) each
            self.running_mean.lerp_(mean.detach(), self.MOMENTUM)
            self.running_std.lerp_(std.detach(), self.MOMENTUM)
        else:
            mean, std = self.running_mean, self.running_std
        return std[1] * (anchor - mean[0]) / (std[0] + self.EPSILON) + mean[1]

    def losses(self, anchor: Tensor, global_feature: Tensor, reasoned: Reasoned) -> ReasonerLosses:
        """Return the losses of eq. 14, 15 and 17 for anchors f and global features m̄ of their clips, both (B, 192).

        Deviation: the KL divergence is the mean over the latent's dimensions, where the evidence lower bound sums:
        the other terms are means over dimensions, too.
        """
        mean, log_variance = reasoned.mean, reasoned.log_variance
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        if self.target == "anchor":
            target, other = anchor, reasoned.decoded
        else:
            target, other = global_feature, anchor
        generation = F.mse_loss(reasoned.generated, target) + self.LAMBDA * F.mse_loss(reasoned.generated, other)
        return ReasonerLosses(kl, F.mse_loss(reasoned.decoded, target), generation)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, with the settings that `load` needs."""
        save_safetensors(self.state_dict(), path, {"preset": self.preset, "axis": self.axis, "target": self.target})

    @classmethod
    def load(cls, path: Path) -> "ADR":
        """Load a reasoner written by `save`.

        Raises:
            CheckpointError: the file is missing, unreadable, or not a reasoner.
        """
        state = read_state_dict(path)
        settings = read_metadata(path)
        try:
            adr = cls(settings["preset"], settings["axis"], settings["target"])  # type: ignore[arg-type]
            adr.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not an AnchorFrame Distribution Reasoner ({str(error).splitlines()[-1].strip()}): "
                "give phase one's adr.safetensors"
            ) from error
        return adr


def _build_mlp(inputs: int, first: int, second: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, first), nn.GELU(), nn.Linear(first, second), nn.GELU(), nn.Linear(second, outputs)
    )
