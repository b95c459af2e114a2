"""A device bundle at work: clips and questions -> features -> answers, on onnxruntime; the last layer is an input."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.frames import Frames, candidate_indices, crop, middle_candidates
from cdc_mmpg.payloads import Matrix
from cdc_mmpg.processors import count_processors
from cdc_mmpg.text import TextEncoder
from cdc_mmpg.video import read_frames
from cdc_mmpg.wire import Layout, Versions, WeightsRejected

BUNDLE = "bundle.json"
ENCODER, HEAD, SHARED, BASIS, VOCABULARY, ANSWERS = (
    "encoder.onnx", "head.onnx", "shared.npy", "basis.npy", "vocab.txt", "answers.txt"
)  # fmt: skip
FORMAT = 1

Features = NDArray[np.float32]  # (T, 192) of a clip with a text; (K, T, 192) with each of K


class DeviceModel:
    """What `make export` wrote for a device, every file of it checked against its digest.

    Attributes:
        task: "open_ended" or "multiple_choice".
        unit: what a layer is for: a "session" of a device's clips, or one "sample".
        layout: of the layers that it asks for.
        versions: of its encoder, and of the generator whose layers it takes.
        cloud: the key that they are signed with.
        shared: (L, D + 1) the layer that answers when there is no other.

    Args:
        bundle: the folder.
        threads: of one inference; 0 is one for each processor that this process may use.

    Raises:
        CheckpointError: it is none, of another format, or a file is absent or changed.
    """

    def __init__(self, bundle: Path, threads: int = 0) -> None:
        settings = read_bundle(bundle)
        self.task, self.unit = str(settings["task"]), str(settings["unit"])
        self.layout = Layout(*settings["layout"])
        self.versions = Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"]))
        self.cloud = Ed25519PublicKey.from_public_bytes(bytes.fromhex(settings["public_key"]))
        self._frames = settings["frames"]
        self._text = TextEncoder(bundle / VOCABULARY, settings["text"]["length"], settings["text"]["known"])
        self.answers = (bundle / ANSWERS).read_text(encoding="utf-8").split("\n") if self.task == "open_ended" else []
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or count_processors()
        options.log_severity_level = 3
        self._encoder, self._head = (
            onnxruntime.InferenceSession(str(bundle / name), options, providers=["CPUExecutionProvider"])
            for name in (ENCODER, HEAD)
        )
        self.shared: Matrix = np.load(bundle / SHARED, allow_pickle=False).astype(np.float32)
        self._basis: Matrix | None = None
        if (bundle / BASIS).is_file():
            self._basis = np.load(bundle / BASIS, allow_pickle=False).astype(np.float32)

    def frames(self, video: Path) -> Frames:
        """The frames of a clip that the encoder sees: (T, S, S, 3) uint8 RGB.

        Raises:
            DataError: absent, or not decodable.
        """
        kept, size = (self._frames["number"], self._frames["candidates"]), self._frames["size"]
        found = read_frames(video, lambda count: candidate_indices(count, *kept), size, "pyav", self._frames["side"])
        return np.ascontiguousarray(crop(found[middle_candidates(*kept)], size))

    def texts(self, question: str, choices: Sequence[str] = ()) -> list[list[int]]:
        """The question's WordPieces, or those of the question with each of its choices.

        Raises:
            ConfigError: no question, or choices where there are none, or none where there are.
            DataError: choices that cannot be told apart.
        """
        if self.task == "open_ended":
            if choices or not question.strip():
                raise ConfigError("this bundle answers open-ended questions: ask one, and give no choices")
            return self._text([question])
        if len(choices) < 2:
            raise ConfigError("this bundle answers multiple-choice questions: give two choices or more")
        return self._text.choices([(question, choices)])[0]

    def anchor(self, frames: Frames) -> NDArray[np.float32]:
        """What a clip adds to a session (192,): the feature of its middle frame with the neutral prompt."""
        middle = len(frames) // 2
        return self.upload(self.features(frames[middle : middle + 1], [self._text.neutral()]))

    def features(self, frames: Frames, texts: Sequence[Sequence[int]]) -> Features:
        """(K, T, 192) of a clip (T, S, S, 3) with each of K texts."""
        each = [{"frames": frames, "ids": np.array([text], dtype=np.int64)} for text in texts]
        return np.stack([self._encoder.run(None, inputs)[0] for inputs in each])

    def upload(self, features: Features) -> NDArray[np.float32]:
        """What is uploaded of features (K, T, 192): (192,)."""
        return self._run("upload", features, self.shared)

    def scores(self, features: Features, layer: Matrix) -> NDArray[np.float32]:
        """Of every answer or choice, with a last layer (L, D + 1)."""
        return self._run("scores", features, layer)

    def _run(self, output: str, features: Features, layer: Matrix) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._head.run([output], {"features": features, "layer": layer})[0]
        return found

    def install(self, matrices: Sequence[Matrix], layout: Layout) -> Matrix:
        """The last layer (L, D + 1) that arrived matrices make, beside what this device keeps.

        Raises:
            WeightsRejected: this device has not what they build on, or the layer is not finite.
        """
        if layout.kind == "low_rank":
            layer = self.shared + matrices[0].T @ matrices[1]
        elif layout.kind == "basis":
            if self._basis is None or len(self._basis) != layout.number:
                raise WeightsRejected("kind", "coefficients of a basis that this bundle does not hold")
            layer = self.shared + np.einsum("k,kld->ld", matrices[0][0], self._basis)
        else:
            layer = matrices[0]
        if layer.shape != self.shared.shape or not np.isfinite(layer).all():
            raise WeightsRejected("finite", "a weight of the layer is not finite")
        return np.ascontiguousarray(layer, dtype=np.float32)


def read_bundle(bundle: Path) -> dict[str, Any]:
    """The settings of a device bundle whose files are all there and as they were written.

    Raises:
        CheckpointError: it is none, of another format, or a file is absent or changed; names it.
    """
    try:
        settings = json.loads((bundle / BUNDLE).read_text(encoding="utf-8"))
        files = dict(settings["files"])
        if settings["format"] != FORMAT:
            raise CheckpointError(f"{bundle}: format {settings['format']}, this version reads {FORMAT}: export anew")
        for name, expected in files.items():
            with (bundle / os.path.basename(name)).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise CheckpointError(f"{bundle / name}: changed since it was exported: copy the bundle anew")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{bundle}: not a whole device bundle ({type(error).__name__}: {error}): make export writes one"
        ) from error
    return dict(settings)
