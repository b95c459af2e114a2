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

    The result is as long as a layer-normed feature, its first `number` values along the axes, zeros behind them.

    Args:
        number: of axes.
    """

    RIDGE = 0.1  # of the mean variance within devices, added to it

    def __init__(self, number: int) -> None:
        super().__init__()
        if not 1 <= number < FEATURE_DIM:
            raise ConfigError(f"axes {number}: from 1 to {FEATURE_DIM - 1}, or null for all values as they are")
        # Fitted, not trained; parameters, so that they count.
        self.mean = nn.Parameter(torch.zeros(FEATURE_DIM), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(FEATURE_DIM)[:, :number].clone(), requires_grad=False)

    def fit(self, anchors: Tensor, devices: Sequence[Sequence[int]]) -> None:
        """Find the axes in the anchor features (A, 192) of devices, each given by its rows.

        Raises:
            DataError: no more devices than axes have two clips.
        """
        groups = [anchors[list(rows)].double() for rows in devices if len(rows) > 1]
        number = self.axes.shape[1]
        if len(groups) <= number:
            raise DataError(
                f"{len(groups)} devices have two unlabelled clips: {number} axes in which they differ need more than "
                f"{number} (--model.init_args.axes)"
            )
        means = torch.stack([group.mean(0) for group in groups])
        apart = torch.cat([group - group.mean(0) for group in groups])
        within = apart.T @ apart / (len(apart) - len(groups))
        centred = means - means.mean(0)
        # The means of few clips differ by chance, too.
        chance = sum(1 / len(group) for group in groups) / len(groups)
        between = centred.T @ centred / (len(groups) - 1) - chance * within
        within += self.RIDGE * within.diagonal().mean() * torch.eye(FEATURE_DIM, dtype=within.dtype)
        whiten = torch.linalg.inv(torch.linalg.cholesky(within))
        _, directions = torch.linalg.eigh(whiten @ between @ whiten.T)  # ascending
        self.mean.data.copy_(means.mean(0))
        self.axes.data.copy_(whiten.T @ directions.flip(1)[:, :number])

    def forward(self, uploads: Tensor) -> Tensor:
        """Return the directions of uploads, (..., 192) both, in float32 whatever the precision of the run."""
        with torch.autocast(uploads.device.type, enabled=False):
            along = F.normalize((uploads.float() - self.mean) @ self.axes, dim=-1) * FEATURE_DIM**0.5
        return F.pad(along, (0, FEATURE_DIM - along.shape[-1]))
