"""What a session's mean feature says about its device: the directions in which devices differ."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError, DataError


class DeviceAxes(nn.Module):
    """Mean anchor feature (..., 192) -> its direction along the axes in which devices differ more than clips do.

    Source: ours; the axes are Fisher's linear discriminant, devices as the classes: of the generalised eigenvectors of
    the covariance between devices and that within them, those with the largest eigenvalues. They need to know which
    clips of the history are of one device, and nothing about the device. Clips differ in content, and a generator that
    reads all 192 values learns the content of the few devices there are by heart.

    How many axes there are is found (parallel analysis, Horn 1965): those whose eigenvalue is above the largest one of
    any of `PERMUTATIONS` random reassignments of the clips to devices.

    The result is as long as a layer-normed feature, its first values along the axes, zeros behind them.

    Args:
        number: of axes; None finds it, up to `MOST`.
    """

    RIDGE = 0.1  # of the mean variance within devices, added to it
    PERMUTATIONS = 20
    MOST = 16

    def __init__(self, number: int | None) -> None:
        super().__init__()
        if number is not None and not 1 <= number < FEATURE_DIM:
            raise ConfigError(f"axes {number}: from 1 to {FEATURE_DIM - 1}, found, or null for all values as they are")
        self.number = number
        # Fitted, not trained; parameters, so that they count. Axes that are not there are zeros.
        self.mean = nn.Parameter(torch.zeros(FEATURE_DIM), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(FEATURE_DIM)[:, : number or self.MOST].clone(), requires_grad=False)

    def fit(self, anchors: Tensor, devices: Sequence[Sequence[int]]) -> int:
        """Find the axes in the anchor features (A, 192) of devices, each given by its rows; return how many.

        Raises:
            DataError: no more devices than axes have two clips.
        """
        rows = [list(own) for own in devices if len(own) > 1]
        most = self.axes.shape[1]
        if len(rows) <= (self.number or 1):
            raise DataError(
                f"{len(rows)} devices have two unlabelled clips: {self.number or 1} axes in which they differ need "
                f"more than {self.number or 1} (--model.init_args.axes)"
            )
        values = anchors[[row for own in rows for row in own]].double()
        sizes = [len(own) for own in rows]
        eigenvalues, axes = discriminate(values.split(sizes), self.RIDGE)
        number = most
        if self.number is None:
            generator = torch.Generator().manual_seed(0)
            shuffled = (values[torch.randperm(len(values), generator=generator)] for _ in range(self.PERMUTATIONS))
            chance = max(float(discriminate(own.split(sizes), self.RIDGE)[0][0]) for own in shuffled)
            number = int((eigenvalues[:most] > chance).sum().clamp(min=1))
        self.mean.data.copy_(torch.stack([own.mean(0) for own in values.split(sizes)]).mean(0))
        self.axes.data.copy_(F.pad(axes[:, :number], (0, most - number)))
        return number

    def forward(self, uploads: Tensor) -> Tensor:
        """Return the directions of uploads, (..., 192) both, in float32 whatever the precision of the run."""
        with torch.autocast(uploads.device.type, enabled=False):
            along = F.normalize((uploads.float() - self.mean) @ self.axes, dim=-1) * FEATURE_DIM**0.5
        return F.pad(along, (0, FEATURE_DIM - along.shape[-1]))


def discriminate(groups: Sequence[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """Return Fisher's eigenvalues (192,), falling, and their axes (192, 192) of groups (., 192) in float64.

    Args:
        groups: values of each device.
        ridge: of the mean variance within devices, added to it.
    """
    means = torch.stack([group.mean(0) for group in groups])
    apart = torch.cat([group - group.mean(0) for group in groups])
    within = apart.T @ apart / (len(apart) - len(groups))
    centred = means - means.mean(0)
    # The means of few clips differ by chance, too.
    chance = sum(1 / len(group) for group in groups) / len(groups)
    between = centred.T @ centred / (len(groups) - 1) - chance * within
    within += ridge * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    eigenvalues, directions = torch.linalg.eigh(whiten @ between @ whiten.T)  # ascending
    return eigenvalues.flip(0), whiten.T @ directions.flip(1)
