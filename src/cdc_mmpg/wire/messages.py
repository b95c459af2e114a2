"""The bytes between device and cloud: a fixed header, a body of raw numbers, on the way down a signature. No torch.

    header     68 bytes: magic 4, version 1, message 1, kind 1, zero 1, encoder 16, generator 16, nonce 16, shape 3 x 4
    signature  64 bytes: Ed25519 over the header and the SHA-256 of the body, of layers only
    body       up: 192 float32; down: the payload (see `payloads`)

All numbers are little-endian. Encoder and generator are digests of weights (`DIGEST_BYTES` of a SHA-256): features of
one encoder mean nothing to another, and a layer is for one generator's device. The nonce of an upload is drawn by the
device; that of a layer is the digest of the whole upload it answers, so that it fits no other upload. No length is
read: what is due follows from kind and shape, which must be those that the receiver has.
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

LAYER_PATH = "/v1/layer"  # over HTTP: where an upload is posted, and answered by a layer
MESSAGE_MAGIC = b"CDCM"
MESSAGE_VERSION = 1
DIGEST_BYTES = 16
SIGNATURE_BYTES = 64
HEADER = struct.Struct("<4s4B16s16s16s3I")
UPLOAD_BYTES = HEADER.size + 4 * FEATURE_DIM
FRAMING_BYTES = HEADER.size + SIGNATURE_BYTES  # of a layer

MAX_FEATURE_MAGNITUDE = 1.0
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
    """A message that is not what it should be; nothing of it is used.

    Args:
        reason: which part.
        detail: what it is, and what it should be.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class UploadRejected(Rejected):
    """The cloud cannot use an upload."""


class WeightsRejected(Rejected):
    """A device does not install a layer; the one in use stays. Never fatal."""


class Layout(NamedTuple):
    """What is sent of a last layer: how (`kind`), and of which size.

    float32, float16 and int8 are the whole layer, a row for each output with its bias last; low_rank are the two
    factors of a residual on a layer that the device has, and basis the coefficients of layers that it has, both int8.
    """

    kind: LayerKind
    outputs: int  # L
    columns: int  # D + 1
    number: int = 0  # the rank, or how many layers the basis has

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
        """Precision of its numbers."""
        return "int8" if self.kind in ("low_rank", "basis") else self.kind  # type: ignore[return-value]

    @property
    def payload_bytes(self) -> int:
        """Bytes without framing."""
        return count_matrix_bytes(self.shapes, self.precision)

    @property
    def message_bytes(self) -> int:
        """Bytes with framing."""
        return FRAMING_BYTES + self.payload_bytes


class Versions(NamedTuple):
    """Which weights a message belongs to."""

    encoder: bytes
    generator: bytes


class Upload(NamedTuple):
    """An upload as the cloud reads it."""

    layout: Layout  # of the layer that is asked for
    versions: Versions
    feature: NDArray[np.float32]  # (192,)


def digest(content: bytes) -> bytes:
    """Return as much of a SHA-256 as headers hold."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def encode_upload(
    feature: NDArray[np.float32], layout: Layout, versions: Versions, nonce: bytes | None = None
) -> bytes:
    """Return an anchor feature (192,), or the mean of several, with the layer that is asked for it; 836 bytes.

    Args:
        feature: from -1 to 1.
        layout: of the layer.
        versions: of the device.
        nonce: `DIGEST_BYTES` that no other upload has; drawn unless given.

    Raises:
        DataError: another shape or range.
    """
    if feature.shape != (FEATURE_DIM,) or not (np.abs(feature) <= MAX_FEATURE_MAGNITUDE).all():
        raise DataError(f"an anchor feature {feature.shape}: {FEATURE_DIM} numbers from -1 to 1 are due")
    header = _pack_header("upload", layout, versions, nonce or os.urandom(DIGEST_BYTES))
    return header + feature.astype("<f4").tobytes()


def decode_upload(content: bytes, layouts: Sequence[Layout], versions: Versions) -> Upload:
    """Return an upload that this cloud can answer.

    Args:
        content: any bytes.
        layouts: what it can send.
        versions: its own.

    Raises:
        UploadRejected: with the reason.
    """
    if len(content) != UPLOAD_BYTES:
        raise UploadRejected("length", f"{len(content)} bytes: an upload has {UPLOAD_BYTES}")
    layout, _ = _read_header(content, "upload", layouts, versions, UploadRejected)
    feature = np.frombuffer(content, "<f4", FEATURE_DIM, HEADER.size)
    if not (np.abs(feature) <= MAX_FEATURE_MAGNITUDE).all():  # nor is what is not a number
        raise UploadRejected("range", "a feature has numbers from -1 to 1 alone, as the hyperbolic tangent gives them")
    return Upload(layout, versions, feature)


def encode_layer(
    matrices: Sequence[Matrix], upload: bytes, layout: Layout, versions: Versions, key: Ed25519PrivateKey
) -> bytes:
    """Return what a generator made of an upload, signed.

    Raises:
        DataError: a number is not finite, or too large for the layout's precision.
    """
    header = _pack_header("layer", layout, versions, digest(upload))
    body = encode_matrices(matrices, layout.precision)
    return header + key.sign(signed_content(header, body)) + body


def decode_layer(
    content: bytes, upload: bytes | None, layout: Layout, versions: Versions, key: Ed25519PublicKey
) -> list[Matrix]:
    """Return the matrices of a layer that this device may install.

    Args:
        content: any bytes.
        upload: that it answers; None takes one for any upload, which the device itself has kept.
        layout: that was asked for.
        versions: the device's own.
        key: of the cloud.

    Raises:
        WeightsRejected: with the reason.
    """
    if len(content) != layout.message_bytes:
        raise WeightsRejected("length", f"{len(content)} bytes: {layout.message_bytes} are due for {layout}")
    _, nonce = _read_header(content, "layer", [layout], versions, WeightsRejected)
    if upload is not None and nonce != digest(upload):
        raise WeightsRejected("nonce", "it answers another upload")
    header, body = content[: HEADER.size], content[FRAMING_BYTES:]
    try:
        key.verify(content[HEADER.size : FRAMING_BYTES], signed_content(header, body))
    except InvalidSignature as error:
        raise WeightsRejected(
            "signature",
            "changed on the way, or another cloud's: a device bundle goes with the cloud bundle of its export",
        ) from error
    try:
        return decode_matrices(body, layout.shapes, layout.precision)
    except DataError as error:
        raise WeightsRejected("finite", str(error)) from error


def signed_content(header: bytes, body: bytes) -> bytes:
    """Return what a signature is over: Ed25519 reads its message twice, with a slower digest."""
    return header + hashlib.sha256(body).digest()


def _pack_header(message: Message, layout: Layout, versions: Versions, nonce: bytes) -> bytes:
    kind = LAYER_KINDS.index(layout.kind)
    return HEADER.pack(MESSAGE_MAGIC, MESSAGE_VERSION, MESSAGES.index(message), kind, 0, *versions, nonce, *layout[1:])


def _read_header(
    content: bytes, message: Message, layouts: Sequence[Layout], versions: Versions, error: type[Rejected]
) -> tuple[Layout, bytes]:
    """Return which of the layouts a message has, and its nonce.

    Raises:
        Rejected: of the kind `error`; it is none, or something else differs.
    """
    magic, version, number, kind, zero, encoder, generator, nonce, *shape = HEADER.unpack_from(content)
    if magic != MESSAGE_MAGIC:
        raise error("magic", f"it begins with {magic!r}, not with {MESSAGE_MAGIC!r}")
    if version != MESSAGE_VERSION or zero:
        raise error("version", f"version {version} of the format: this is version {MESSAGE_VERSION}")
    if number != MESSAGES.index(message):
        raise error("message", f"not {message}, which would be number {MESSAGES.index(message)}, but {number}")
    if encoder != versions.encoder:
        raise error("encoder", f"of encoder {encoder.hex()}: this one is {versions.encoder.hex()}")
    if generator != versions.generator:
        raise error("generator", f"of generator {generator.hex()}: this one is {versions.generator.hex()}")
    known = {LAYER_KINDS.index(layout.kind): layout for layout in layouts}
    if kind not in known:
        raise error("kind", f"number {kind}: here are {', '.join(f'{n} ({own.kind})' for n, own in known.items())}")
    if tuple(shape) != known[kind][1:]:
        raise error("shape", f"outputs, columns, number {tuple(shape)}: here {tuple(known[kind][1:])}")
    return known[kind], nonce
