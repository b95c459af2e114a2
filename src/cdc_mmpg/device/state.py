"""State that a device keeps across restarts: the session's anchor features and the last valid layer, still signed."""

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
    compute_digest,
    decode_layer,
    encode_upload,
)
from cdc_mmpg.wire.payloads import Matrix

if sys.platform != "win32":  # on Windows a device works without stored state
    import fcntl

logger = logging.getLogger(__name__)

MAX_SESSION_CLIPS = 64  # number of most recent clips in the mean; also the most new clips before a layer is due
CLIP_COUNT = struct.Struct("<I")  # stored with a layer: number of clips it was generated from
FEATURE_BYTES = 4 * FEATURE_DIM  # size of an anchor feature
LOCK_SECONDS = 0.5  # maximum wait for the folder's lock


LayerOrigin = Literal["adapted", "kept", "shared"]


class Layer(NamedTuple):
    """A last layer ready for use."""

    matrix: Matrix  # (L, D + 1)
    anchors: int  # number of clips it was generated from, at most `MAX_SESSION_CLIPS`
    origin: LayerOrigin  # generated for this session or sample, loaded from disk, or shared by all devices


class Receipt(NamedTuple):
    """A layer message as received, and the upload it answers."""

    message: bytes
    upload: bytes
    salt: bytes
    anchors: int


def encode_counted_upload(feature: NDArray[np.float32], anchors: int, model: DeviceModel) -> tuple[bytes, bytes]:
    """Return an upload whose nonce commits to its number of clips, and the salt that hides this number from the cloud.

    The layer's signature covers the whole upload, so the number stored with a layer cannot be changed.
    """
    salt = os.urandom(DIGEST_BYTES)
    return encode_upload(feature, model.layout, model.versions, compute_digest(salt + CLIP_COUNT.pack(anchors))), salt


class State:
    """Folder in which a device stores its state; files are written atomically.

    Files belong to one encoder and one generator; files of other versions are ignored. Failures to read or write the
    folder are logged, once per operation, and never raised. A lock on the folder makes each check and the write after
    it atomic among processes; the file `session` identifies the session of the other files, and changes when a new
    session begins.

    Args:
        folder: folder of the state, created if missing.
        model: model of the device.
    """

    def __init__(self, folder: Path, model: DeviceModel) -> None:
        self._model, self._folder = model, folder
        name = f"{model.versions.encoder.hex()[:8]}.{model.versions.generator.hex()[:8]}"
        self._layer, self._anchors = folder / f"layer.{name}.bin", folder / f"anchors.{name}.f32"
        self._name, self._lock = folder / f"session.{name}", threading.Lock()
        self._logged_operations: set[str] = set()
        self._session, self._is_cleared = b"", True
        with self._log_failures("read"):
            if folder.exists():
                remove_leftovers(folder)
                self._session = self._read_session()

    def load_layer(self) -> Layer | None:
        """Load and verify the stored layer; return None if there is no valid one."""
        model = self._model
        if model.unit != "session":  # a stored layer would belong to another sample
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
            if HEADER.unpack_from(upload)[7] != compute_digest(salt + count) or not 0 < anchors <= MAX_SESSION_CLIPS:
                raise WeightsRejected("nonce", "the number of clips stored with the layer does not match its signature")
            return Layer(model.install(matrices, model.layout), anchors, "kept")
        except WeightsRejected as error:
            logger.warning("%s is ignored: %s", self._layer, error)
            return None

    def save_layer(self, receipt: Receipt) -> None:
        """Store a layer in place of the previous one."""
        self._write(self._layer, receipt.message + receipt.upload + receipt.salt + CLIP_COUNT.pack(receipt.anchors))

    def load_anchors(self) -> list[NDArray[np.float32]]:
        """Load the anchor features of the session, (192,) each, at most `MAX_SESSION_CLIPS`."""
        content = self._read(self._anchors, MAX_SESSION_CLIPS * FEATURE_BYTES)
        if content is None:
            return []
        if len(content) % FEATURE_BYTES or len(content) > MAX_SESSION_CLIPS * FEATURE_BYTES:
            logger.warning(
                "%s is ignored: its length is not that of 1 to %d anchor features of %d bytes",
                self._anchors,
                MAX_SESSION_CLIPS,
                FEATURE_BYTES,
            )
            return []
        values = np.frombuffer(content, "<f4")
        if not (np.abs(values) <= 1).all():  # False for NaN
            logger.warning("%s is ignored: features must be between -1 and 1", self._anchors)
            return []
        return list(values.reshape(-1, FEATURE_DIM))

    def save_anchors(self, anchors: Sequence[NDArray[np.float32]]) -> None:
        """Store the anchor features of the session in place of the previous ones."""
        self._write(self._anchors, np.stack(anchors).astype("<f4").tobytes())

    def clear(self) -> None:
        """Delete the stored state and begin a new session; if this fails now, do it before the next write."""
        self._is_cleared = False
        with (
            self._log_failures("cleared: delete it, or the next start resumes the old session"),
            self._hold_lock(),
        ):
            self._begin_session()

    def _begin_session(self) -> None:
        for path in (self._layer, self._anchors):
            path.unlink(missing_ok=True)
        sync_folder(self._folder)
        session = os.urandom(DIGEST_BYTES)
        with atomic_write(self._name) as file:
            file.write(session)
        self._session, self._is_cleared = session, True

    def _read_session(self) -> bytes:
        """Return the identifier of the session on disk; b"" for the first session."""
        return self._read(self._name, DIGEST_BYTES) or b""

    def _read(self, path: Path, limit_bytes: int) -> bytes | None:
        """Return at most `limit_bytes` + 1 bytes of a file; None if it is missing or unreadable."""
        with self._log_failures("read"):
            if not path.exists():
                return None
            if not path.is_file():
                raise CDCError(f"{path} is not a file")
            with path.open("rb") as file:
                return file.read(limit_bytes + 1)
        return None

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file of this session, unless another process has begun a new session."""
        with self._log_failures("written: a restart will lose the session"), self._hold_lock():
            if not self._is_cleared:
                self._begin_session()
            if self._read_session() != self._session:
                raise CDCError("another process has begun a new session in this folder")
            with atomic_write(path) as file:
                file.write(content)

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Create the folder if missing, and hold its lock.

        Raises:
            OSError: the folder cannot be created, or another process holds the lock for longer than `LOCK_SECONDS`.
        """
        if sys.platform == "win32":
            raise OSError("folders cannot be locked on Windows")
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder, os.O_RDONLY)
            try:
                end = time.monotonic() + LOCK_SECONDS
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError as error:
                        if time.monotonic() > end:
                            raise OSError(f"another process has held its lock for {LOCK_SECONDS} s") from error
                        time.sleep(0.005)
                yield
            finally:
                os.close(descriptor)

    @contextmanager
    def _log_failures(self, operation: str) -> Iterator[None]:
        """Log a failure of an operation on the folder, once per operation, and suppress it."""
        try:
            yield
        except (OSError, ValueError) as error:
            if operation not in self._logged_operations:
                self._logged_operations.add(operation)
                logger.warning("%s", make_printable(f"the state in {self._folder} cannot be {operation} ({error})"))
