"""Benchmark of the device: its encoders against eager torch encoders of the same size, and the swap of a layer."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.table import Table

from cdc_mmpg.benchmarks.load import ExpectedLayer
from cdc_mmpg.benchmarks.render import Report, make_table, read_memory
from cdc_mmpg.cloud.model import ServedModel, generate_layer, load_model
from cdc_mmpg.data.batch import normalise
from cdc_mmpg.device.model import ENCODER_FILE, DeviceModel, read_bundle
from cdc_mmpg.device.state import Layer
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CDCError
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.processors import count_processors
from cdc_mmpg.wire.messages import decode_layer, decode_upload, encode_upload

EXAMPLE_WORDS = 12  # number of WordPieces of the example question
GOAL_SWAP_MILLISECONDS = 1.0  # goal for the swap of a layer


def compare_encoders(bundles: Path, seconds: float) -> Report:
    """Measure encoding a question about a decoded clip in the bundles' encoders and in torch, with one and all threads.

    The first run of a turn is a warm-up, during which spinning threads of another runtime stop. The minimum is reported
    beside the median: on a busy machine, the threads of an inference wait for each other far longer than they work.
    """
    report: Report = {"threads": {}}
    frames, text = make_example(bundles)
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, count_processors()}):
            torch.set_num_threads(threads)
            runs: dict[str, Callable[[], Any]] = {
                "float32": partial(DeviceModel(bundles / "device", threads).encode, frames, [text]),
                "int8": partial(DeviceModel(bundles / "device-int8", threads).encode, frames, [text]),
                "torch": make_torch_encoder(bundles),
            }
            times = time_in_turns(runs, 3 * seconds)
            figures: Report = {name: {"p50_milliseconds": float(np.median(values)), "least_milliseconds": min(values),
                                      "runs": len(values)} for name, values in times.items()}  # fmt: skip
            for name in runs:
                figures[name]["torch_ratio"] = figures["torch"]["p50_milliseconds"] / figures[name]["p50_milliseconds"]
            report["threads"][str(threads)] = figures
    finally:
        torch.set_num_threads(before)
    report["clip"] = list(frames.shape)
    report["words"] = len(text)
    report["peak_megabytes"] = {name: measure_peak_megabytes(bundles, name) for name in ("float32", "int8", "torch")}
    return report


def make_example(bundles: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Draw random frames of a decoded clip (T, S, S, 3), and the WordPieces of a question."""
    settings = read_bundle(bundles / "device")
    generator, size = np.random.default_rng(0), settings["frames"]["size"]
    frames = generator.integers(256, size=(settings["frames"]["number"], size, size, 3), dtype=np.uint8)
    words = min(EXAMPLE_WORDS, settings["text"]["length"])
    return frames, [int(word) for word in generator.integers(settings["text"]["known"], size=words)]


def make_torch_encoder(bundles: Path) -> Callable[[], Any]:
    """Return a function that runs the same encoder in torch once, with random weights."""
    frames, text = make_example(bundles)
    settings = read_bundle(bundles / "device")
    graph = onnx.load(str(bundles / "device" / ENCODER_FILE)).graph
    encoder = AllInOne(
        num_frames=len(frames),
        image_size=settings["frames"]["size"],
        depth=sum(node.op_type == "Softmax" for node in graph.node),  # one a block
        vocab_size=settings["text"]["known"],
        text_length=settings["text"]["length"],
    ).eval()
    clip, ids = torch.from_numpy(frames)[None], torch.tensor([text])

    def run() -> None:
        with torch.inference_mode():
            encoder.encode_clip(normalise(clip), ids)

    return run


def time_in_turns(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of functions that take turns for `seconds`; at least 3 runs of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def measure_peak_megabytes(bundles: Path, name: str) -> float | None:
    """Return the peak megabytes of a process that encodes one question; None if the system does not provide it.

    Raises:
        CDCError: the process failed.
    """
    if not Path("/proc/self/status").is_file():
        return None
    code = f"from {__package__}.device import print_peak; print_peak({str(bundles)!r}, {name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CDCError(f"the process that measures peak memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def print_peak(bundles: str, name: str) -> None:
    """Encode a question in this process, and print its peak megabytes."""
    if name == "torch":
        run = make_torch_encoder(Path(bundles))
    else:
        frames, text = make_example(Path(bundles))
        folder = Path(bundles) / ("device" if name == "float32" else "device-int8")
        run = partial(DeviceModel(folder).encode, frames, [text])
    run()
    peak = read_memory("VmHWM")
    print("nan" if peak is None else peak)


def make_encoder_table(report: Report) -> Table:
    """Return a table of the encoders' figures."""
    columns = [f"p50 ms, {threads} thread{'s' if threads != '1' else ''}" for threads in report["threads"]]
    count, size = report["clip"][:2]
    table = make_table(
        f"device: the encoder, {count} frames at {size}, {report['words']} words",
        ["encoder"],
        [part for column in columns for part in (column, "least", "torch / this")] + ["peak MB"],
    )
    for name in ("float32", "int8", "torch"):
        rows = [encoders[name] for encoders in report["threads"].values()]
        values = [part for row in rows for part in (f"{row['p50_milliseconds']:.1f}",
                  f"{row['least_milliseconds']:.1f}", f"× {row['torch_ratio']:.2f}")]  # fmt: skip
        peak = report["peak_megabytes"][name]
        table.add_row("torch, eager" if name == "torch" else f"bundle, {name}", *values, f"{peak:.0f}" if peak else "")
    return table


def time_swaps(bundles: Path, clouds: Mapping[str, Path], seconds: float) -> Report:
    """Measure verification and swap of a layer, from a received message to a layer in use, by kind."""
    model = DeviceModel(bundles / "device")
    served = {kind: load_model(folder) for kind, folder in clouds.items()}
    messages = {kind: make_message(served.get(kind, served["float32"]), kind)
                for kind in ("float32", "float16", "int8", "low_rank", "basis")}  # fmt: skip
    # A bundle for basis layers has this array in basis.bin.
    adaptor: Any = served["basis"].generator.adaptor
    model._basis = adaptor.basis.detach().cpu().numpy()
    device = SimpleNamespace(layer=Layer(model.shared, 0, "shared"))
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in messages}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 20:
        for kind, (upload, content, expected) in messages.items():
            start = time.perf_counter()
            matrices = decode_layer(content, upload, expected.layout, expected.versions, expected.key)
            verified = time.perf_counter()
            device.layer = Layer(model.install(matrices, expected.layout), 1, "adapted")
            times[kind].append((verified - start, time.perf_counter() - verified))
    report: Report = {}
    for kind, durations in times.items():
        verifying, swapping = 1000 * np.array(durations).T
        report[kind] = {
            "bytes": len(messages[kind][1]),
            "verify_milliseconds": float(np.median(verifying)),
            "swap_milliseconds": float(np.median(swapping)),
            "swap_p99_milliseconds": float(np.percentile(swapping, 99)),
            "milliseconds": float(np.median(verifying + swapping)),
            "runs": len(durations),
        }
    return report


def make_message(served: "ServedModel", kind: str) -> tuple[bytes, bytes, ExpectedLayer]:
    """Return an upload, the layer message that answers it, and the data to verify the message."""
    layout = next(layout for layout in served.layouts if layout.kind == kind)
    feature = np.tanh(np.random.default_rng(1).standard_normal(FEATURE_DIM)).astype(np.float32)
    upload = encode_upload(feature, layout, served.versions)
    content = generate_layer(served, upload, decode_upload(upload, served.layouts, served.versions))
    return upload, content, ExpectedLayer(layout, served.versions, served.key.public_key())


def make_swap_table(report: Report) -> Table:
    """Return a table of the swaps' figures."""
    table = make_table(
        f"swap: a received message becomes the layer in use; goal {report['goal_milliseconds']:g} ms",
        ["layer"],
        ["bytes", "verify ms", "swap ms", "swap p99 ms", "both ms", "goal"],
    )
    for kind, figures in report["kinds"].items():
        table.add_row(
            kind,
            f"{figures['bytes']:,}",
            *(f"{figures[name]:.3f}" for name in ("verify_milliseconds", "swap_milliseconds", "swap_p99_milliseconds")),
            f"{figures['milliseconds']:.3f}",
            "met" if figures["swap_milliseconds"] <= report["goal_milliseconds"] else "missed",
        )
    return table
