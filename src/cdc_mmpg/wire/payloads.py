"""Payload of layers: matrices of numbers as bytes; the tables of results count the same bytes. No torch."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.errors import DataError

Precision = Literal["float32", "float16", "int8"]
PAYLOAD_PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
Matrix = NDArray[np.float32]  # (vectors, length)
Shape = tuple[int, int]

INT8_MAX = 127  # -128 is not used
NUMBER_BYTES = {"float32": 4, "float16": 2, "int8": 1}
SCALE_BYTES = 2  # float16 scale per vector of an int8 matrix


def count_matrix_bytes(shapes: Sequence[Shape], precision: Precision) -> int:
    """Return the number of bytes of matrices (vectors, length), without headers."""
    scale = SCALE_BYTES if precision == "int8" else 0
    return sum(vectors * (length * NUMBER_BYTES[precision] + scale) for vectors, length in shapes)


def encode_matrices(matrices: Sequence[Matrix], precision: Precision) -> bytes:
    """Encode matrices one after another as little-endian bytes; an int8 matrix is preceded by its scales.

    Every vector of an int8 matrix has its own scale: its largest magnitude / 127, in float16.

    Raises:
        DataError: a number is not finite, or too large for the precision.
    """
    parts: list[bytes] = []
    for matrix in matrices:
        if precision == "int8":
            scales = _cast_float16(np.abs(matrix).max(axis=1, initial=0) / INT8_MAX)
            wide = scales.astype(np.float32)[:, None]
            rounded = np.where(wide > 0, np.rint(matrix / np.maximum(wide, np.float32(1e-12))), 0)
            parts += [scales.tobytes(), np.clip(rounded, -INT8_MAX, INT8_MAX).astype(np.int8).tobytes()]
        else:
            parts.append(
                (_cast_float16(matrix) if precision == "float16" else _require_finite(matrix).astype("<f4")).tobytes()
            )
    return b"".join(parts)


def decode_matrices(content: bytes, shapes: Sequence[Shape], precision: Precision) -> list[Matrix]:
    """Decode the matrices that `encode_matrices` wrote.

    Raises:
        DataError: the number of bytes does not match the shapes, or a number is not finite.
    """
    if len(content) != (expected := count_matrix_bytes(shapes, precision)):
        raise DataError(
            f"the payload has {len(content)} bytes, expected {expected} for {precision} matrices of "
            f"{' and '.join(f'{vectors} x {length}' for vectors, length in shapes)}"
        )
    matrices, offset = [], 0

    def take(count: int, dtype: str) -> NDArray[np.float32]:
        nonlocal offset
        values = np.frombuffer(content, dtype, count, offset)
        offset += values.nbytes
        return _require_finite(values.astype(np.float32))

    for vectors, length in shapes:
        if precision == "int8":
            scales = take(vectors, "<f2")
            matrices.append(take(vectors * length, "i1").reshape(vectors, length) * scales[:, None])
        else:
            dtype = "<f4" if precision == "float32" else "<f2"
            matrices.append(take(vectors * length, dtype).reshape(vectors, length))
    return matrices


def _cast_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Convert values to little-endian float16."""
    with np.errstate(over="ignore"):
        return _require_finite(values.astype("<f2"))


def _require_finite(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values unchanged.

    Raises:
        DataError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise DataError("the payload contains a number that is not finite, or too large for its precision")
    return values
