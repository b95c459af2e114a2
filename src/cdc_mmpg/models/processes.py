"""What the processes of a distributed run tell each other while they train."""

from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether there are other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count_processes() -> int:
    """Return how many processes there are."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of every process's values, or the values themselves where there is one process; no gradient.

    All processes must call this equally often and with equal shapes.
    """
    total = values.detach().clone()
    if is_distributed():
        torch.distributed.all_reduce(total)
    return total


def moments_over_processes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (..., X) of the rows (..., B, X) of all processes, with the gradient of all."""
    number = rows.new_full((1,), rows.shape[-2])
    mean = all_reduce(torch.cat([rows.sum(-2).flatten(), number]))
    mean, number = (mean[:-1] / mean[-1]).view_as(rows[..., 0, :]), mean[-1]
    variance = all_reduce((rows - mean.unsqueeze(-2)).square().sum(-2)) / number
    return mean, variance.clamp(min=1e-12).sqrt()  # of constant rows no gradient is infinite


def average_over_processes(mean: Tensor, number: Tensor) -> Tensor:
    """Return a mean such that its mean over the processes is that over what all of them have.

    Args:
        mean: of this process, a scalar.
        number: of how many; may be 0.
    """
    if not is_distributed():
        return mean
    return mean * (number * count_processes() / sum_over_processes(number).clamp(min=1))


def gather_rows(own: Tensor) -> Tensor:
    """Return the rows of all processes, of (B, ...) each, with a gradient for this one's."""
    parts = [torch.empty_like(own) for _ in range(count_processes())]
    torch.distributed.all_gather(parts, own.detach().contiguous())
    parts[torch.distributed.get_rank()] = own
    return torch.cat(parts)


def gather_from_processes(value: T) -> list[T]:
    """Return every process's value, of which this one's is `value`; any that can be pickled between them."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * count_processes()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled
