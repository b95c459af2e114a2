"""Messages between device and cloud: their bytes and sizes, and that changed messages are refused."""

import hashlib
import random
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import DataError
from cdc_mmpg.wire.messages import (
    FRAMING_BYTES,
    HEADER,
    LAYER_KINDS,
    LAYER_PATH,
    UPLOAD_BYTES,
    Layout,
    UploadRejected,
    Versions,
    WeightsRejected,
    build_signed_content,
    decode_layer,
    decode_upload,
    encode_layer,
    encode_upload,
)
from cdc_mmpg.wire.payloads import INT8_MAX

VERSIONS = Versions(bytes(range(16)), bytes(range(16, 32)))
OTHER = bytes(16)  # a digest of other weights
KEY = Ed25519PrivateKey.generate()
LAYOUTS = [Layout(kind, 5, 7, {"low_rank": 2, "basis": 8}.get(kind, 0)) for kind in LAYER_KINDS]
FULL_LAYOUT = LAYOUTS[0]
FEATURE = np.random.default_rng(0).uniform(-1, 1, FEATURE_DIM).astype(np.float32)
UPLOAD = encode_upload(FEATURE, FULL_LAYOUT, VERSIONS)
# Offsets of the fields in the header.
MAGIC, VERSION, MESSAGE, KIND, ZERO, ENCODER, GENERATOR, NONCE, SHAPE = 0, 4, 5, 6, 7, 8, 24, 40, 56


def draw_matrices(layout, seed=1):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) for shape in layout.shapes]


def build_layer(layout=FULL_LAYOUT, upload=UPLOAD, versions=VERSIONS, key=KEY):
    return encode_layer(draw_matrices(layout), upload, layout, versions, key)


def sign_layer(header, body):
    """Return a validly signed layer message with any header and body."""
    return header + KEY.sign(build_signed_content(header, body)) + body


def patch_bytes(content, offset, replacement):
    return content[:offset] + replacement + content[offset + len(replacement) :]


def read_layer_refusal(content, upload=UPLOAD, layout=FULL_LAYOUT, versions=VERSIONS, key=KEY):
    with pytest.raises(WeightsRejected) as caught:
        decode_layer(content, upload, layout, versions, key.public_key())
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def read_upload_refusal(content, layouts=LAYOUTS, versions=VERSIONS):
    with pytest.raises(UploadRejected) as caught:
        decode_upload(content, layouts, versions)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def test_upload_is_a_header_and_768_bytes():
    assert (UPLOAD_BYTES, HEADER.size, len(UPLOAD)) == (836, 68, 836)
    assert UPLOAD[68:] == FEATURE.astype("<f4").tobytes()


def test_wire_format_equals_its_written_specification():
    """Devices and clouds of different releases must interoperate: a change here needs a new version number."""
    numbers = {"float32": 0, "float16": 1, "int8": 2, "low_rank": 3, "basis": 4}
    for layout in LAYOUTS:
        upload = encode_upload(FEATURE, layout, VERSIONS)
        rank = {"low_rank": 2, "basis": 8}.get(layout.kind, 0)
        digests = bytes(range(16)), bytes(range(16, 32))
        assert upload[:40] == struct.pack("<4sBBBB16s16s", b"CDCM", 1, 0, numbers[layout.kind], 0, *digests)
        assert upload[56:68] == struct.pack("<III", 5, 7, rank)
        message = build_layer(layout, upload)
        header, signature, body = message[:68], message[68:132], message[132:]
        nonce = hashlib.sha256(upload).digest()[:16]
        kind = numbers[layout.kind]
        expected = struct.pack("<4sBBBB16s16s16sIII", b"CDCM", 1, 1, kind, 0, *digests, nonce, 5, 7, rank)
        assert header == expected
        KEY.public_key().verify(signature, header + hashlib.sha256(body).digest())
        if layout.kind == "float32":
            assert body == draw_matrices(layout)[0].astype("<f4").tobytes()
    assert LAYER_PATH == "/v1/layer"


def test_the_framing_of_a_layer_is_132_bytes():
    assert FRAMING_BYTES == 132
    for layout in LAYOUTS:
        assert len(build_layer(layout)) == layout.message_bytes == 132 + layout.payload_bytes


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (Layout("float32", 1501, 97), 582_388),
        (Layout("float16", 1501, 97), 291_194),
        (Layout("int8", 1501, 97), 148_599),
        (Layout("low_rank", 1501, 97, 4), 6_408),
        (Layout("basis", 1501, 97, 8), 10),
        (Layout("float32", 1001, 97), 388_388),
        (Layout("float32", 1541, 97), 597_908),
        (Layout("float32", 1, 193), 772),
    ],
)
def test_payloads_have_the_published_sizes(layout, size):
    assert layout.payload_bytes == size
    assert len(build_layer(layout)) == size + FRAMING_BYTES


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_layers_survive_encoding_and_decoding(layout):
    upload = encode_upload(FEATURE, layout, VERSIONS)
    decoded = decode_layer(build_layer(layout, upload), upload, layout, VERSIONS, KEY.public_key())
    assert [matrix.shape for matrix in decoded] == list(layout.shapes)
    step = {"float32": 0, "float16": 2.0**-11, "int8": 0.51 / INT8_MAX}[layout.precision]
    for sent, received in zip(draw_matrices(layout), decoded, strict=True):
        assert (np.abs(received - sent) <= step * np.abs(sent).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_uploads_survive_encoding_and_decoding(layout):
    decoded = decode_upload(encode_upload(FEATURE, layout, VERSIONS), LAYOUTS, VERSIONS)
    assert (decoded.layout, decoded.versions) == (layout, VERSIONS)
    assert (decoded.feature == FEATURE).all()


def test_layer_is_accepted_only_for_the_upload_it_answers():
    second_upload = encode_upload(FEATURE, FULL_LAYOUT, VERSIONS)
    assert second_upload != UPLOAD
    assert read_layer_refusal(build_layer(upload=second_upload)) == "nonce"
    decode_layer(build_layer(upload=second_upload), second_upload, FULL_LAYOUT, VERSIONS, KEY.public_key())


def test_nonce_of_an_upload_can_be_given():
    assert HEADER.unpack_from(encode_upload(FEATURE, FULL_LAYOUT, VERSIONS, OTHER))[7] == OTHER


def test_stored_layer_is_decoded_without_its_upload():
    decoded = decode_layer(build_layer(), None, FULL_LAYOUT, VERSIONS, KEY.public_key())
    assert (decoded[0] == draw_matrices(FULL_LAYOUT)[0]).all()


@pytest.mark.parametrize("upload", [UPLOAD, None], ids=["requested", "stored"])
def test_every_flipped_bit_of_the_framing_is_refused(upload):
    valid, reasons = build_layer(), set()
    for bit in range(8 * FRAMING_BYTES):
        content = bytearray(valid)
        content[bit // 8] ^= 1 << bit % 8
        reasons.add(read_layer_refusal(bytes(content), upload))
    assert reasons == {"magic", "version", "message", "encoder", "generator", "kind", "shape", "signature"} | (
        {"nonce"} if upload else set()
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_flipped_bits_of_the_payload_are_refused(layout):
    valid, generator = build_layer(layout), random.Random(0)
    for bit in generator.sample(range(8 * layout.payload_bytes), min(300, 8 * layout.payload_bytes)):
        content = bytearray(valid)
        content[FRAMING_BYTES + bit // 8] ^= 1 << bit % 8
        assert read_layer_refusal(bytes(content), layout=layout) == "signature"


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_a_layer_of_another_length_is_refused(layout):
    valid = build_layer(layout)
    for cut in [*range(1, len(valid), max(1, len(valid) // 40)), 1, len(valid) - 1, len(valid)]:
        assert read_layer_refusal(valid[:-cut], layout=layout) == "length"
    for extra in (1, 2, 4, 64, 132, len(valid), 100_000):
        assert read_layer_refusal(valid + bytes(extra), layout=layout) == "length"
        assert read_layer_refusal(bytes(extra) + valid, layout=layout) == "length"


def test_an_unsigned_layer_is_refused():
    assert read_layer_refusal(patch_bytes(build_layer(), HEADER.size, bytes(64))) == "signature"


def test_layer_signed_with_another_key_is_refused():
    assert read_layer_refusal(build_layer(key=Ed25519PrivateKey.generate())) == "signature"


def test_a_signature_of_the_payload_alone_is_refused():
    body = build_layer()[FRAMING_BYTES:]
    assert read_layer_refusal(patch_bytes(build_layer(), HEADER.size, KEY.sign(body))) == "signature"


def test_a_layer_for_another_encoder_or_generator_is_refused():
    assert read_layer_refusal(build_layer(versions=VERSIONS._replace(encoder=OTHER))) == "encoder"
    assert read_layer_refusal(build_layer(versions=VERSIONS._replace(generator=OTHER))) == "generator"


def test_a_layer_of_another_kind_or_shape_is_refused():
    float16_layout = Layout("float16", 5, 14)  # the same number of bytes as 5 x 7 float32
    assert read_layer_refusal(build_layer(float16_layout)) == "kind"
    assert read_layer_refusal(build_layer(Layout("float32", 7, 5))) == "shape"
    assert read_layer_refusal(build_layer(Layout("float32", 5, 7, 1))) == "shape"


def test_a_message_of_the_other_direction_is_refused():
    layout = Layout("float32", 1, 176)  # its layers are as long as uploads
    upload = encode_upload(FEATURE, layout, VERSIONS)
    assert layout.message_bytes == UPLOAD_BYTES
    assert read_layer_refusal(upload, upload, layout) == "message"
    assert read_upload_refusal(build_layer(layout, upload), [layout]) == "message"
    assert read_layer_refusal(UPLOAD) == "length"


def test_a_future_version_is_refused():
    valid = build_layer()
    for offset in (VERSION, ZERO):
        body, header = valid[FRAMING_BYTES:], patch_bytes(valid[: HEADER.size], offset, b"\x02")
        assert read_layer_refusal(sign_layer(header, body)) == "version"
        assert read_upload_refusal(patch_bytes(UPLOAD, offset, b"\x02")) == "version"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_signed_layers_with_non_finite_values_are_refused(layout, value):
    valid = build_layer(layout)
    number = np.array(value, "<f4" if layout.precision == "float32" else "<f2").tobytes()  # a scale for int8
    content = sign_layer(valid[: HEADER.size], patch_bytes(valid[FRAMING_BYTES:], 0, number))
    assert read_layer_refusal(content, layout=layout) == "finite"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.001, -1.001, 3e38])
def test_features_out_of_range_are_neither_encoded_nor_decoded(value):
    feature = FEATURE.copy()
    feature[100] = value
    assert read_upload_refusal(UPLOAD[: HEADER.size] + feature.tobytes()) == "range"
    with pytest.raises(DataError, match="192 numbers from -1 to 1"):
        encode_upload(feature, FULL_LAYOUT, VERSIONS)


@pytest.mark.parametrize("shape", [(191,), (193,), (1, 192), (0,)])
def test_a_feature_of_another_shape_is_not_sent(shape):
    with pytest.raises(DataError, match="invalid anchor feature"):
        encode_upload(np.zeros(shape, np.float32), FULL_LAYOUT, VERSIONS)


def test_features_at_the_ends_of_the_range_are_accepted():
    for value in (1, -1, 0, 1e-45):
        feature = np.full(FEATURE_DIM, value, np.float32)
        assert (
            decode_upload(encode_upload(feature, FULL_LAYOUT, VERSIONS), LAYOUTS, VERSIONS).feature == feature
        ).all()


def test_an_upload_of_another_length_is_refused():
    for content in (b"", UPLOAD[:-1], UPLOAD + b"\0", UPLOAD[: HEADER.size], UPLOAD[68:], UPLOAD * 2):
        assert read_upload_refusal(content) == "length"


def test_json_is_refused_as_an_upload():
    assert read_upload_refusal(b'{"feature": [0.5, 0.25]}') == "length"
    assert read_upload_refusal(b'{"feature": ['.ljust(UPLOAD_BYTES - 2, b"0") + b"]}") == "magic"


@pytest.mark.parametrize(
    ("offset", "replacement", "reason"),
    [
        (MAGIC, b"CDCN", "magic"),
        (VERSION, b"\x00", "version"),
        (ZERO, b"\x01", "version"),
        (MESSAGE, b"\x01", "message"),
        (MESSAGE, b"\xff", "message"),
        (KIND, b"\x05", "kind"),
        (KIND, b"\x01", "kind"),
        (ENCODER, OTHER, "encoder"),
        (GENERATOR, OTHER, "generator"),
        (SHAPE, b"\xff\xff\xff\xff", "shape"),
        (SHAPE + 4, bytes(4), "shape"),
        (SHAPE + 8, b"\x01", "shape"),
    ],
)
def test_an_upload_whose_header_differs_is_refused_with_the_reason(offset, replacement, reason):
    assert read_upload_refusal(patch_bytes(UPLOAD, offset, replacement), [FULL_LAYOUT]) == reason


def test_any_nonce_of_an_upload_is_accepted():
    decode_upload(patch_bytes(UPLOAD, NONCE, OTHER), LAYOUTS, VERSIONS)


def mutate_bytes(content, generator):
    """Return the bytes with random changes, deletions or insertions, or unrelated bytes."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5, 50])):
        offset = generator.randrange(len(changed) + 1)
        match generator.randrange(5):
            case 0:
                changed[offset : offset + 1] = generator.randbytes(1)
            case 1:
                del changed[offset : offset + generator.choice([1, 4, 64])]
            case 2:
                changed[offset:offset] = generator.randbytes(generator.choice([1, 4, 64]))
            case 3:
                changed[offset : offset + 4] = generator.choice(
                    [b"\xff" * 4, bytes(4), b"\0\0\xc0\x7f", b"\0\0\x80\x7f"]
                )
            case 4:
                changed = bytearray(generator.randbytes(generator.choice([0, 1, 68, 132, 836, len(content), 5000])))
    return bytes(changed)


def test_mutated_messages_are_refused_or_decode_to_valid_values():
    generator, accepted = random.Random(7), 0
    messages = {layout: (encode_upload(FEATURE, layout, VERSIONS), build_layer(layout)) for layout in LAYOUTS}
    for number in range(4000):
        layout = LAYOUTS[number % len(LAYOUTS)]
        upload, valid = messages[layout]
        content = mutate_bytes(valid, generator)
        with suppress(WeightsRejected):
            decode_layer(content, UPLOAD, layout, VERSIONS, KEY.public_key())
            assert content == valid
        with suppress(UploadRejected):
            feature = decode_upload(mutate_bytes(upload, generator), LAYOUTS, VERSIONS).feature
            accepted += 1
            assert (np.abs(feature) <= 1).all()
    assert accepted > 100  # uploads with a changed feature remain valid


def test_signed_random_layers_are_refused_or_finite():
    generator = random.Random(8)
    for number in range(2000):
        layout = LAYOUTS[number % len(LAYOUTS)]
        header = build_layer(layout)[: HEADER.size]
        content = sign_layer(header, generator.randbytes(layout.payload_bytes + generator.choice([0, 0, 0, 1, -1])))
        with suppress(WeightsRejected):
            decoded = decode_layer(content, UPLOAD, layout, VERSIONS, KEY.public_key())
            assert all(np.isfinite(matrix).all() for matrix in decoded)


def test_the_wire_imports_no_torch():
    code = "import cdc_mmpg.wire.messages, sys; assert not {'torch', 'lightning', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
