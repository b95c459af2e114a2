"""Messages between device and cloud: a fixed header, a body of raw numbers, and on layers a signature. No torch.

    header     68 bytes: magic 4, version 1, message 1, kind 1, zero 1, encoder 16, generator 16, nonce 16, shape 3 x 4
    signature  64 bytes: layers only: Ed25519 over the header and the SHA-256 of the body
    body       up: 192 float32; down: the payload (see `payloads`)

All numbers are little-endian. Encoder and generator are digests of weights (`DIGEST_BYTES` of a SHA-256): features of
one encoder are meaningless to another, and a layer fits the devices of one generator only. The nonce of an upload is
drawn by the device; that of a layer is the digest of the whole upload it answers, so that it fits no other upload.
Messages contain no lengths: the length follows from kind and shape, which must match those of the receiver.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.wire.payloads import Matrix, Precision, Shape, count_matrix_bytes, decode_matrices, encode_matrices

LayerKind = Literal["float32", "float16", "int8", "low_rank", "basis"]
LAYER_KINDS: tuple[LayerKind, ...] = ("float32", "float16", "int8", "low_rank", "basis")
Message = Literal["upload", "layer"]
MESSAGES: tuple[Message, ...] = ("upload", "layer")

LAYER_PATH = "/v1/layer"  # HTTP endpoint: uploads are posted to it and answered with a layer
MESSAGE_MAGIC = b"CDCM"
MESSAGE_VERSION = 1
DIGEST_BYTES = 16
SIGNATURE_BYTES = 64
HEADER = struct.Struct("<4s4B16s16s16s3I")
UPLOAD_BYTES = HEADER.size + 4 * FEATURE_DIM
FRAMING_BYTES = HEADER.size + SIGNATURE_BYTES  # bytes of a layer message beside its payload

MAX_FEATURE_MAGNITUDE = 1.0
SAME_EXPORT = "use device and cloud bundles of the same export"  # remedy for messages of other weights or keys
Reason = Literal[
    "length",
    "magic",
    "version",
    "message",
    "kind",
    "shape",
    "encoder",
    "generator",
    "nonce",
    "signature",
    "finite",
    "range",
]


class Rejected(CDCError):
    """An invalid message, which is discarded completely.

    Args:
        reason: name of the invalid part.
        detail: actual and expected value.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class UploadRejected(Rejected):
    """Upload that the cloud refuses."""


class WeightsRejected(Rejected):
    """Layer that the device refuses, keeping the one in use; never fatal."""


class Layout(NamedTuple):
    """Encoding (`kind`) and size of a transmitted last layer.

    float32, float16 and int8 are the whole layer, one row per output with its bias last; low_rank is the two factors
    of a residual to the device's shared layer, and basis the coefficients of the layers in its bundle, both in int8.
    """

    kind: LayerKind
    outputs: int  # L
    columns: int  # D + 1
    number: int = 0  # rank for low_rank, number of layers for basis

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the matrices in the payload."""
        if self.kind == "low_rank":
            return (self.number, self.outputs), (self.number, self.columns)
        if self.kind == "basis":
            return ((1, self.number),)
        return ((self.outputs, self.columns),)

    @property
    def precision(self) -> Precision:
        """Precision of the transmitted numbers."""
        return "int8" if self.kind in ("low_rank", "basis") else self.kind  # type: ignore[return-value]

    @property
    def payload_bytes(self) -> int:
        """Number of bytes without framing."""
        return count_matrix_bytes(self.shapes, self.precision)

    @property
    def message_bytes(self) -> int:
        """Number of bytes with framing."""
        return FRAMING_BYTES + self.payload_bytes


class Versions(NamedTuple):
    """Digests of the weights that a message belongs to."""

    encoder: bytes
    generator: bytes


class Upload(NamedTuple):
    """A decoded upload."""

    layout: Layout  # layout of the requested layer
    versions: Versions
    feature: NDArray[np.float32]  # (192,)


def compute_digest(content: bytes) -> bytes:
    """Return the first `DIGEST_BYTES` of the SHA-256 of bytes."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def encode_upload(
    feature: NDArray[np.float32], layout: Layout, versions: Versions, nonce: bytes | None = None
) -> bytes:
    """Encode an anchor feature (192,), or the mean of several, as an upload of 836 bytes.

    Args:
        feature: values from -1 to 1.
        layout: layout of the requested layer.
        versions: versions of the device.
        nonce: unique `DIGEST_BYTES`; drawn at random unless given.

    Raises:
        DataError: the feature has another shape or range.
    """
    if feature.shape != (FEATURE_DIM,) or not (np.abs(feature) <= MAX_FEATURE_MAGNITUDE).all():
        raise DataError(f"invalid anchor feature of shape {feature.shape}: must be {FEATURE_DIM} numbers from -1 to 1")
    header = _pack_header("upload", layout, versions, nonce or os.urandom(DIGEST_BYTES))
    return header + feature.astype("<f4").tobytes()


def decode_upload(content: bytes, layouts: Sequence[Layout], versions: Versions) -> Upload:
    """Decode and validate an upload.

    Args:
        content: untrusted bytes.
        layouts: layouts that this cloud can send.
        versions: versions of this cloud.

    Raises:
        UploadRejected: the upload is invalid; with the reason.
    """
    if len(content) != UPLOAD_BYTES:
        raise UploadRejected("length", f"received {len(content)} bytes, but an upload has {UPLOAD_BYTES}")
    layout, _ = _read_header(content, "upload", layouts, versions, UploadRejected)
    feature = np.frombuffer(content, "<f4", FEATURE_DIM, HEADER.size)
    if not (np.abs(feature) <= MAX_FEATURE_MAGNITUDE).all():  # False for NaN
        raise UploadRejected("range", "all values of a feature must be between -1 and 1, as the output of a tanh is")
    return Upload(layout, versions, feature)


def encode_layer(
    matrices: Sequence[Matrix], upload: bytes, layout: Layout, versions: Versions, key: Ed25519PrivateKey
) -> bytes:
    """Encode and sign the layer generated for an upload.

    Raises:
        DataError: a number is not finite, or too large for the layout's precision.
    """
    header = _pack_header("layer", layout, versions, compute_digest(upload))
    body = encode_matrices(matrices, layout.precision)
    return header + key.sign(build_signed_content(header, body)) + body


def decode_layer(
    content: bytes, upload: bytes | None, layout: Layout, versions: Versions, key: Ed25519PublicKey
) -> list[Matrix]:
    """Decode and verify a layer, and return its matrices.

    Args:
        content: untrusted bytes.
        upload: upload that the layer must answer; None accepts a layer for any upload.
        layout: layout that was requested.
        versions: versions of this device.
        key: public key of the cloud.

    Raises:
        WeightsRejected: the layer is invalid; with the reason.
    """
    if len(content) != layout.message_bytes:
        raise WeightsRejected("length", f"received {len(content)} bytes, expected {layout.message_bytes} for {layout}")
    _, nonce = _read_header(content, "layer", [layout], versions, WeightsRejected)
    if upload is not None and nonce != compute_digest(upload):
        raise WeightsRejected("nonce", "the layer answers a different upload")
    header, body = content[: HEADER.size], content[FRAMING_BYTES:]
    try:
        key.verify(content[HEADER.size : FRAMING_BYTES], build_signed_content(header, body))
    except InvalidSignature as error:
        raise WeightsRejected(
            "signature",
            f"changed in transit, or signed by another cloud: {SAME_EXPORT}",
        ) from error
    try:
        return decode_matrices(body, layout.shapes, layout.precision)
    except DataError as error:
        raise WeightsRejected("finite", str(error)) from error


def build_signed_content(header: bytes, body: bytes) -> bytes:
    """Return the signed bytes; the body is hashed first, since Ed25519 reads its message twice with a slower hash."""
    return header + hashlib.sha256(body).digest()


def _pack_header(message: Message, layout: Layout, versions: Versions, nonce: bytes) -> bytes:
    kind = LAYER_KINDS.index(layout.kind)
    return HEADER.pack(MESSAGE_MAGIC, MESSAGE_VERSION, MESSAGES.index(message), kind, 0, *versions, nonce, *layout[1:])


def _read_header(
    content: bytes, message: Message, layouts: Sequence[Layout], versions: Versions, error: type[Rejected]
) -> tuple[Layout, bytes]:
    """Validate a header and return the layout and the nonce of its message.

    Raises:
        Rejected: a field of the header is invalid; raised as `error`.
    """
    magic, version, number, kind, zero, encoder, generator, nonce, *shape = HEADER.unpack_from(content)
    if magic != MESSAGE_MAGIC:
        raise error("magic", f"the message starts with {magic!r}, expected {MESSAGE_MAGIC!r}")
    if version != MESSAGE_VERSION or zero:
        raise error("version", f"format version {version} is not supported, expected {MESSAGE_VERSION}")
    if number != MESSAGES.index(message):
        raise error("message", f"message type {number}, expected {MESSAGES.index(message)} ({message})")
    if encoder != versions.encoder:
        different = f"encoder {encoder.hex()}, expected {versions.encoder.hex()}"
        raise error("encoder", f"the message is for {different}: {SAME_EXPORT}")
    if generator != versions.generator:
        different = f"generator {generator.hex()}, expected {versions.generator.hex()}"
        raise error("generator", f"the message is for {different}: {SAME_EXPORT}")
    known = {LAYER_KINDS.index(layout.kind): layout for layout in layouts}
    if kind not in known:
        offered = ", ".join(f"{number} ({layout.kind})" for number, layout in known.items())
        raise error("kind", f"layer kind {kind} is not available, only {offered}")
    if tuple(shape) != known[kind][1:]:
        raise error("shape", f"outputs, columns and number are {tuple(shape)}, expected {tuple(known[kind][1:])}")
    return known[kind], nonce
