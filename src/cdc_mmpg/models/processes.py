"""Collective operations between the processes of a distributed run."""

from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether training is distributed over several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count_processes() -> int:
    """Return the number of processes, 1 if not distributed."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the values over all processes, without a gradient.

    A collective operation: every process must call it equally often and with equal shapes.
    """
    total = values.detach().clone()
    if is_distributed():
        torch.distributed.all_reduce(total)
    return total


def compute_moments_over_processes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (..., X) of rows (..., B, X) over all processes, differentiable on every process."""
    number = rows.new_full((1,), rows.shape[-2])
    mean = all_reduce(torch.cat([rows.sum(-2).flatten(), number]))
    mean, number = (mean[:-1] / mean[-1]).view_as(rows[..., 0, :]), mean[-1]
    variance = all_reduce((rows - mean.unsqueeze(-2)).square().sum(-2)) / number
    return mean, variance.clamp(min=1e-12).sqrt()  # sqrt has an infinite gradient at 0: constant rows


def average_over_processes(mean: Tensor, number: Tensor) -> Tensor:
    """Rescale a local mean so that averaging over the processes gives the mean over all of their items.

    Args:
        mean: mean over the items of this process, a scalar.
        number: number of items of this process; may be 0.
    """
    if not is_distributed():
        return mean
    return mean * (number * count_processes() / sum_over_processes(number).clamp(min=1))


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows (B, ...) of all processes; only the rows of this process carry a gradient."""
    parts = [torch.empty_like(rows) for _ in range(count_processes())]
    torch.distributed.all_gather(parts, rows.detach().contiguous())
    parts[torch.distributed.get_rank()] = rows
    return torch.cat(parts)


def gather_from_processes(value: T) -> list[T]:
    """Return the values of all processes, in rank order; `value` is that of this process and must be picklable."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * count_processes()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every entry is filled
