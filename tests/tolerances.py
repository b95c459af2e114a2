"""Tolerances for two computations of the same values.

Processors sum in different orders (vector widths, fused multiplications, threads), so results differ by a few rounding
units of the dtype times the size of the terms. An absolute bound that holds on one processor fails on another.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# Largest difference relative to the largest expected value, or to 1 if that is larger.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def assert_agree(actual: Tensor | ArrayLike, expected: Tensor | ArrayLike, dtype: torch.dtype | None = None) -> None:
    """Assert that two computations gave the same values within the tolerance.

    Args:
        actual: computed values.
        expected: reference values of the same shape and dtype.
        dtype: dtype of the computation, if it differs from that of the values.
    """
    found, reference = (torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x) for x in (actual, expected))
    tolerance = TOLERANCES[dtype or reference.dtype] * max(1.0, reference.detach().abs().max().item())
    torch.testing.assert_close(found, reference, rtol=0, atol=tolerance)
