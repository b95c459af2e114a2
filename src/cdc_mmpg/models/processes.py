"""Sums over the processes of a distributed run, for statistics that training keeps beside the weights."""

import torch
import torch.distributed
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of every process's values, or the values themselves where there is one process; no gradient.

    All processes must call this equally often and with equal shapes.
    """
    total = values.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total
