"""What travels: sizes by the published arithmetic, values within half a step, bytes that claim too much."""

import numpy as np
import pytest
import torch

from cdc_mmpg.errors import DataError
from cdc_mmpg.models.fda import as_sent
from cdc_mmpg.wire.payloads import INT8_MAX, PAYLOAD_PRECISIONS, count_matrix_bytes, decode_matrices, encode_matrices


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
    assert count_matrix_bytes(shapes, precision) == size
    matrices = [np.ones(shape, np.float32) for shape in shapes]
    assert len(encode_matrices(matrices, precision)) == size


def test_the_bytes_by_hand():
    """In int8 the matrix's scales come first, a largest magnitude / 127 for every vector; -128 is not used."""
    matrices = [np.array([[1.27, -0.2, 0.634], [0, 0, 0]], np.float32), np.array([[-12.7, 6.35]], np.float32)]
    scales = [np.float16(0.01), np.float16(0), np.float16(0.1)]
    content = np.array(scales[:2], "<f2").tobytes() + bytes([127, 256 - 20, 63, 0, 0, 0])
    content += np.array(scales[2:], "<f2").tobytes() + bytes([256 - 127, 64])
    assert encode_matrices(matrices, "int8") == content
    arrived = decode_matrices(content, [(2, 3), (1, 2)], "int8")
    np.testing.assert_array_equal(arrived[0], np.array([[127, -20, 63], [0, 0, 0]]) * np.float32(scales[0]))
    np.testing.assert_array_equal(arrived[1], np.array([[-127, 64]]) * np.float32(scales[2]))
    for precision, kind in (("float32", "<f4"), ("float16", "<f2")):
        content = b"".join(matrix.astype(kind).tobytes() for matrix in matrices)
        assert encode_matrices(matrices, precision) == content
        for matrix, back in zip(matrices, decode_matrices(content, [(2, 3), (1, 2)], precision), strict=True):
            np.testing.assert_array_equal(back, matrix.astype(kind).astype(np.float32))


def test_vectors_too_small_for_their_scale_become_zero():
    """Below 6e-8 x 127 / 2 the scale itself is zero in float16: nothing is divided by it."""
    # Just above, float16 rounds the scale to the whole multiples of 6e-8: what would be 178 is 127, the largest.
    for value, expected in ((1e-7, 0), (1e-30, 0), (5e-6, 5e-6), (1.06e-5, 127 * 2.0**-24)):
        (arrived,) = decode_matrices(encode_matrices([np.full((1, 3), value, np.float32)], "int8"), [(1, 3)], "int8")
        np.testing.assert_allclose(arrived, expected, rtol=0.01, atol=0)
        (sent,) = as_sent((torch.full((1, 3), value),), "int8")  # in training and tests as on the wire
        np.testing.assert_array_equal(sent.numpy(), arrived)
    assert encode_matrices([np.full((1, 3), 1e-7, np.float32)], "int8") == bytes(5)
    assert encode_matrices([np.zeros((2, 0), np.float32)], "int8") == bytes(4)  # vectors of no length


@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
def test_decoded_matrices_are_the_encoded_ones_rounded(precision):
    generator = np.random.default_rng(0)
    matrices = [generator.normal(size=shape).astype(np.float32) * 3 for shape in ((5, 7), (1, 40))]
    matrices[0][2] = 0  # a vector without a largest magnitude
    arrived = decode_matrices(encode_matrices(matrices, precision), [(5, 7), (1, 40)], precision)
    for sent, got in zip(matrices, arrived, strict=True):
        assert got.dtype == np.float32
        largest = np.abs(sent).max(axis=1, keepdims=True)
        step = {"float32": 0, "float16": 2.0**-11, "int8": 0.51 / INT8_MAX}[precision]
        assert (np.abs(got - sent) <= step * largest).all()
    assert not arrived[0][2].any()


@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
def test_another_length_is_refused(precision):
    content = encode_matrices([np.ones((2, 3), np.float32)], precision)
    for wrong in (content[:-1], content + b"\0", b""):
        with pytest.raises(DataError, match=f"{len(content)} are due for {precision} matrices of 2 x 3"):
            decode_matrices(wrong, [(2, 3)], precision)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
def test_non_finite_payloads_are_neither_encoded_nor_decoded(precision, value):
    with pytest.raises(DataError, match="not finite"):
        encode_matrices([np.array([[1, value]], np.float32)], precision)
    content = bytearray(encode_matrices([np.ones((1, 2), np.float32)], precision))
    kind = "<f4" if precision == "float32" else "<f2"
    number = np.array(value, kind).tobytes()
    content[: len(number)] = number
    with pytest.raises(DataError, match="not finite"):
        decode_matrices(bytes(content), [(1, 2)], precision)


def test_too_large_for_float16():
    with pytest.raises(DataError, match="too large"):
        encode_matrices([np.array([[1e5]], np.float32)], "float16")
