"""A trained run as two bundles: what a device needs (twice, whole and with an int8 encoder), and what the cloud needs.

    cloud/         generator.safetensors, cloud.json, signing_key.pem (mode 0600)
    device/        bundle.json, encoder.onnx, head.onnx, shared.npy, basis.npy, vocab.txt, answers.json
    device-int8/   the same
    export.json    what was checked and measured

The encoder is exported for one clip and any number of frames up to T, the head with the last layer as an input, so that
a new layer is another array and no new session. Of the word table, half of the model at the paper's size, only the
words of the training questions stay, the `WORDS` most frequent of them; the others become [UNK], and a device says so
(`--all-words` keeps all). Whoever writes a bundle is trusted by the device that reads it: digests tell damage, no more.
"""

import argparse
import copy
import csv
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from cdc_mmpg.device.model import (
    ANSWERS,
    BASIS,
    BUNDLE,
    ENCODER,
    FORMAT,
    HEAD,
    SHARED,
    VOCABULARY,
    DeviceModel,
)
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.files import atomic_write, file_digest, json_digest
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import provenance, write_json
from cdc_mmpg.training.reopen import reopen, results_of
from cdc_mmpg.wire.messages import Versions, digest
from cdc_mmpg.wire.payloads import WIDTH, decode, encode

if TYPE_CHECKING:
    import onnx
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from torch import Tensor

    from cdc_mmpg.data.batch import VideoTextData
    from cdc_mmpg.methods.base import Answering
    from cdc_mmpg.models.all_in_one import AllInOne
    from cdc_mmpg.models.generator import Generator

logger = logging.getLogger(__name__)

CLOUD, GENERATOR, KEY, REPORT = "cloud.json", "generator.safetensors", "signing_key.pem", "export.json"
FOLDERS = {"float32": "device", "int8": "device-int8"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

WORDS = 6_000  # most that are kept: 1.2 MB in int8
QUESTIONS = 1_000  # most of the test that the bundles are tried on
ANCHORS = 16  # of a session that is tried
TOLERANCE = 1e-4  # of the float32 bundle's scores to torch's
FOLDED = 1 << 22  # numbers of a constant that is computed once and for all
LARGE = 1_000_000  # weights of a generator, from which their precision matters to its speed
FASTER = 1.1  # times, for bfloat16 to be taken


class Source(NamedTuple):
    """What is exported."""

    method: "Answering"
    name: str  # <dataset>/<method>
    task: str
    answers: list[str]  # with the word for all others, where there are classes
    words: list[str]  # the vocabulary
    kept: list[int]  # which of them stay
    frames: dict[str, int]  # number, candidates, size, side
    text_length: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run; returns the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="bundles for a device and for the cloud, of a finished run")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="where the bundles go; default: deployment/ in the run's folder")
    parser.add_argument(
        "--untrained",
        nargs="+",
        type=Path,
        metavar="YAML",
        help="random weights instead of the run's, of the model that these configurations describe: to size and time "
        "a deployment before anything is trained",
    )
    parser.add_argument("--all-words", action="store_true", help="keep the vocabulary as it is, however large")
    options = parser.parse_args(arguments)
    log_to_terminal()
    leave_on_signals()
    out = options.out or options.run / "deployment"

    def run() -> None:
        report = (
            export_untrained(options.untrained, out, options.all_words)
            if options.untrained
            else export_run(options.run, out, options.all_words)
        )
        print(summary(report, out))

    return exit_code(run)


def export_run(run: Path, out: Path, all_words: bool = False) -> dict[str, Any]:
    """Write the bundles of a finished run below `out`, checked against torch and tried on its test; return the report.

    Args:
        run: its folder.
        out: where the bundles go.
        all_words: keep all of the vocabulary.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: its method or task cannot be served.
        DataError: its dataset is not there any more.
    """
    results = results_of(run)

    from cdc_mmpg.data.batch import UNKNOWN_ANSWER  # noqa: PLC0415  see `cli`
    from cdc_mmpg.media.text import TextEncoder  # noqa: PLC0415
    from cdc_mmpg.models.weights import load_checkpoint  # noqa: PLC0415

    experiment = reopen(run)
    method, data, settings = experiment.model, experiment.dataset, experiment.settings["data"]["init_args"]
    _check(method, results["task"])
    method.load_state_dict(load_checkpoint(run / "best.ckpt")["state_dict"])
    data.prepare_data()
    data.setup("test")
    words = TextEncoder(settings["vocab"]).words()
    answers = [*data.answers(), UNKNOWN_ANSWER] if data.task == "open_ended" else []
    source = Source(
        method.eval(),
        f"{run.absolute().parents[1].name}/{run.absolute().parent.name}",
        data.task,
        answers,
        words,
        list(range(len(words))) if all_words else kept_words(words, data.word_counts("train")),
        _frames(settings),
        settings["text_length"],
    )
    report = write_bundles(source, out)
    report["seed"] = results["seed"]
    report["test"] = tried(source, data, run, out)
    write_json(report, out / REPORT)
    return report


def export_untrained(configurations: Sequence[Path], out: Path, all_words: bool = False) -> dict[str, Any]:
    """Write bundles of random weights; the first so many WordPieces of a made-up vocabulary stay, or all.

    Raises:
        ConfigError: the configurations do not make a method that can be served.
    """
    from cdc_mmpg.media.text import BERT_SIZE  # noqa: PLC0415
    from cdc_mmpg.models.adr import ADR  # noqa: PLC0415
    from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  see `cli`

    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--config={path}" for path in configurations]
        arguments += [f"--data.init_args.root={folder}", f"--data.init_args.cache_dir={folder}"]
        if any(path.stem.startswith("cdc_mmpg") and "session" not in path.stem for path in configurations):
            ADR("paper_qa").save(Path(folder) / "adr.safetensors")
            arguments.append(f"--model.init_args.adr={folder}/adr.safetensors")
        experiment = Experiment(arguments, run=False)
    method, settings = experiment.model, experiment.settings["data"]["init_args"]
    _check(method, method.head.task)
    letters = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789?"]
    size = method.encoder.text_embeddings.word_embeddings.num_embeddings
    words = [*SPECIAL, *letters, *(f"word{i}" for i in range(max(size, BERT_SIZE)))][:size]
    answers = [f"answer{i}" for i in range(method.head.outputs)] if method.head.task == "open_ended" else []
    name = "/".join(path.stem for path in reversed(configurations))
    kept = list(range(size if all_words else min(size, WORDS)))
    source = Source(
        method.eval(), name, method.head.task, answers, words, kept, _frames(settings), settings["text_length"]
    )
    report = write_bundles(source, out)
    write_json(report, out / REPORT)
    return report


def _check(method: Any, task: str) -> None:
    """Whether it can be served.

    Raises:
        ConfigError: it cannot.
    """
    from cdc_mmpg.methods.base import Answering  # noqa: PLC0415  see `cli`

    if not isinstance(method, Answering):
        raise ConfigError(f"{type(method).__name__} answers no questions: export a run that does")
    if task == "retrieval":
        raise ConfigError("retrieval compares stored clips with each other: a device that answers has no use for it")
    if method.head.layers > 1:
        raise ConfigError("a layer for every candidate: one upload has one layer (per_candidate: false)")
    method.served()


def _frames(settings: dict[str, Any]) -> dict[str, int]:
    """Which frames the encoder sees, and how large."""
    from cdc_mmpg.media.frames import shorter_side  # noqa: PLC0415  see `cli`

    size = settings["image_size"]
    return {"number": settings["num_frames"], "candidates": settings["candidates"], "size": size,
            "side": settings["resize"] or shorter_side(size)}  # fmt: skip


def kept_words(words: Sequence[str], counts: dict[int, int]) -> list[int]:
    """Ids of the WordPieces that stay: the special ones, and the most frequent, in their old order."""
    special = [words.index(word) for word in SPECIAL]
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return sorted({*special, *frequent[: WORDS - len(special)]})


def write_bundles(source: Source, out: Path) -> dict[str, Any]:
    """Write the bundles and check the float32 one against torch; what the report says of them.

    Raises:
        CheckpointError: the exported encoder does not say what torch says.
        CDCError: a file cannot be written.
    """
    import torch  # noqa: PLC0415  see `cli`

    start = perf_counter()
    method = source.method
    with torch.no_grad():
        served = method.served()
    layouts = {layout.kind: layout for layout in served.generator.layouts()}
    kind = served.generator.native
    layout = layouts[getattr(method, "payload", kind) if kind == "float32" else kind]
    unit = "session" if method.reads == "sessions" else "sample"
    cloud = write_cloud(served.generator, weights_digest(method), source.name, out / "cloud")
    versions = {"encoder": cloud.versions.encoder.hex(), "generator": cloud.versions.generator.hex()}
    made = {"name": source.name, "made": datetime.now(UTC).isoformat(timespec="seconds"), **provenance()}

    settings = {
        "format": FORMAT,
        "task": source.task,
        "unit": unit,
        "layout": list(layout),
        **versions,
        "public_key": cloud.key.public_key().public_bytes_raw().hex(),
        "frames": source.frames,
        "text": {"length": source.text_length, "known": len(source.kept)},
        **made,
    }
    basis = getattr(served.generator.adaptor, "basis", None)
    models = {ENCODER: encoder_graph(source), HEAD: head_graph(method)}
    kept = set(source.kept)
    ordered = [source.words[i] for i in source.kept]
    ordered += [word for i, word in enumerate(source.words) if i not in kept]
    for precision, name in FOLDERS.items():
        folder = out / name
        narrow = np.float16 if precision == "int8" else np.float32
        with tempfile.TemporaryDirectory() as scratch:
            for file, model in models.items():
                content = model.SerializeToString()
                if precision == "int8" and file == ENCODER:
                    content = quantised(content, Path(scratch))
                _write(folder / file, content)
        _save_array(folder / SHARED, served.offline.numpy().astype(narrow))
        if basis is not None:
            _save_array(folder / BASIS, basis.detach().numpy().astype(narrow))
        _write(folder / VOCABULARY, "\n".join(ordered).encode() + b"\n")
        _write(folder / ANSWERS, json.dumps(source.answers).encode())
        files = [ENCODER, HEAD, SHARED, *([BASIS] if basis is not None else []), VOCABULARY, ANSWERS]
        digests = {file: file_digest(folder / file) for file in files}
        _write_settings({**settings, "precision": precision, "files": digests}, folder / BUNDLE)

    difference = compared(source, out / FOLDERS["float32"])
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{out}: the exported scores differ from torch's by {difference}, more than {TOLERANCE}")
    return {
        "name": source.name,
        "task": source.task,
        "unit": unit,
        "layout": layout._asdict(),
        "bytes": {
            **{name: folder_bytes(out / name) for name in (*FOLDERS.values(), "cloud")},
            "up": 4 * WIDTH,
            "down": {kind: own.payload_bytes for kind, own in layouts.items()},
        },
        "words": {"vocabulary": len(source.words), "kept": len(source.kept)},
        "largest_difference": difference,
        "generator": cloud.speed,
        "seconds": perf_counter() - start,
        **made,
    }


class Cloud(NamedTuple):
    """A cloud bundle that was written."""

    key: "Ed25519PrivateKey"
    versions: Versions
    speed: dict[str, Any]  # see `timed_weights`


def write_cloud(generator: "Generator", encoder: bytes, name: str, folder: Path) -> Cloud:
    """Write a cloud bundle; its key is kept where there is one.

    Args:
        generator: on the processor.
        encoder: digest of the encoder whose features it reads.
        name: <dataset>/<method>.
        folder: where to.

    Raises:
        CheckpointError: the key that is there cannot be read.
        CDCError: a file cannot be written.
    """
    key = signing_key(folder / KEY)
    generator.save(folder / GENERATOR)
    versions = Versions(encoder, digest((folder / GENERATOR).read_bytes()))
    speed = timed_weights(folder / GENERATOR)
    written = {name: value.hex() for name, value in versions._asdict().items()}
    public = key.public_key().public_bytes_raw().hex()
    _write_settings({"name": name, "public_key": public, **written, **speed, **provenance()}, folder / CLOUD)
    return Cloud(key, versions, speed)


def signing_key(path: Path) -> "Ed25519PrivateKey":
    """Return the cloud's key, made once: readable by its owner alone.

    Raises:
        CheckpointError: there is a file, and it holds no such key, or others may read it.
        CDCError: it cannot be written.
    """
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  see `cli`
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    if not os.path.lexists(path):
        content = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with atomic_write(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a key ({error}): restore it, or delete it and export anew") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CheckpointError(f"{path}: not an Ed25519 key: delete it and export anew")
    return key


def weights_digest(method: "Answering") -> bytes:
    """Of the encoder and of what the head keeps static: what a device must share with its generator."""
    content = b"".join(
        name.encode() + value.cpu().contiguous().numpy().tobytes()
        for module in (method.encoder, method.head)
        for name, value in module.state_dict().items()
    )
    return digest(content)


def timed_weights(path: Path) -> dict[str, Any]:
    """In which precision the generator's weights are to be held here, and what was measured: milliseconds by batch."""
    import torch  # noqa: PLC0415  see `cli`

    from cdc_mmpg.models.generator import Generator  # noqa: PLC0415

    if sum(value.numel() for value in Generator.load(path).state_dict().values()) < LARGE:
        return {"weights": "float32"}
    found: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bfloat16"):
        generator = Generator.load(path)
        if precision == "bfloat16":
            generator.round_weights()
        found[precision] = {}
        for batch in (1, 8):
            uploads = torch.zeros(batch, 192)
            with torch.inference_mode():
                times = [_timed(partial(generator, uploads)) for _ in range(6)]
            found[precision][str(batch)] = 1000 * min(times)
    faster = all(found["float32"][batch] > FASTER * found["bfloat16"][batch] for batch in ("1", "8"))
    return {"weights": "bfloat16" if faster else "float32", "milliseconds": found}


def _timed(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def encoder_graph(source: Source) -> "onnx.ModelProto":
    """The encoder for one clip: frames (T, S, S, 3) uint8 and ids (1, L), without padding -> features (T, 192)."""
    import torch  # noqa: PLC0415  see `cli`
    from torch import nn  # noqa: PLC0415

    from cdc_mmpg.data.batch import normalise  # noqa: PLC0415

    encoder: AllInOne = copy.deepcopy(source.method.encoder).float().eval()
    table = encoder.text_embeddings.word_embeddings.weight.detach()
    encoder.text_embeddings.word_embeddings = nn.Embedding.from_pretrained(table[source.kept])
    time = encoder.transformer.temporal_embed.detach()
    most = max(3, time.shape[1])  # the exporter takes 2 for a range without choice, and 1 for a constant
    padded = torch.cat([time, time.new_zeros(1, most - time.shape[1], time.shape[2])], dim=1)
    encoder.transformer.temporal_embed = nn.Parameter(padded)
    encoder.num_frames = most

    class OneClip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, frames: "Tensor", ids: "Tensor") -> "Tensor":
            return encoder.one_clip(normalise(frames[None]), ids)

    size, length = source.frames["size"], min(8, source.text_length)
    frames = torch.zeros(most, size, size, 3, dtype=torch.uint8)
    ids = torch.ones(1, length, dtype=torch.long)
    dim = torch.export.Dim
    shapes = {"frames": {0: dim("frames", min=2, max=most)},
              "ids": {1: dim("length", min=2, max=source.text_length)}}  # fmt: skip
    return _graph(OneClip(), (frames, ids), ["frames", "ids"], ["features"], shapes)


def head_graph(method: "Answering") -> "onnx.ModelProto":
    """The head: features (K, T, 192) of a clip with K texts and a layer (L, D + 1) -> scores, and the upload (192,)."""
    import torch  # noqa: PLC0415  see `cli`
    from torch import nn  # noqa: PLC0415

    choosing = method.head.task == "multiple_choice"

    class OneSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.method = method

        def forward(self, features: "Tensor", layer: "Tensor") -> tuple["Tensor", "Tensor"]:
            sample = features[None] if choosing else features  # (1, K, T, 192) or (1, T, 192)
            upload = method.upload(method.head.condition(sample))
            scores = method.head(method.fused(sample), lambda hidden: hidden @ layer[:, :-1].T + layer[:, -1])
            return scores.flatten(), upload.flatten()

    most = max(3, method.encoder.num_frames) if method.reads == "sessions" else method.encoder.num_frames
    features = torch.zeros(5 if choosing else 1, most, 192)
    layer = torch.zeros(method.head.outputs, method.head.inputs + 1)
    dim = torch.export.Dim
    shapes: dict[str, dict[int, Any]] = {"features": {}, "layer": {}}
    if method.reads == "sessions":  # an anchor is one frame
        shapes["features"][1] = dim("frames", min=2, max=most)
    if choosing:
        shapes["features"][0] = dim("choices", min=2, max=64)
    return _graph(OneSample(), (features, layer), ["features", "layer"], ["scores", "upload"], shapes)


def _graph(
    module: Any, example: tuple[Any, ...], inputs: list[str], outputs: list[str], shapes: dict[str, Any]
) -> "onnx.ModelProto":
    """A module as ONNX, without the traces of its making."""
    import torch  # noqa: PLC0415  see `cli`
    from onnxscript import optimizer  # noqa: PLC0415

    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, input_names=inputs, output_names=outputs, dynamic_shapes=shapes,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    optimizer.optimize_ir(program.model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    model = program.model_proto
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    return model


def quantised(content: bytes, scratch: Path) -> bytes:
    """Return an ONNX model with its matrices, word table and patch embedding in 8 bits; activations follow at run time.

    Weights are unsigned, as activations are: x86 processors without VNNI multiply unsigned by signed numbers with an
    instruction that adds pairs of products in 16 bits, which full-range signed weights overflow without a word.

    Source: onnxruntime's dynamic quantisation, a scale and a zero point for each output; its documentation advises
    unsigned weights, or signed ones of 7 bits. Measured with random weights at the paper's size, against full-range
    signed ones with VNNI: unsigned 0.83 times the error of the features in 1.4 times the time, 7 bits 1.6 times the
    error in the same time. On ARM, where phones are, unsigned ones have an instruction of their own.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  see `cli`

    whole, narrow = scratch / "whole.onnx", scratch / "narrow.onnx"
    whole.write_bytes(content)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing that changes nothing here
    try:
        quantize_dynamic(
            whole, narrow, op_types_to_quantize=["MatMul", "Gather", "Conv"], per_channel=True,
            weight_type=QuantType.QUInt8,
        )  # fmt: skip
    finally:
        logging.getLogger().setLevel(level)
    return narrow.read_bytes()


def compared(source: Source, bundle: Path) -> float:
    """The largest difference of a float32 bundle's scores and uploads to torch's: noise, every number of frames."""
    import torch  # noqa: PLC0415  see `cli`

    from cdc_mmpg.data.batch import VideoTextBatch  # noqa: PLC0415

    method, model = source.method, DeviceModel(bundle, threads=1)
    generator, largest = np.random.default_rng(0), 0.0
    layer = torch.from_numpy(model.shared)
    most = source.frames["number"]
    for number in range(1, most + 1) if model.unit == "session" else [most]:
        for length in (2, source.text_length):
            several = 3 if source.task == "multiple_choice" else 1
            frames = generator.integers(256, size=(number, *[source.frames["size"]] * 2, 3), dtype=np.uint8)
            texts = generator.integers(len(source.kept), size=(several, length))
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
                    method.fused(encoded), lambda hidden: hidden @ layer[:, :-1].T + layer[:, -1]
                ).flatten()
                upload = method.upload(method.head.condition(encoded)).flatten()
            features = model.features(frames, texts.tolist())
            for ours, theirs in ((model.scores(features, model.shared), scores), (model.upload(features), upload)):
                largest = max(largest, float(np.abs(ours - theirs.numpy()).max()))
    return largest


def tried(source: Source, data: "VideoTextData", run: Path, out: Path) -> dict[str, Any]:
    """What the bundles and the cut vocabulary cost: right answers to the same test questions, of either bundle and of
    the run itself.

    Layers are made as in the field: each bundle uploads what it computes itself, the cloud's generator answers in the
    bundle's payload. A session has the anchors of the same 16 further clips that the run was tested with.

    Raises:
        CheckpointError: the run's own answers are not there, or of other questions.
    """
    from cdc_mmpg.data.batch import UNKNOWN, Origin  # noqa: PLC0415  see `cli`
    from cdc_mmpg.evaluation.metrics import RIGHT  # noqa: PLC0415

    labels = data.labels("test").tolist()
    drawn = sorted(np.random.default_rng(data.seed).permutation(len(labels))[:QUESTIONS].tolist())
    predictions = run / "predictions.test.csv"
    try:
        with predictions.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        given = [row[len(Origin._fields)] for row in rows]
        if len(rows) != len(labels):
            raise ValueError(f"{len(rows)} questions, where the dataset has {len(labels)}")
        by_label = header[-1] == RIGHT
        answers = [data.word("test", i, labels[i]) if labels[i] != UNKNOWN else "" for i in range(len(labels))]
        # By label, but of a run of an earlier version, whose table has words alone.
        right = [row[-1][0] == "r" if by_label else given[i] == answers[i] for i, row in enumerate(rows)]
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise CheckpointError(f"{predictions}: not what a test leaves ({error}): train anew") from error
    from cdc_mmpg.models.generator import Generator  # noqa: PLC0415  see `cli`

    generator = Generator.load(out / "cloud" / GENERATOR)
    found: dict[str, Any] = {"questions": len(drawn),
                             "run": {"accuracy": float(np.mean([right[i] for i in drawn]))}}  # fmt: skip
    for name in FOLDERS.values():
        model = DeviceModel(out / name)
        own = dict(zip(drawn, device_answers(model, source, data, drawn, generator), strict=True))
        words = {i: data.word("test", i, own[i]) for i in drawn}
        found[name] = {
            "accuracy": float(np.mean([own[i] == labels[i] for i in drawn])),
            "agreement": float(np.mean([words[i] == given[i] for i in drawn])),
        }
    counts = data.word_counts("test")
    kept = set(source.kept)
    found["unknown_words"] = sum(n for word, n in counts.items() if word not in kept) / max(1, sum(counts.values()))
    return found


def device_answers(
    model: DeviceModel, source: Source, data: "VideoTextData", drawn: Sequence[int], generator: "Generator"
) -> list[int]:
    """What a device says to test questions, with layers from the cloud's generator."""
    import torch  # noqa: PLC0415  see `cli`

    test: Any = data.dataset("test", augment=False)
    place = {old: new for new, old in enumerate(source.kept)}
    unknown = place[source.words.index("[UNK]")]
    sessions = data.sessions() if model.unit == "session" else None
    layers: dict[int, NDArray[np.float32]] = {}  # by device

    def layer(upload: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = generator.matrices(generator(torch.from_numpy(upload)[None]), model.layout.kind)
        content = encode([part[0].numpy() for part in parts], model.layout.precision)
        return model.install(decode(content, model.layout.shapes, model.layout.precision), model.layout)

    def of_session(device: int) -> NDArray[np.float32]:
        assert sessions is not None
        anchors: Any = sessions.anchors
        chosen = np.random.default_rng((data.seed, device)).permutation(sessions.pools[device])[:ANCHORS]
        if not len(chosen):
            return model.shared
        return layer(np.mean([model.anchor(anchors.frames(0, i).numpy()) for i in chosen.tolist()], axis=0))

    answers = []
    for i in track(drawn, description=f"answers of {model.layout.kind}"):
        texts = [[place.get(word, unknown) for word in text] for text in test.texts[i]]
        features = model.features(np.ascontiguousarray(test.frames(0, i).numpy()), texts)
        if sessions is None:
            own = layer(model.upload(features))
        else:
            device = sessions.devices["test"][i]
            if device not in layers:
                layers[device] = of_session(device)
            own = layers[device]
        answers.append(int(model.scores(features, own).argmax()))
    return answers


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def summary(report: dict[str, Any], out: Path) -> str:
    """What a person wants to know of an export."""
    sizes = {name: report["bytes"][name] / 1e6 for name in (*FOLDERS.values(), "cloud")}
    lines = [f"{out}: {report['name']}"]
    for name, size in sizes.items():
        tried = report.get("test", {}).get(name)
        said = (
            f"  accuracy {tried['accuracy']:.1%}, the run's answer to {tried['agreement']:.1%} of the questions"
            if tried
            else ""
        )
        lines.append(f"  {name + '/':12} {size:8.2f} MB{said}")
    if "test" in report:
        test = report["test"]
        lines.append(f"  the run itself: accuracy {test['run']['accuracy']:.1%} of {test['questions']} test questions")
    kept = report["words"]
    lost = f", which makes {report['test']['unknown_words']:.2%} of the test's unknown" if "test" in report else ""
    lines.append(f"  words: {kept['kept']:,} of {kept['vocabulary']:,} kept{lost}")
    lines.append(f"  float32 against torch: largest difference {report['largest_difference']:.1e}")
    kind = report["layout"]["kind"]
    lines.append(f"  a layer: {report['bytes']['up']} bytes up, {report['bytes']['down'][kind]:,} down ({kind})")
    return "\n".join(lines)


def _write_settings(settings: dict[str, Any], path: Path) -> None:
    """Write settings with their own digest, so that their reader notices what was changed by accident."""
    written = json.loads(json.dumps(settings))  # numbers and keys as they will be read
    write_json({**written, "digest": json_digest(written)}, path)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _save_array(path: Path, array: NDArray[Any]) -> None:
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)


if __name__ == "__main__":
    sys.exit(main())
