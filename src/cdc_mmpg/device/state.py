"""What a device keeps over a restart: the anchor features of its session, and the last good layer as it was signed."""

import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.errors import CDCError
from cdc_mmpg.files import atomic_write, remove_leftovers
from cdc_mmpg.payloads import WIDTH, Matrix
from cdc_mmpg.wire import WeightsRejected, decode_layer

logger = logging.getLogger(__name__)

COUNT = struct.Struct("<I")  # behind the layer's message: of how many anchors it is


Origin = Literal["adapted", "kept", "shared"]


class Layer(NamedTuple):
    """A last layer that is ready for use."""

    matrix: Matrix  # (L, D + 1)
    anchors: int  # of how many clips it was made
    origin: Origin  # made for this session or sample, kept from before a restart, shared by all devices


class State:
    """A folder that a device writes to; every file is whole, or the one before.

    Its files are for one encoder and one generator: what others left is not read. A folder that cannot be written is
    no reason not to answer: it is logged.

    Args:
        folder: made where it is not there.
        model: the device's.
    """

    def __init__(self, folder: Path, model: DeviceModel) -> None:
        self._model = model
        name = f"{model.versions.encoder.hex()[:8]}.{model.versions.generator.hex()[:8]}"
        self._layer, self._anchors = folder / f"layer.{name}.bin", folder / f"anchors.{name}.f32"
        remove_leftovers(folder)

    def layer(self) -> Layer | None:
        """The last good layer, verified anew; None where there is none, or it cannot be trusted."""
        if self._model.unit != "session":  # it would be another sample's
            return None
        try:
            content = self._layer.read_bytes()
        except OSError:
            return None
        message, count = content[: -COUNT.size], content[-COUNT.size :]
        model = self._model
        try:
            matrices = decode_layer(message, None, model.layout, model.versions, model.cloud)
            return Layer(model.install(matrices, model.layout), COUNT.unpack(count)[0], "kept")
        except (WeightsRejected, struct.error) as error:
            logger.warning("%s is not used: %s", self._layer, error)
            return None

    def keep_layer(self, message: bytes, anchors: int) -> None:
        """In place of the one before."""
        self._write(self._layer, message + COUNT.pack(anchors))

    def anchors(self) -> list[NDArray[np.float32]]:
        """Of the session so far, (192,) each."""
        try:
            values = np.frombuffer(self._anchors.read_bytes(), "<f4")
        except (OSError, ValueError):
            return []
        if values.size % WIDTH or not (np.abs(values) <= 1).all():
            logger.warning("%s is not used: no anchor features", self._anchors)
            return []
        return list(values.reshape(-1, WIDTH))

    def keep_anchors(self, anchors: Sequence[NDArray[np.float32]]) -> None:
        """In place of those before."""
        self._write(self._anchors, np.concatenate(anchors).astype("<f4").tobytes())

    def clear(self) -> None:
        """Nothing is kept any more."""
        for path in (self._layer, self._anchors):
            path.unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        try:
            with atomic_write(path) as file:
                file.write(content)
        except CDCError as error:
            logger.warning("nothing is kept: %s", error)
