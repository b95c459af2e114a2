"""What travels between device and cloud: sizes by the published arithmetic, and nothing that was changed is taken."""

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
    decode_layer,
    decode_upload,
    encode_layer,
    encode_upload,
    signed_content,
)
from cdc_mmpg.wire.payloads import INT8_MAX

VERSIONS = Versions(bytes(range(16)), bytes(range(16, 32)))
OTHER = bytes(16)  # a digest of something else
KEY = Ed25519PrivateKey.generate()
LAYOUTS = [Layout(kind, 5, 7, {"low_rank": 2, "basis": 8}.get(kind, 0)) for kind in LAYER_KINDS]
WHOLE = LAYOUTS[0]
FEATURE = np.random.default_rng(0).uniform(-1, 1, FEATURE_DIM).astype(np.float32)
UPLOAD = encode_upload(FEATURE, WHOLE, VERSIONS)
MAGIC, VERSION, MESSAGE, KIND, ZERO, ENCODER, GENERATOR, NONCE, SHAPE = 0, 4, 5, 6, 7, 8, 24, 40, 56  # in the header


def matrices(layout, seed=1):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) for shape in layout.shapes]


def layer(layout=WHOLE, upload=UPLOAD, versions=VERSIONS, key=KEY):
    return encode_layer(matrices(layout), upload, layout, versions, key)


def lying(header, body):
    """Bytes of a cloud that lies."""
    return header + KEY.sign(signed_content(header, body)) + body


def patched(content, place, new):
    return content[:place] + new + content[place + len(new) :]


def reason_of_layer(content, upload=UPLOAD, layout=WHOLE, versions=VERSIONS, key=KEY):
    with pytest.raises(WeightsRejected) as caught:
        decode_layer(content, upload, layout, versions, key.public_key())
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def reason_of_upload(content, layouts=LAYOUTS, versions=VERSIONS):
    with pytest.raises(UploadRejected) as caught:
        decode_upload(content, layouts, versions)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def test_an_upload_is_768_bytes_and_a_header():
    assert (UPLOAD_BYTES, HEADER.size, len(UPLOAD)) == (836, 68, 836)
    assert UPLOAD[68:] == FEATURE.astype("<f4").tobytes()


def test_the_bytes_on_the_wire_by_hand():
    """Devices and clouds of other days must understand each other: nothing here may change without a new version."""
    numbers = {"float32": 0, "float16": 1, "int8": 2, "low_rank": 3, "basis": 4}
    for layout in LAYOUTS:
        upload = encode_upload(FEATURE, layout, VERSIONS)
        rank = {"low_rank": 2, "basis": 8}.get(layout.kind, 0)
        digests = bytes(range(16)), bytes(range(16, 32))
        assert upload[:40] == struct.pack("<4sBBBB16s16s", b"CDCM", 1, 0, numbers[layout.kind], 0, *digests)
        assert upload[56:68] == struct.pack("<III", 5, 7, rank)
        message = layer(layout, upload)
        header, signature, body = message[:68], message[68:132], message[132:]
        nonce = hashlib.sha256(upload).digest()[:16]
        kind = numbers[layout.kind]
        expected = struct.pack("<4sBBBB16s16s16sIII", b"CDCM", 1, 1, kind, 0, *digests, nonce, 5, 7, rank)
        assert header == expected
        KEY.public_key().verify(signature, header + hashlib.sha256(body).digest())
        if layout.kind == "float32":
            assert body == matrices(layout)[0].astype("<f4").tobytes()
    assert LAYER_PATH == "/v1/layer"


def test_the_framing_of_a_layer_is_132_bytes():
    assert FRAMING_BYTES == 132
    for layout in LAYOUTS:
        assert len(layer(layout)) == layout.message_bytes == 132 + layout.payload_bytes


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
    assert len(layer(layout)) == size + FRAMING_BYTES


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_layers_survive_encoding_and_decoding(layout):
    upload = encode_upload(FEATURE, layout, VERSIONS)
    arrived = decode_layer(layer(layout, upload), upload, layout, VERSIONS, KEY.public_key())
    assert [matrix.shape for matrix in arrived] == list(layout.shapes)
    step = {"float32": 0, "float16": 2.0**-11, "int8": 0.51 / INT8_MAX}[layout.precision]
    for sent, got in zip(matrices(layout), arrived, strict=True):
        assert (np.abs(got - sent) <= step * np.abs(sent).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_uploads_survive_encoding_and_decoding(layout):
    got = decode_upload(encode_upload(FEATURE, layout, VERSIONS), LAYOUTS, VERSIONS)
    assert (got.layout, got.versions) == (layout, VERSIONS)
    assert (got.feature == FEATURE).all()


def test_two_uploads_of_the_same_feature_differ_and_a_layer_answers_one_of_them():
    again = encode_upload(FEATURE, WHOLE, VERSIONS)
    assert again != UPLOAD
    assert reason_of_layer(layer(upload=again)) == "nonce"
    decode_layer(layer(upload=again), again, WHOLE, VERSIONS, KEY.public_key())


def test_a_nonce_may_be_given():
    assert HEADER.unpack_from(encode_upload(FEATURE, WHOLE, VERSIONS, OTHER))[7] == OTHER


def test_a_layer_that_the_device_has_kept_needs_no_upload():
    arrived = decode_layer(layer(), None, WHOLE, VERSIONS, KEY.public_key())
    assert (arrived[0] == matrices(WHOLE)[0]).all()


@pytest.mark.parametrize("upload", [UPLOAD, None], ids=["asked", "kept"])
def test_every_flipped_bit_of_the_framing_is_noticed(upload):
    good, found = layer(), set()
    for bit in range(8 * FRAMING_BYTES):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        found.add(reason_of_layer(bytes(content), upload))
    assert found == {"magic", "version", "message", "encoder", "generator", "kind", "shape", "signature"} | (
        {"nonce"} if upload else set()
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_flipped_bits_of_the_payload_are_noticed(layout):
    good, chance = layer(layout), random.Random(0)
    for bit in chance.sample(range(8 * layout.payload_bytes), min(300, 8 * layout.payload_bytes)):
        content = bytearray(good)
        content[FRAMING_BYTES + bit // 8] ^= 1 << bit % 8
        assert reason_of_layer(bytes(content), layout=layout) == "signature"


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_a_layer_of_another_length_is_refused(layout):
    good = layer(layout)
    for cut in [*range(1, len(good), max(1, len(good) // 40)), 1, len(good) - 1, len(good)]:
        assert reason_of_layer(good[:-cut], layout=layout) == "length"
    for more in (1, 2, 4, 64, 132, len(good), 100_000):
        assert reason_of_layer(good + bytes(more), layout=layout) == "length"
        assert reason_of_layer(bytes(more) + good, layout=layout) == "length"


def test_an_unsigned_layer_is_refused():
    assert reason_of_layer(patched(layer(), HEADER.size, bytes(64))) == "signature"


def test_a_layer_that_another_key_signed_is_refused():
    assert reason_of_layer(layer(key=Ed25519PrivateKey.generate())) == "signature"


def test_a_signature_of_the_payload_alone_is_refused():
    body = layer()[FRAMING_BYTES:]
    assert reason_of_layer(patched(layer(), HEADER.size, KEY.sign(body))) == "signature"


def test_a_layer_for_another_encoder_or_generator_is_refused():
    assert reason_of_layer(layer(versions=VERSIONS._replace(encoder=OTHER))) == "encoder"
    assert reason_of_layer(layer(versions=VERSIONS._replace(generator=OTHER))) == "generator"


def test_a_layer_of_another_kind_or_shape_is_refused():
    half = Layout("float16", 5, 14)  # as many bytes as 5 x 7 float32
    assert reason_of_layer(layer(half)) == "kind"
    assert reason_of_layer(layer(Layout("float32", 7, 5))) == "shape"
    assert reason_of_layer(layer(Layout("float32", 5, 7, 1))) == "shape"


def test_a_message_of_the_other_direction_is_refused():
    layout = Layout("float32", 1, 176)  # whose layers are as long as uploads
    upload = encode_upload(FEATURE, layout, VERSIONS)
    assert layout.message_bytes == UPLOAD_BYTES
    assert reason_of_layer(upload, upload, layout) == "message"
    assert reason_of_upload(layer(layout, upload), [layout]) == "message"
    assert reason_of_layer(UPLOAD) == "length"


def test_a_future_version_is_refused():
    good = layer()
    for place in (VERSION, ZERO):
        body, header = good[FRAMING_BYTES:], patched(good[: HEADER.size], place, b"\x02")
        assert reason_of_layer(lying(header, body)) == "version"
        assert reason_of_upload(patched(UPLOAD, place, b"\x02")) == "version"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYER_KINDS)
def test_numbers_that_are_none_are_refused_though_the_cloud_signed_them(layout, value):
    good = layer(layout)
    number = np.array(value, "<f4" if layout.precision == "float32" else "<f2").tobytes()  # of int8, a scale
    content = lying(good[: HEADER.size], patched(good[FRAMING_BYTES:], 0, number))
    assert reason_of_layer(content, layout=layout) == "finite"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.001, -1.001, 3e38])
def test_a_feature_that_no_hyperbolic_tangent_gives_is_neither_sent_nor_taken(value):
    feature = FEATURE.copy()
    feature[100] = value
    assert reason_of_upload(UPLOAD[: HEADER.size] + feature.tobytes()) == "range"
    with pytest.raises(DataError, match="192 numbers from -1 to 1"):
        encode_upload(feature, WHOLE, VERSIONS)


@pytest.mark.parametrize("shape", [(191,), (193,), (1, 192), (0,)])
def test_a_feature_of_another_shape_is_not_sent(shape):
    with pytest.raises(DataError, match="an anchor feature"):
        encode_upload(np.zeros(shape, np.float32), WHOLE, VERSIONS)


def test_the_ends_of_the_range_are_taken():
    for value in (1, -1, 0, 1e-45):
        feature = np.full(FEATURE_DIM, value, np.float32)
        assert (decode_upload(encode_upload(feature, WHOLE, VERSIONS), LAYOUTS, VERSIONS).feature == feature).all()


def test_an_upload_of_another_length_is_refused():
    for content in (b"", UPLOAD[:-1], UPLOAD + b"\0", UPLOAD[: HEADER.size], UPLOAD[68:], UPLOAD * 2):
        assert reason_of_upload(content) == "length"


def test_json_is_no_upload():
    assert reason_of_upload(b'{"feature": [0.5, 0.25]}') == "length"
    assert reason_of_upload(b'{"feature": ['.ljust(UPLOAD_BYTES - 2, b"0") + b"]}") == "magic"


@pytest.mark.parametrize(
    ("place", "new", "reason"),
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
def test_an_upload_whose_header_differs_is_refused_with_the_reason(place, new, reason):
    assert reason_of_upload(patched(UPLOAD, place, new), [WHOLE]) == reason


def test_the_nonce_of_an_upload_may_be_anything():
    decode_upload(patched(UPLOAD, NONCE, OTHER), LAYOUTS, VERSIONS)


def mutated(content, chance):
    """Bytes that were changed, cut, repeated, or are others altogether."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 50])):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0:
                changed[place : place + 1] = chance.randbytes(1)
            case 1:
                del changed[place : place + chance.choice([1, 4, 64])]
            case 2:
                changed[place:place] = chance.randbytes(chance.choice([1, 4, 64]))
            case 3:
                changed[place : place + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\0\0\xc0\x7f", b"\0\0\x80\x7f"])
            case 4:
                changed = bytearray(chance.randbytes(chance.choice([0, 1, 68, 132, 836, len(content), 5000])))
    return bytes(changed)


def test_random_and_mutated_bytes_are_refused_or_right():
    chance, taken = random.Random(7), 0
    goods = {layout: (encode_upload(FEATURE, layout, VERSIONS), layer(layout)) for layout in LAYOUTS}
    for number in range(4000):
        layout = LAYOUTS[number % len(LAYOUTS)]
        upload, good = goods[layout]
        content = mutated(good, chance)
        with suppress(WeightsRejected):
            decode_layer(content, UPLOAD, layout, VERSIONS, KEY.public_key())
            assert content == good
        with suppress(UploadRejected):
            feature = decode_upload(mutated(upload, chance), LAYOUTS, VERSIONS).feature
            taken += 1
            assert (np.abs(feature) <= 1).all()
    assert taken > 100  # changed features are features


def test_signed_nonsense_is_refused_or_finite():
    chance = random.Random(8)
    for number in range(2000):
        layout = LAYOUTS[number % len(LAYOUTS)]
        header = layer(layout)[: HEADER.size]
        content = lying(header, chance.randbytes(layout.payload_bytes + chance.choice([0, 0, 0, 1, -1])))
        with suppress(WeightsRejected):
            arrived = decode_layer(content, UPLOAD, layout, VERSIONS, KEY.public_key())
            assert all(np.isfinite(matrix).all() for matrix in arrived)


def test_the_wire_imports_no_torch():
    code = "import cdc_mmpg.wire.messages, sys; assert not {'torch', 'lightning', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
