"""Payload encoding: sizes by the published arithmetic, rounding within half a step, malformed bytes refused."""

import numpy as np
import pytest
import torch

from cdc_mmpg.errors import DataError
from cdc_mmpg.models.fda import round_parts
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
def test_payload_sizes_match_the_published_arithmetic(shapes, precision, size):
    assert count_matrix_bytes(shapes, precision) == size
    matrices = [np.ones(shape, np.float32) for shape in shapes]
    assert len(encode_matrices(matrices, precision)) == size


def test_encoded_bytes_match_a_hand_computed_example():
    """In int8, one scale per vector (largest magnitude / 127) precedes the values; -128 is unused."""
    matrices = [np.array([[1.27, -0.2, 0.634], [0, 0, 0]], np.float32), np.array([[-12.7, 6.35]], np.float32)]
    scales = [np.float16(0.01), np.float16(0), np.float16(0.1)]
    content = np.array(scales[:2], "<f2").tobytes() + bytes([127, 256 - 20, 63, 0, 0, 0])
    content += np.array(scales[2:], "<f2").tobytes() + bytes([256 - 127, 64])
    assert encode_matrices(matrices, "int8") == content
    decoded = decode_matrices(content, [(2, 3), (1, 2)], "int8")
    np.testing.assert_array_equal(decoded[0], np.array([[127, -20, 63], [0, 0, 0]]) * np.float32(scales[0]))
    np.testing.assert_array_equal(decoded[1], np.array([[-127, 64]]) * np.float32(scales[2]))
    for precision, dtype in (("float32", "<f4"), ("float16", "<f2")):
        content = b"".join(matrix.astype(dtype).tobytes() for matrix in matrices)
        assert encode_matrices(matrices, precision) == content
        for matrix, restored in zip(matrices, decode_matrices(content, [(2, 3), (1, 2)], precision), strict=True):
            np.testing.assert_array_equal(restored, matrix.astype(dtype).astype(np.float32))


def test_vectors_too_small_for_their_scale_become_zero():
    """Below 6e-8 x 127 / 2 the scale itself is zero in float16 and must not be divided by."""
    # Just above, float16 rounds the scale to a multiple of 6e-8: a value of 178 steps is clipped to 127.
    for value, expected in ((1e-7, 0), (1e-30, 0), (5e-6, 5e-6), (1.06e-5, 127 * 2.0**-24)):
        (decoded,) = decode_matrices(encode_matrices([np.full((1, 3), value, np.float32)], "int8"), [(1, 3)], "int8")
        np.testing.assert_allclose(decoded, expected, rtol=0.01, atol=0)
        (rounded,) = round_parts((torch.full((1, 3), value),), "int8")  # training and tests round as the wire does
        np.testing.assert_array_equal(rounded.numpy(), decoded)
    assert encode_matrices([np.full((1, 3), 1e-7, np.float32)], "int8") == bytes(5)
    assert encode_matrices([np.zeros((2, 0), np.float32)], "int8") == bytes(4)  # vectors of length zero


@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
def test_decoded_matrices_are_the_encoded_ones_rounded(precision):
    generator = np.random.default_rng(0)
    matrices = [generator.normal(size=shape).astype(np.float32) * 3 for shape in ((5, 7), (1, 40))]
    matrices[0][2] = 0  # a vector of zeros has scale zero
    decoded = decode_matrices(encode_matrices(matrices, precision), [(5, 7), (1, 40)], precision)
    rounded = round_parts([torch.from_numpy(matrix) for matrix in matrices], precision)  # as tests of methods round
    for sent, received, expected in zip(matrices, decoded, rounded, strict=True):
        assert received.dtype == np.float32
        np.testing.assert_array_equal(received, expected.numpy())
        largest = np.abs(sent).max(axis=1, keepdims=True)
        step = {"float32": 0, "float16": 2.0**-11, "int8": 0.51 / INT8_MAX}[precision]
        assert (np.abs(received - sent) <= step * largest).all()
    assert not decoded[0][2].any()


@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
def test_another_length_is_refused(precision):
    content = encode_matrices([np.ones((2, 3), np.float32)], precision)
    for wrong in (content[:-1], content + b"\0", b""):
        with pytest.raises(DataError, match=f"expected {len(content)} for {precision} matrices of 2 x 3"):
            decode_matrices(wrong, [(2, 3)], precision)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
def test_non_finite_payloads_are_neither_encoded_nor_decoded(precision, value):
    with pytest.raises(DataError, match="not finite"):
        encode_matrices([np.array([[1, value]], np.float32)], precision)
    content = bytearray(encode_matrices([np.ones((1, 2), np.float32)], precision))
    dtype = "<f4" if precision == "float32" else "<f2"
    number = np.array(value, dtype).tobytes()
    content[: len(number)] = number
    with pytest.raises(DataError, match="not finite"):
        decode_matrices(bytes(content), [(1, 2)], precision)


def test_values_too_large_for_float16_are_refused():
    with pytest.raises(DataError, match="too large"):
        encode_matrices([np.array([[1e5]], np.float32)], "float16")
