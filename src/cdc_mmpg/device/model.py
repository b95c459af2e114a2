"""Inference with a device bundle on onnxruntime: clips and questions -> features -> answers; the layer is an input."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.files import hash_file, hash_json
from cdc_mmpg.media.frames import Frames, choose_candidates, choose_middle_candidates, crop
from cdc_mmpg.media.text import TextEncoder
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.processors import count_processors
from cdc_mmpg.wire.messages import LAYER_KINDS, Layout, Versions, WeightsRejected
from cdc_mmpg.wire.payloads import Matrix

BUNDLE_FILE = "bundle.json"
ENCODER_FILE, HEAD_FILE, SHARED_FILE, BASIS_FILE, TOKENIZER_FILE, ANSWERS_FILE = (
    "encoder.onnx", "head.onnx", "shared.bin", "basis.bin", "tokenizer.json", "answers.json"
)  # fmt: skip
BUNDLE_FORMAT = 3
# Type of the numbers in SHARED_FILE and BASIS_FILE, by the precision of the bundle.
LAYER_DTYPES = {"float32": "<f4", "int8": "<f2"}
MAX_DIMENSION = 4096  # largest pixels per side, frames per clip and WordPieces per text in a bundle

Features = NDArray[np.float32]  # (T, 192) for a clip with one text; (K, T, 192) with K texts


class DeviceModel:
    """A device bundle of `make export`, with every file checked against its digest.

    The digests detect damage, not forgery: the author of a bundle is trusted with the answers and with the key of the
    cloud whose layers are installed.

    Attributes:
        task: "open_ended" or "multiple_choice".
        unit: scope of a layer: a "session" of a device's clips, or one "sample".
        layout: layout of the layers that the device requests.
        versions: versions of the encoder, and of the generator whose layers fit it.
        cloud: public key that verifies the signatures of layers.
        shared: (L, D + 1) layer shared by all devices, used when there is no other.

    Args:
        bundle: folder of the bundle.
        threads: threads per inference; 0 means one per processor.

    Raises:
        CheckpointError: the folder is not a bundle, its format is not supported, or a file is missing or changed.
    """

    def __init__(self, bundle: Path, threads: int = 0) -> None:
        settings = read_bundle(bundle)
        try:
            self._load(bundle, settings, threads)
        except CheckpointError:
            raise
        except Exception as error:  # onnxruntime, numpy, tokenizers and cryptography raise many types
            raise _damaged_error(bundle, error) from error

    def _load(self, bundle: Path, settings: dict[str, Any], threads: int) -> None:
        self.task, self.unit = settings["task"], settings["unit"]
        self.layout = Layout(*settings["layout"])
        self.versions = Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"]))
        self.cloud = Ed25519PublicKey.from_public_bytes(bytes.fromhex(settings["public_key"]))
        self._frames = settings["frames"]
        tokenizer = Tokenizer.from_file(str(bundle / TOKENIZER_FILE))
        self._text = TextEncoder(tokenizer, settings["text"]["length"], settings["text"]["known"])
        self.answers: list[str] = json.loads((bundle / ANSWERS_FILE).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or count_processors()
        options.log_severity_level = 3
        self._encoder, self._head = (
            onnxruntime.InferenceSession(str(bundle / name), options, providers=["CPUExecutionProvider"])
            for name in (ENCODER_FILE, HEAD_FILE)
        )
        dtype, shape = LAYER_DTYPES[settings["precision"]], self.layout[1:3]
        self.shared: Matrix = read_numbers(bundle / SHARED_FILE, dtype, shape)
        self._basis: Matrix | None = None
        if self.layout.kind == "basis":
            self._basis = read_numbers(bundle / BASIS_FILE, dtype, (self.layout.number, *shape))
        expected = self.layout.outputs if self.task == "open_ended" else 0
        if len(self.answers) != expected:
            raise CheckpointError(
                f"{bundle / ANSWERS_FILE}: {len(self.answers)} answers, but this bundle needs {expected}: export again"
            )

    def decode_frames(self, video: Path) -> Frames:
        """Decode the frames of a clip for the encoder: (T, S, S, 3) uint8 RGB.

        Raises:
            DataError: the clip is missing or cannot be decoded.
        """
        kept, size = (self._frames["number"], self._frames["candidates"]), self._frames["size"]
        frames = read_frames(video, lambda count: choose_candidates(count, *kept), size, "pyav", self._frames["side"])
        return np.ascontiguousarray(crop(frames[choose_middle_candidates(*kept)], size))

    def tokenize(self, question: str, choices: Sequence[str] = ()) -> list[list[int]]:
        """Tokenize the question, or for multiple choice the question with each choice.

        Raises:
            ConfigError: the question is empty, or the choices do not match the bundle's task.
            DataError: choices are not distinguishable after tokenization.
        """
        if not all(isinstance(text, str) and _is_text(text) for text in (question, *choices)):
            raise ConfigError("a question or a choice is not text, or cannot be encoded as UTF-8")
        if self.task == "open_ended":
            if choices or not question.strip():
                raise ConfigError("this bundle answers open-ended questions: ask one, and give no choices")
            return self._text([question])
        if len(choices) < 2:
            raise ConfigError("this bundle answers multiple-choice questions: give at least two choices")
        return self._text.encode_choices([(question, choices)])[0]

    def find_unknown_words(self, question: str, choices: Sequence[str] = ()) -> list[str]:
        """Return the words that are not in this bundle's vocabulary and are encoded as [UNK]."""
        return self._text.unknown_words([question, *choices])

    def encode_anchor(self, frames: Frames) -> NDArray[np.float32]:
        """Return a clip's anchor feature (192,): its middle frame encoded with the neutral prompt."""
        middle = len(frames) // 2
        return self.compute_upload(self.encode(frames[middle : middle + 1], [self._text.neutral()]))

    def encode(self, frames: Frames, texts: Sequence[Sequence[int]]) -> Features:
        """Encode a clip (T, S, S, 3) with each of K texts: (K, T, 192)."""
        batch = [{"frames": frames, "ids": np.array([text], dtype=np.int64)} for text in texts]
        return np.stack([self._encoder.run(None, inputs)[0] for inputs in batch])

    def compute_upload(self, features: Features) -> NDArray[np.float32]:
        """Compute the upload (192,) from features (K, T, 192)."""
        return self._run("upload", features, self.shared)

    def compute_scores(self, features: Features, layer: Matrix) -> NDArray[np.float32]:
        """Compute the scores of all answers or choices with a last layer (L, D + 1)."""
        return self._run("scores", features, layer)

    def _run(self, output: str, features: Features, layer: Matrix) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._head.run([output], {"features": features, "layer": layer})[0]
        return values

    def install(self, matrices: Sequence[Matrix], layout: Layout) -> Matrix:
        """Return the last layer (L, D + 1) built from received matrices and the layers in this bundle.

        Raises:
            WeightsRejected: the bundle has no basis for the matrices, or the layer has wrong shape or is not finite.
        """
        if layout.kind == "low_rank":
            layer = self.shared + matrices[0].T @ matrices[1]
        elif layout.kind == "basis":
            if self._basis is None:
                raise WeightsRejected("kind", "coefficients of a basis, but this bundle contains no basis")
            layer = self.shared + np.einsum("k,kld->ld", matrices[0][0], self._basis)
        else:
            layer = matrices[0]
        if layer.shape != self.shared.shape or not np.isfinite(layer).all():
            raise WeightsRejected("finite", "a weight of the layer is not finite")
        return np.ascontiguousarray(layer, dtype=np.float32)


def read_bundle(bundle: Path) -> dict[str, Any]:
    """Read the settings of a device bundle and verify the digests of all its files.

    Raises:
        CheckpointError: the folder is not a bundle, its format is unsupported, or a file is missing or changed.
    """
    path = bundle / BUNDLE_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["format"] != BUNDLE_FORMAT:
            raise CheckpointError(
                f"{path}: format {settings['format']!r}, this version reads format {BUNDLE_FORMAT}: export again"
            )
        if not isinstance(settings, dict) or settings.pop("digest", None) != hash_json(settings):
            raise CheckpointError(f"{path}: changed since the export: copy the bundle again")
        _check_settings(settings)
        for name, expected in settings["files"].items():
            path = bundle / name
            if hash_file(path) != expected:
                raise CheckpointError(f"{path}: changed since the export: copy the bundle again")
    except CheckpointError:
        raise
    except Exception as error:  # the file may contain anything
        raise _damaged_error(path, error) from error
    return dict(settings)


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that `make export` would not write.

    Raises:
        ValueError, KeyError, TypeError: a setting is missing, has the wrong type or an invalid value.
    """
    layout, frames, text = Layout(*settings["layout"]), settings["frames"], settings["text"]
    files = {ENCODER_FILE, HEAD_FILE, SHARED_FILE, TOKENIZER_FILE, ANSWERS_FILE} | (
        {BASIS_FILE} if layout.kind == "basis" else set()
    )
    sizes = [*layout[1:3], *(frames[name] for name in ("number", "candidates", "size", "side")), text["length"],
             text["known"]]  # fmt: skip
    for name, is_valid in (
        ("task", settings["task"] in ("open_ended", "multiple_choice")),
        ("unit", settings["unit"] in ("session", "sample")),
        ("layout", layout.kind in LAYER_KINDS and type(layout.number) is int and layout.number >= 0),
        ("size", all(type(size) is int and size > 0 for size in sizes) and max(sizes[2:-1]) <= MAX_DIMENSION),
        ("precision", settings["precision"] in LAYER_DTYPES),
        ("files", settings["files"].keys() == files),
    ):
        if not is_valid:
            raise ValueError(f"invalid {name}: not written by make export")


def _damaged_error(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a bundle that cannot be read."""
    return CheckpointError(
        f"{path}: not a complete device bundle ({type(error).__name__}: {error}): write one with make export, or copy "
        "it again"
    )


def read_numbers(path: Path, dtype: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Read an array from a file of raw numbers.

    Raises:
        CheckpointError: the file has another length.
    """
    values = np.fromfile(path, dtype)
    if values.nbytes != path.stat().st_size or values.size != math.prod(shape):
        raise CheckpointError(f"{path}: not {' x '.join(map(str, shape))} numbers of type {dtype}: export again")
    return values.reshape(shape).astype(np.float32)


def _is_text(text: str) -> bool:
    """Return whether UTF-8 can encode a text: command line arguments may contain undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
