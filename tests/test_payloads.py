"""What travels: sizes by the published arithmetic, values within half a step, bytes that claim too much."""

import numpy as np
import pytest

from cdc_mmpg.errors import DataError
from cdc_mmpg.payloads import LARGEST, PRECISIONS, decode, encode, size_bytes


@pytest.mark.parametrize(
    ("shapes", "precision", "size"),
    [
        ([(1501, 97)], "float32", 582_388),
        ([(1001, 97)], "float32", 388_388),
        ([(1541, 97)], "float32", 597_908),
        ([(1, 193)], "float32", 772),
        ([(1501, 97)], "float16", 291_194),
        ([(1501, 97)], "int8", 148_599),
        ([(8, 1501), (8, 97)], "int8", 12_816),
        ([(4, 1501), (4, 97)], "int8", 6_408),
        ([(1, 1501), (1, 97)], "int8", 1_602),
        ([(1, 192)], "int8", 194),
        ([(1, 8)], "int8", 10),
    ],
)
def test_sizes(shapes, precision, size):
    assert size_bytes(shapes, precision) == size
    matrices = [np.ones(shape, np.float32) for shape in shapes]
    assert len(encode(matrices, precision)) == size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_comes_back(precision):
    generator = np.random.default_rng(0)
    matrices = [generator.normal(size=shape).astype(np.float32) * 3 for shape in ((5, 7), (1, 40))]
    matrices[0][2] = 0  # a vector without a largest magnitude
    arrived = decode(encode(matrices, precision), [(5, 7), (1, 40)], precision)
    for sent, got in zip(matrices, arrived, strict=True):
        assert got.dtype == np.float32
        largest = np.abs(sent).max(axis=1, keepdims=True)
        step = {"float32": 0, "float16": 2.0**-11, "int8": 0.51 / LARGEST}[precision]
        assert (np.abs(got - sent) <= step * largest).all()
    assert not arrived[0][2].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_length_is_refused(precision):
    content = encode([np.ones((2, 3), np.float32)], precision)
    for wrong in (content[:-1], content + b"\0", b""):
        with pytest.raises(DataError, match=f"{len(content)} are due for {precision} matrices of 2 x 3"):
            decode(wrong, [(2, 3)], precision)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_is_neither_sent_nor_taken(precision, value):
    with pytest.raises(DataError, match="not finite"):
        encode([np.array([[1, value]], np.float32)], precision)
    content = bytearray(encode([np.ones((1, 2), np.float32)], precision))
    kind = "<f4" if precision == "float32" else "<f2"
    number = np.array(value, kind).tobytes()
    content[: len(number)] = number
    with pytest.raises(DataError, match="not finite"):
        decode(bytes(content), [(1, 2)], precision)


def test_too_large_for_float16():
    with pytest.raises(DataError, match="too large"):
        encode([np.array([[1e5]], np.float32)], "float16")
