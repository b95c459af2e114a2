"""How far two ways of computing the same values may differ, in one place.

Processors add up in different orders (vector widths, fused multiplications, threads), so a difference is a few units of
the dtype's rounding times the size of what was added up. A bound in absolute numbers that holds on one processor fails
on another.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# Largest difference as a share of the largest expected value, at least of 1.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def assert_agree(actual: Tensor | ArrayLike, expected: Tensor | ArrayLike, dtype: torch.dtype | None = None) -> None:
    """Assert that two ways of computing gave the same values.

    Args:
        actual, expected: of the same shape and dtype.
        dtype: in which they were computed, where that is not the dtype that they have.
    """
    one, other = (torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x) for x in (actual, expected))
    tolerance = TOLERANCES[dtype or other.dtype] * max(1.0, other.detach().abs().max().item())
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
