"""Projection of a session's mean feature onto the axes along which devices differ."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError, DataError


class DeviceAxes(nn.Module):
    """Projection of mean anchor features (..., 192) onto the axes along which devices differ more than clips do.

    Source: ours. The axes are those of Fisher's linear discriminant with devices as classes: the generalised
    eigenvectors of between-device and within-device covariance with the largest eigenvalues. Fitting only needs to
    know which clips of the history share a device. Clips differ in content, and a generator that reads all 192 values
    memorises the content of the few training devices.

    The number of axes can be estimated by parallel analysis (Horn 1965): axes are kept whose eigenvalue exceeds the
    largest one of any of `PERMUTATIONS` random reassignments of the clips to devices.

    The output has the norm of a layer-normed feature: the values along the axes first, then zeros.

    Args:
        number: number of axes; None estimates it, up to `MAX_AXES`.
    """

    RIDGE = 0.1  # share of the mean within-device variance that is added to the diagonal
    PERMUTATIONS = 20
    MAX_AXES = 16

    def __init__(self, number: int | None) -> None:
        super().__init__()
        if number is not None and not 1 <= number < FEATURE_DIM:
            raise ConfigError(
                f'axes is {number}: must be from 1 to {FEATURE_DIM - 1}, "found" (estimated from the training '
                f"devices), or null (all {FEATURE_DIM} values)"
            )
        self.number = number
        # Fitted, not trained; parameters, so that they are counted. Unused axes are zeros.
        self.mean = nn.Parameter(torch.zeros(FEATURE_DIM), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(FEATURE_DIM)[:, : number or self.MAX_AXES].clone(), requires_grad=False)

    def fit(self, anchors: Tensor, devices: Sequence[Sequence[int]]) -> int:
        """Fit the axes to anchor features (A, 192), with the rows of each device; return the number of axes.

        Raises:
            DataError: the number of devices with two or more clips is not larger than the number of axes.
        """
        rows = [list(clips) for clips in devices if len(clips) > 1]
        most = self.axes.shape[1]
        if len(rows) <= (self.number or 1):
            raise DataError(
                f"{len(rows)} devices have two or more unlabelled clips: fitting {self.number or 1} axes needs more "
                f"than {self.number or 1} such devices (--model.init_args.axes)"
            )
        values = anchors[[clip for clips in rows for clip in clips]].double()
        sizes = [len(clips) for clips in rows]
        eigenvalues, axes = compute_discriminants(values.split(sizes), self.RIDGE)
        number = most
        if self.number is None:
            generator = torch.Generator().manual_seed(0)
            shuffled = (values[torch.randperm(len(values), generator=generator)] for _ in range(self.PERMUTATIONS))
            chance = max(float(compute_discriminants(clips.split(sizes), self.RIDGE)[0][0]) for clips in shuffled)
            number = int((eigenvalues[:most] > chance).sum().clamp(min=1))
        self.mean.data.copy_(torch.stack([clips.mean(0) for clips in values.split(sizes)]).mean(0))
        self.axes.data.copy_(F.pad(axes[:, :number], (0, most - number)))
        return number

    def forward(self, uploads: Tensor) -> Tensor:
        """Project uploads (..., 192) onto the axes: (..., 192), in float32 regardless of the run's precision."""
        with torch.autocast(uploads.device.type, enabled=False):
            along = F.normalize((uploads.float() - self.mean) @ self.axes, dim=-1) * FEATURE_DIM**0.5
        return F.pad(along, (0, FEATURE_DIM - along.shape[-1]))


def compute_discriminants(groups: Sequence[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """Return Fisher's eigenvalues (192,), in descending order, and their axes (192, 192), all in float64.

    Args:
        groups: features (clips, 192) of each device, in float64.
        ridge: share of the mean within-device variance that is added to the diagonal.
    """
    means = torch.stack([group.mean(0) for group in groups])
    deviations = torch.cat([group - group.mean(0) for group in groups])
    within = deviations.T @ deviations / (len(deviations) - len(groups))
    centred = means - means.mean(0)
    # Means over few clips also differ by chance: subtract the expected sampling noise.
    chance = sum(1 / len(group) for group in groups) / len(groups)
    between = centred.T @ centred / (len(groups) - 1) - chance * within
    within += ridge * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    eigenvalues, directions = torch.linalg.eigh(whiten @ between @ whiten.T)  # ascending
    return eigenvalues.flip(0), whiten.T @ directions.flip(1)
