"""What travels from cloud to device: matrices of numbers as bytes, exactly as many as the tables say. No torch."""

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
SCALE_BYTES = 2  # float16, one a vector in int8


def count_matrix_bytes(shapes: Sequence[Shape], precision: Precision) -> int:
    """Return the bytes of matrices (vectors, length), without any header."""
    scale = SCALE_BYTES if precision == "int8" else 0
    return sum(vectors * (length * NUMBER_BYTES[precision] + scale) for vectors, length in shapes)


def encode_matrices(matrices: Sequence[Matrix], precision: Precision) -> bytes:
    """Return matrices one after another as bytes; little-endian; in int8 each matrix's scales first.

    Every vector of an int8 matrix has a scale of its own, its largest magnitude / 127 in float16.

    Raises:
        DataError: a number that is not finite, or too large for the precision.
    """
    parts: list[bytes] = []
    for matrix in matrices:
        if precision == "int8":
            scales = _narrow(np.abs(matrix).max(axis=1, initial=0) / INT8_MAX)
            wide = scales.astype(np.float32)[:, None]
            rounded = np.where(wide > 0, np.rint(matrix / np.maximum(wide, np.float32(1e-12))), 0)
            parts += [scales.tobytes(), np.clip(rounded, -INT8_MAX, INT8_MAX).astype(np.int8).tobytes()]
        else:
            parts.append(
                (_narrow(matrix) if precision == "float16" else _require_finite(matrix).astype("<f4")).tobytes()
            )
    return b"".join(parts)


def decode_matrices(content: bytes, shapes: Sequence[Shape], precision: Precision) -> list[Matrix]:
    """Return the matrices that `encode_matrices` wrote.

    Raises:
        DataError: another number of bytes than the shapes take, or numbers that are not finite.
    """
    if len(content) != (due := count_matrix_bytes(shapes, precision)):
        raise DataError(
            f"a payload of {len(content)} bytes: {due} are due for {precision} matrices of "
            f"{' and '.join(f'{vectors} x {length}' for vectors, length in shapes)}"
        )
    matrices, place = [], 0

    def take(count: int, kind: str) -> NDArray[np.float32]:
        nonlocal place
        values = np.frombuffer(content, kind, count, place)
        place += values.nbytes
        return _require_finite(values.astype(np.float32))

    for vectors, length in shapes:
        if precision == "int8":
            scales = take(vectors, "<f2")
            matrices.append(take(vectors * length, "i1").reshape(vectors, length) * scales[:, None])
        else:
            kind = "<f4" if precision == "float32" else "<f2"
            matrices.append(take(vectors * length, kind).reshape(vectors, length))
    return matrices


def _narrow(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return values as float16, little-endian."""
    with np.errstate(over="ignore"):
        return _require_finite(values.astype("<f2"))


def _require_finite(values: NDArray[Any]) -> NDArray[Any]:
    """Return values, all of which are finite.

    Raises:
        DataError: one is not.
    """
    if not np.isfinite(values).all():
        raise DataError("a payload holds a number that is not finite, or too large for its precision")
    return values
