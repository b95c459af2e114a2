"""Precision of float32 products on a GPU: full float32, or the faster TensorFloat-32 (10 of 23 mantissa bits)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Matmul = Literal["highest", "high"]


def set_matmul(precision: Matmul) -> None:
    """Set the precision of float32 matrix products and convolutions: "highest" is float32, "high" TensorFloat-32."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Compute in full float32 during the block: cached values must be the same on every machine."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_matmul("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
