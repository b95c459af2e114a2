"""Checks of exported bundles: scores against torch's, and accuracy on the run's test questions."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cdc_mmpg.data.batch import VideoTextBatch
from cdc_mmpg.data.interface import VideoTextData
from cdc_mmpg.deployment.bundle_files import GENERATOR
from cdc_mmpg.deployment.source import Source
from cdc_mmpg.device.model import DeviceModel, Features
from cdc_mmpg.device.page import DEVICE_FOLDERS, PAGE, are_installed
from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.evaluation.answers import read_answers
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.progress import track
from cdc_mmpg.results import PREDICTIONS
from cdc_mmpg.wire.payloads import decode_matrices, encode_matrices

MAX_TEST_QUESTIONS = 1_000  # number of test questions on which bundles are evaluated
MAX_WASM_QUESTIONS = 100  # of them, number that are also asked as a browser asks them
MAX_WASM_DIFFERENCE = 1e-4  # largest absolute difference of a float32 bundle's features in wasm
SESSION_ANCHORS = 16  # number of clips per session


def compare_with_torch(source: Source, bundle: Path) -> float:
    """Return the largest absolute difference of a float32 bundle's scores and uploads from torch's.

    The inputs are noise, with every number of frames that the bundle supports.
    """
    method, model = source.method, DeviceModel(bundle, threads=1)
    generator, largest = np.random.default_rng(0), 0.0
    layer = torch.from_numpy(model.shared)
    max_frames = source.frames["number"]
    for number in range(1, max_frames + 1) if model.unit == "session" else [max_frames]:
        for length in (2, source.text_length):
            text_count = 3 if source.task == "multiple_choice" else 1
            frames = generator.integers(256, size=(number, *[source.frames["size"]] * 2, 3), dtype=np.uint8)
            texts = generator.integers(len(source.kept), size=(text_count, length))
            ids = torch.tensor(source.kept)[torch.from_numpy(texts)]
            batch = VideoTextBatch(
                torch.from_numpy(frames)[None],
                ids[None] if source.task == "multiple_choice" else ids,
                torch.ones_like(ids)[None] if source.task == "multiple_choice" else torch.ones_like(ids),
                torch.zeros(1, dtype=torch.long),
                torch.zeros(1, dtype=torch.long),
            )
            with torch.no_grad():
                encoded = method.head.encode(method.encoder, batch).frame_features
                scores = method.head(
                    method.fuse(encoded), lambda hidden: hidden @ layer[:, :-1].T + layer[:, -1]
                ).flatten()
                upload = method.upload(method.head.condition(encoded)).flatten()
            features = model.encode(frames, texts.tolist())
            pairs = ((model.compute_scores(features, model.shared), scores), (model.compute_upload(features), upload))
            for ours, theirs in pairs:
                largest = max(largest, float(np.abs(ours - theirs.numpy()).max()))
    return largest


def evaluate_bundles(source: Source, data: "VideoTextData", run: Path, out: Path) -> dict[str, Any]:
    """Return the accuracies of both bundles and of the run on the same test questions.

    The differences are the cost of quantization and of the reduced vocabulary. Layers are generated as in deployment:
    each bundle computes its uploads, and the cloud's generator answers with the bundle's kind of payload. A session has
    the anchors of the same 16 other clips that the run was tested with.

    Raises:
        CheckpointError: the run's table of answers is missing, or belongs to other questions.
    """
    labels = data.labels("test").tolist()
    drawn = sorted(np.random.default_rng(data.seed).permutation(len(labels))[:MAX_TEST_QUESTIONS].tolist())
    predictions = run / PREDICTIONS
    try:
        table = read_answers(predictions)
        (given, *_), (right, *_) = table.given.values(), (table.right or table.compare_words()).values()
        if len(given) != len(labels):
            raise ValueError(f"{len(given)} questions, but the dataset has {len(labels)}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{predictions}: not a valid table of test answers ({error}): train again") from error

    generator = Generator.load(out / "cloud" / GENERATOR)
    report: dict[str, Any] = {"questions": len(drawn),
                              "run": {"accuracy": float(np.mean([right[i] for i in drawn]))}}  # fmt: skip
    for name in DEVICE_FOLDERS.values():
        model = DeviceModel(out / name)
        cases = make_cases(model, source, data, drawn, generator)
        predicted: dict[int, int] = {}
        tried: list[Case] = []  # some: the frames and layers of all cases would fill the memory
        for i, case in zip(drawn, track(cases, f"answering with {model.layout.kind} layers", len(drawn)), strict=True):
            predicted[i] = case.answer
            if len(tried) < MAX_WASM_QUESTIONS:
                tried.append(case)
        words = {i: data.word("test", i, predicted[i]) for i in drawn}
        report[name] = {
            "accuracy": float(np.mean([predicted[i] == labels[i] for i in drawn])),
            "agreement": float(np.mean([words[i] == given[i] for i in drawn])),
            "wasm": run_in_wasm(out / name, tried),
        }
    counts = data.word_counts("test")
    kept = set(source.kept)
    report["unknown_words"] = sum(n for word, n in counts.items() if word not in kept) / max(1, sum(counts.values()))
    return report


class Case(NamedTuple):
    """A test question as a device asks it, and what the native runtime computes for it."""

    frames: NDArray[np.uint8]  # (T, S, S, 3)
    texts: list[list[int]]  # ids of the question, or of the question with each choice
    layer: NDArray[np.float32]  # (L, D + 1), generated for the question's session or for the question
    features: Features  # (K, T, 192)
    answer: int


def make_cases(
    model: DeviceModel, source: Source, data: "VideoTextData", drawn: Sequence[int], generator: "Generator"
) -> Iterator[Case]:
    """Yield the drawn test questions, with layers from the cloud's generator."""
    test: Any = data.dataset("test", augment=False)
    new_ids = {old: new for new, old in enumerate(source.kept)}
    unknown = new_ids[source.words.index("[UNK]")]
    sessions = data.sessions() if model.unit == "session" else None
    layers: dict[int, NDArray[np.float32]] = {}  # by device

    def generate_layer(upload: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = generator.matrices(generator(torch.from_numpy(upload)[None]), model.layout.kind)
        content = encode_matrices([part[0].numpy() for part in parts], model.layout.precision)
        return model.install(decode_matrices(content, model.layout.shapes, model.layout.precision), model.layout)

    def generate_session_layer(device: int) -> NDArray[np.float32]:
        assert sessions is not None
        anchors: Any = sessions.anchors
        chosen = np.random.default_rng((data.seed, device)).permutation(sessions.pools[device])[:SESSION_ANCHORS]
        if not len(chosen):
            return model.shared
        return generate_layer(
            np.mean([model.encode_anchor(anchors.frames(0, i).numpy()) for i in chosen.tolist()], axis=0)
        )

    for i in drawn:
        texts = [[new_ids.get(word, unknown) for word in text] for text in test.texts[i]]
        frames = np.ascontiguousarray(test.frames(0, i).numpy())
        features = model.encode(frames, texts)
        if sessions is None:
            layer = generate_layer(model.compute_upload(features))
        else:
            device = sessions.devices["test"][i]
            if device not in layers:
                layers[device] = generate_session_layer(device)
            layer = layers[device]
        yield Case(frames, texts, layer, features, int(model.compute_scores(features, layer).argmax()))


def run_in_wasm(bundle: Path, cases: Sequence[Case]) -> dict[str, Any] | None:
    """Run a bundle as browsers do, in wasm under Node.js, and compare it with the native runtime.

    Returns:
        The largest difference of the features and the number of equal answers; None without Node.js or the libraries
        of the page (`make web`).

    Raises:
        CheckpointError: wasm refuses the graphs; or in float32 the features or an answer differ.
    """
    node = shutil.which("node")
    if node is None or not are_installed():
        return None
    layers = list({id(case.layer): case.layer for case in cases}.values())
    places = {id(layer): i for i, layer in enumerate(layers)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "frames.bin").write_bytes(b"".join(case.frames.tobytes() for case in cases))
        (folder / "layers.bin").write_bytes(b"".join(layer.astype("<f4").tobytes() for layer in layers))
        content = {"texts": [case.texts for case in cases], "layers": [places[id(case.layer)] for case in cases]}
        (folder / "cases.json").write_text(json.dumps(content), encoding="utf-8")
        command = [node, str(PAGE / "check.mjs"), str(bundle.absolute()), scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"{bundle}: browsers cannot run its graphs:\n{done.stderr.strip()[-2000:]}")
        answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        features = np.fromfile(folder / "features.bin", "<f4")
    difference = float(np.abs(features - np.concatenate([case.features.ravel() for case in cases])).max())
    equal = sum(case.answer == answer for case, answer in zip(cases, answers, strict=True))
    if bundle.name == DEVICE_FOLDERS["float32"] and not (difference <= MAX_WASM_DIFFERENCE and equal == len(cases)):
        raise CheckpointError(
            f"{bundle}: in wasm the features differ by {difference:.1e}, and {len(cases) - equal} of {len(cases)} "
            "answers"
        )
    return {"questions": len(cases), "equal_answers": equal, "largest_difference": difference}
