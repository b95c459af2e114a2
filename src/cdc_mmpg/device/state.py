"""What a device keeps over a restart: the anchor features of its session, and the last good layer as it was signed."""

import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.device.connection import make_printable
from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CDCError
from cdc_mmpg.files import atomic_write, remove_leftovers, sync_folder
from cdc_mmpg.wire.messages import (
    DIGEST_BYTES,
    HEADER,
    UPLOAD_BYTES,
    WeightsRejected,
    decode_layer,
    digest,
    encode_upload,
)
from cdc_mmpg.wire.payloads import Matrix

if sys.platform != "win32":  # where a device works, too, and keeps nothing
    import fcntl

logger = logging.getLogger(__name__)

MAX_SESSION_CLIPS = 64  # most recent clips that count; after as many new ones a layer is asked for in any case
CLIP_COUNT = struct.Struct("<I")  # beside a layer that is kept: clips it was made from
FEATURE_BYTES = 4 * FEATURE_DIM  # of an anchor feature
LOCK_SECONDS = 0.5  # that another process may hold the folder's lock


LayerOrigin = Literal["adapted", "kept", "shared"]


class Layer(NamedTuple):
    """A last layer that is ready for use."""

    matrix: Matrix  # (L, D + 1)
    anchors: int  # of how many clips it was made, at most `MAX_SESSION_CLIPS`
    origin: LayerOrigin  # made for this session or sample, kept from before a restart, shared by all devices


class Receipt(NamedTuple):
    """A layer as it came, and what it answers."""

    message: bytes
    upload: bytes
    salt: bytes
    anchors: int


def encode_counted_upload(feature: NDArray[np.float32], anchors: int, model: DeviceModel) -> tuple[bytes, bytes]:
    """Return an upload whose nonce holds how many clips it is the mean of, and the salt that hides it from the cloud.

    The layer's signature is over the whole upload, so that nobody can put another number beside a layer that is kept.
    """
    salt = os.urandom(DIGEST_BYTES)
    return encode_upload(feature, model.layout, model.versions, digest(salt + CLIP_COUNT.pack(anchors))), salt


class State:
    """A folder that a device writes to; every file is whole, or the one before.

    Its files are for one encoder and one generator: what others left is not read. A folder that cannot be read or
    written is no reason not to answer: it is logged, each thing once. A lock on the folder makes a check and what is
    written after it one step among processes; `session` names the session that the files are of, and changes when a new
    one begins.

    Args:
        folder: made where it is not there.
        model: the device's.
    """

    def __init__(self, folder: Path, model: DeviceModel) -> None:
        self._model, self._folder = model, folder
        name = f"{model.versions.encoder.hex()[:8]}.{model.versions.generator.hex()[:8]}"
        self._layer, self._anchors = folder / f"layer.{name}.bin", folder / f"anchors.{name}.f32"
        self._name, self._lock = folder / f"session.{name}", threading.Lock()
        self._complaints: set[str] = set()
        self._session, self._is_cleared = b"", True
        with self._log_failures("read"):
            if folder.exists():
                remove_leftovers(folder)
                self._session = self._on_disk()

    def layer(self) -> Layer | None:
        """Return the last good layer, verified anew; None where there is none, or it cannot be trusted."""
        model = self._model
        if model.unit != "session":  # it would be another sample's
            return None
        length = model.layout.message_bytes
        content = self._read(self._layer, length + UPLOAD_BYTES + DIGEST_BYTES + CLIP_COUNT.size)
        if content is None:
            return None
        message, upload = content[:length], content[length : length + UPLOAD_BYTES]
        salt, count = content[-DIGEST_BYTES - CLIP_COUNT.size : -CLIP_COUNT.size], content[-CLIP_COUNT.size :]
        try:
            matrices = decode_layer(message, upload, model.layout, model.versions, model.cloud)
            anchors = int(CLIP_COUNT.unpack(count)[0]) if len(count) == CLIP_COUNT.size else 0
            if HEADER.unpack_from(upload)[7] != digest(salt + count) or not 0 < anchors <= MAX_SESSION_CLIPS:
                raise WeightsRejected("nonce", "the number of clips beside it is not the one that was signed")
            return Layer(model.install(matrices, model.layout), anchors, "kept")
        except WeightsRejected as error:
            logger.warning("%s is not used: %s", self._layer, error)
            return None

    def keep_layer(self, receipt: Receipt) -> None:
        """Write a layer in place of the one before."""
        self._write(self._layer, receipt.message + receipt.upload + receipt.salt + CLIP_COUNT.pack(receipt.anchors))

    def anchors(self) -> list[NDArray[np.float32]]:
        """Return the anchor features of the session so far, (192,) each, at most `MAX_SESSION_CLIPS`."""
        content = self._read(self._anchors, MAX_SESSION_CLIPS * FEATURE_BYTES)
        if content is None:
            return []
        if len(content) % FEATURE_BYTES or len(content) > MAX_SESSION_CLIPS * FEATURE_BYTES:
            logger.warning(
                "%s is not used: not 1 to %d anchor features of %d bytes",
                self._anchors,
                MAX_SESSION_CLIPS,
                FEATURE_BYTES,
            )
            return []
        values = np.frombuffer(content, "<f4")
        if not (np.abs(values) <= 1).all():  # nor is what is not a number
            logger.warning("%s is not used: a feature has numbers from -1 to 1", self._anchors)
            return []
        return list(values.reshape(-1, FEATURE_DIM))

    def keep_anchors(self, anchors: Sequence[NDArray[np.float32]]) -> None:
        """Write them in place of those before."""
        self._write(self._anchors, np.stack(anchors).astype("<f4").tobytes())

    def clear(self) -> None:
        """Keep nothing any more, and let nothing of the session that ends be kept; before the next writing at last."""
        self._is_cleared = False
        with (
            self._log_failures("cleared: delete it, or the next start goes on with the session before"),
            self._hold_lock(),
        ):
            self._clear()

    def _clear(self) -> None:
        for path in (self._layer, self._anchors):
            path.unlink(missing_ok=True)
        sync_folder(self._folder)
        session = os.urandom(DIGEST_BYTES)
        with atomic_write(self._name) as file:
            file.write(session)
        self._session, self._is_cleared = session, True

    def _on_disk(self) -> bytes:
        """Return the name of the session that the folder is of; b"" is the first one."""
        return self._read(self._name, DIGEST_BYTES) or b""

    def _read(self, path: Path, most: int) -> bytes | None:
        """Return a file's first `most` bytes and one, None where there is none."""
        with self._log_failures("read"):
            if not path.exists():
                return None
            if not path.is_file():
                raise CDCError(f"{path} is no file")
            with path.open("rb") as file:
                return file.read(most + 1)
        return None

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file of this session, unless the folder is another's by now."""
        with self._log_failures("written: nothing is kept over a restart"), self._hold_lock():
            if not self._is_cleared:
                self._clear()
            if self._on_disk() != self._session:
                raise CDCError("another process has begun a new session there")
            with atomic_write(path) as file:
                file.write(content)

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Hold the lock of the folder, which is made where it is not there.

        Raises:
            OSError: it cannot be made, or another process does not let go of it.
        """
        if sys.platform == "win32":
            raise OSError("this system locks no folders")
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder, os.O_RDONLY)
            try:
                end = time.monotonic() + LOCK_SECONDS
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > end:
                            raise
                        time.sleep(0.005)
                yield
            finally:
                os.close(descriptor)

    @contextmanager
    def _log_failures(self, what: str) -> Iterator[None]:
        """Log what is wrong with the folder, each thing once; the device goes on without."""
        try:
            yield
        except (OSError, ValueError) as error:
            if what not in self._complaints:
                self._complaints.add(what)
                logger.warning("%s", make_printable(f"the state in {self._folder} cannot be {what} ({error})"))
