"""A device bundle at work: clips and questions -> features -> answers, on onnxruntime; the last layer is an input."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.files import file_digest, json_digest
from cdc_mmpg.media.frames import Frames, candidate_indices, crop, middle_candidates
from cdc_mmpg.media.text import TextEncoder
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.processors import count_processors
from cdc_mmpg.wire.messages import LAYER_KINDS, Layout, Versions, WeightsRejected
from cdc_mmpg.wire.payloads import Matrix

BUNDLE_FILE = "bundle.json"
ENCODER_FILE, HEAD_FILE, SHARED_FILE, BASIS_FILE, VOCABULARY_FILE, ANSWERS_FILE = (
    "encoder.onnx", "head.onnx", "shared.npy", "basis.npy", "vocab.txt", "answers.json"
)  # fmt: skip
BUNDLE_FORMAT = 2
MAX_SIZE = 4096  # of a bundle: pixels of a frame's side, frames of a clip, WordPieces of a text

Features = NDArray[np.float32]  # (T, 192) of a clip with a text; (K, T, 192) with each of K


class DeviceModel:
    """What `make export` wrote for a device, every file of it checked against its digest.

    The digests tell what was damaged. They do not tell who wrote a bundle: whoever writes it is trusted, with the
    answers and with the key of the cloud whose layers are installed.

    Attributes:
        task: "open_ended" or "multiple_choice".
        unit: what a layer is for: a "session" of a device's clips, or one "sample".
        layout: of the layers that it asks for.
        versions: of its encoder, and of the generator whose layers it takes.
        cloud: the key that they are signed with.
        shared: (L, D + 1) the layer that answers when there is no other.

    Args:
        bundle: the folder.
        threads: of one inference; 0 is as many as there are processors.

    Raises:
        CheckpointError: it is none, of another format, or a file is absent or changed.
    """

    def __init__(self, bundle: Path, threads: int = 0) -> None:
        settings = read_bundle(bundle)
        try:
            self._load(bundle, settings, threads)
        except CheckpointError:
            raise
        except Exception as error:  # of onnxruntime, numpy, tokenizers and cryptography
            raise _damaged_error(bundle, error) from error

    def _load(self, bundle: Path, settings: dict[str, Any], threads: int) -> None:
        self.task, self.unit = settings["task"], settings["unit"]
        self.layout = Layout(*settings["layout"])
        self.versions = Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"]))
        self.cloud = Ed25519PublicKey.from_public_bytes(bytes.fromhex(settings["public_key"]))
        self._frames = settings["frames"]
        self._text = TextEncoder(bundle / VOCABULARY_FILE, settings["text"]["length"], settings["text"]["known"])
        self.answers: list[str] = json.loads((bundle / ANSWERS_FILE).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or count_processors()
        options.log_severity_level = 3
        self._encoder, self._head = (
            onnxruntime.InferenceSession(str(bundle / name), options, providers=["CPUExecutionProvider"])
            for name in (ENCODER_FILE, HEAD_FILE)
        )
        self.shared: Matrix = np.load(bundle / SHARED_FILE, allow_pickle=False).astype(np.float32)
        self._basis: Matrix | None = None
        shape = self.layout[1:3]
        if self.layout.kind == "basis":
            self._basis = np.load(bundle / BASIS_FILE, allow_pickle=False).astype(np.float32)
            if self._basis.shape != (self.layout.number, *shape):
                raise CheckpointError(f"{bundle / BASIS_FILE}: {self._basis.shape}, not {(self.layout.number, *shape)}")
        if self.shared.shape != shape:
            raise CheckpointError(f"{bundle / SHARED_FILE}: {self.shared.shape}, but layers are {shape}")
        if len(self.answers) != (self.layout.outputs if self.task == "open_ended" else 0):
            raise CheckpointError(f"{bundle / ANSWERS_FILE}: {len(self.answers)} answers of {self.layout.outputs}")

    def frames(self, video: Path) -> Frames:
        """Decode the frames of a clip that the encoder sees: (T, S, S, 3) uint8 RGB.

        Raises:
            DataError: absent, or not decodable.
        """
        kept, size = (self._frames["number"], self._frames["candidates"]), self._frames["size"]
        found = read_frames(video, lambda count: candidate_indices(count, *kept), size, "pyav", self._frames["side"])
        return np.ascontiguousarray(crop(found[middle_candidates(*kept)], size))

    def texts(self, question: str, choices: Sequence[str] = ()) -> list[list[int]]:
        """Return the question's WordPieces, or those of the question with each of its choices.

        Raises:
            ConfigError: no question, or choices where there are none, or none where there are.
            DataError: choices that cannot be told apart.
        """
        if not all(isinstance(text, str) and _is_text(text) for text in (question, *choices)):
            raise ConfigError("a question or a choice is not text, or holds what UTF-8 cannot")
        if self.task == "open_ended":
            if choices or not question.strip():
                raise ConfigError("this bundle answers open-ended questions: ask one, and give no choices")
            return self._text([question])
        if len(choices) < 2:
            raise ConfigError("this bundle answers multiple-choice questions: give two choices or more")
        return self._text.choices([(question, choices)])[0]

    def unknown_words(self, question: str, choices: Sequence[str] = ()) -> list[str]:
        """Return the words that the vocabulary of this bundle does not hold: the encoder reads [UNK] in their place."""
        return self._text.unknown_words([question, *choices])

    def anchor(self, frames: Frames) -> NDArray[np.float32]:
        """Return what a clip adds to a session (192,): the feature of its middle frame with the neutral prompt."""
        middle = len(frames) // 2
        return self.upload(self.features(frames[middle : middle + 1], [self._text.neutral()]))

    def features(self, frames: Frames, texts: Sequence[Sequence[int]]) -> Features:
        """Encode a clip (T, S, S, 3) with each of K texts: (K, T, 192)."""
        each = [{"frames": frames, "ids": np.array([text], dtype=np.int64)} for text in texts]
        return np.stack([self._encoder.run(None, inputs)[0] for inputs in each])

    def upload(self, features: Features) -> NDArray[np.float32]:
        """Return what is uploaded of features (K, T, 192): (192,)."""
        return self._run("upload", features, self.shared)

    def scores(self, features: Features, layer: Matrix) -> NDArray[np.float32]:
        """Return the scores of all answers or choices with a last layer (L, D + 1)."""
        return self._run("scores", features, layer)

    def _run(self, output: str, features: Features, layer: Matrix) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._head.run([output], {"features": features, "layer": layer})[0]
        return found

    def install(self, matrices: Sequence[Matrix], layout: Layout) -> Matrix:
        """Return the last layer (L, D + 1) that received matrices make with what this device keeps.

        Raises:
            WeightsRejected: this device has not what they build on, or the layer is not finite.
        """
        if layout.kind == "low_rank":
            layer = self.shared + matrices[0].T @ matrices[1]
        elif layout.kind == "basis":
            if self._basis is None:
                raise WeightsRejected("kind", "coefficients of a basis that this bundle does not hold")
            layer = self.shared + np.einsum("k,kld->ld", matrices[0][0], self._basis)
        else:
            layer = matrices[0]
        if layer.shape != self.shared.shape or not np.isfinite(layer).all():
            raise WeightsRejected("finite", "a weight of the layer is not finite")
        return np.ascontiguousarray(layer, dtype=np.float32)


def read_bundle(bundle: Path) -> dict[str, Any]:
    """Return the settings of a device bundle whose files are all there and as they were written.

    Raises:
        CheckpointError: it is none, of another format, or a file is absent or changed; names it.
    """
    path = bundle / BUNDLE_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["format"] != BUNDLE_FORMAT:
            raise CheckpointError(
                f"{path}: format {settings['format']!r}, this version reads {BUNDLE_FORMAT}: export anew"
            )
        if not isinstance(settings, dict) or settings.pop("digest", None) != json_digest(settings):
            raise CheckpointError(f"{path}: changed since it was exported: copy the bundle anew")
        _check_settings(settings)
        for name, expected in settings["files"].items():
            path = bundle / name
            if file_digest(path) != expected:
                raise CheckpointError(f"{path}: changed since it was exported: copy the bundle anew")
    except CheckpointError:
        raise
    except Exception as error:  # whatever stands there
        raise _damaged_error(path, error) from error
    return dict(settings)


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of another shape than `make export` writes.

    Raises:
        ValueError, KeyError, TypeError: they are others.
    """
    layout, frames, text = Layout(*settings["layout"]), settings["frames"], settings["text"]
    files = {ENCODER_FILE, HEAD_FILE, SHARED_FILE, VOCABULARY_FILE, ANSWERS_FILE} | (
        {BASIS_FILE} if layout.kind == "basis" else set()
    )
    sizes = [*layout[1:3], *(frames[name] for name in ("number", "candidates", "size", "side")), text["length"],
             text["known"]]  # fmt: skip
    for what, is_right in (
        ("task", settings["task"] in ("open_ended", "multiple_choice")),
        ("unit", settings["unit"] in ("session", "sample")),
        ("layout", layout.kind in LAYER_KINDS and type(layout.number) is int and layout.number >= 0),
        ("a size", all(type(size) is int and size > 0 for size in sizes) and max(sizes[2:-1]) <= MAX_SIZE),
        ("files", settings["files"].keys() == files),
    ):
        if not is_right:
            raise ValueError(f"{what} is not what an export writes")


def _damaged_error(path: Path, error: Exception) -> CheckpointError:
    """Return the error of a bundle that cannot be read."""
    return CheckpointError(
        f"{path}: not a whole device bundle ({type(error).__name__}: {error}): make export writes one, copy it anew"
    )


def _is_text(text: str) -> bool:
    """Return whether UTF-8 holds it: arguments of a command line with bytes that are none do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
