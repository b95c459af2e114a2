"""Cost of adapting on the device: seconds and peak memory of every adaptation at the paper's size, on one thread.

`make benchmark OF=adapting` uses random weights and frames. Each adaptation runs in a separate process; its memory is
the increase of the peak over model and frames. Of a session, only the device's part is measured: the anchors. Accuracy
is not measured here.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from cdc_mmpg.benchmarks.render import make_table, read_memory
from cdc_mmpg.controls.forward_only import (
    Statistics,
    adjust_prototypes,
    search_prompts,
    shift_activations,
    smooth_over_neighbours,
)
from cdc_mmpg.controls.on_device import Comparison, adapt_by_entropy
from cdc_mmpg.data.batch import VideoTextBatch, normalise
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CDCError
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.program import log_to_terminal, run_to_exit_code

QUESTIONS = 15  # number of questions of a device
ANCHORS = 16  # number of clips of a session
CLASSES, WORDS, IMAGE_SIZE, DEPTH = 1001, 10, 224, 12  # the paper's MSVD-QA; words per question, pixels, blocks
LABEL_STEPS = 100  # number of fine-tuning steps


class Device:
    """A device with questions, and a model of the size of a fine-tuned one with random weights.

    Args:
        image_size: pixels per side of a frame.
        depth: number of blocks of the encoder.
    """

    seed = 0

    def __init__(self, image_size: int, depth: int) -> None:
        torch.manual_seed(0)
        encoder = AllInOne(image_size=image_size, depth=depth, dropout=0.0, drop_path=0.0)
        self.model: Any = FineTuning(encoder, OpenEnded(CLASSES)).eval().requires_grad_(False)
        places = torch.arange(QUESTIONS)
        ids = torch.randint(1000, 30_000, (QUESTIONS, WORDS))
        frames = torch.randint(256, (max(QUESTIONS, ANCHORS), 3, image_size, image_size, 3), dtype=torch.uint8)
        self.batch = VideoTextBatch(frames[:QUESTIONS], ids, torch.ones_like(ids), places % CLASSES, places)
        self.anchors = frames[:ANCHORS, 1:2]

    def answer(self) -> torch.Tensor:
        """Answer the questions one at a time, and return their m̄ (Q, 192)."""
        fused = []
        with torch.no_grad():
            for place in range(QUESTIONS):
                question = VideoTextBatch(*(part[place : place + 1] for part in self.batch))
                features = self.model.encode(question).frame_features
                self.model(features)
                fused.append(self.model.fuse(features))
        return torch.cat(fused)

    def collect_anchors(self) -> None:
        """Compute the anchor features of a session's clips, one at a time, and their mean."""
        prompt = torch.tensor([[101, *[103] * 8, 102]])
        with torch.no_grad():
            features = [self.model.encoder(normalise(frame[None]), prompt, None).fused for frame in self.anchors]
            torch.cat(features).mean(0)

    def train_on_labels(self) -> None:
        """Fine-tune head and layer on `QUESTIONS` labelled questions."""
        with torch.no_grad():
            features = self.model.encode(self.batch).frame_features
        chosen = torch.arange(QUESTIONS)[None]
        Comparison(self.model, self).fine_tune(features, self.batch.labels, chosen, "head", 1e-3, (LABEL_STEPS,))

    def search_foa_prompts(self) -> None:
        """Search the prompts of FOA."""
        layers = len(self.model.encoder.transformer.blocks)
        statistics = Statistics(torch.zeros(layers, FEATURE_DIM), torch.ones(layers, FEATURE_DIM))
        with torch.no_grad():
            search_prompts(self.model, [self.batch], statistics, 0.1, 0)


# Adaptations by name: work done instead of only answering a device's questions, or before.
ADAPTATIONS: dict[str, Callable[[Device], object]] = {
    "only answering": Device.answer,
    f"session: {ANCHORS} anchors, before": Device.collect_anchors,
    "T3A": lambda device: adjust_prototypes(device.model.head.phi(device.answer()), device.model.layer, 20),
    "LAME": lambda device: smooth_over_neighbours(
        hidden := device.model.head.phi(device.answer()), device.model.layer(hidden), 5
    ),
    "FOA's shift": lambda device: shift_activations(device.answer(), torch.zeros(FEATURE_DIM), 1.0),
    "TENT": lambda device: adapt_by_entropy(device.model, [device.batch], 1e-3),
    "FOA's prompts": Device.search_foa_prompts,
    f"{QUESTIONS} labels, {LABEL_STEPS} steps, before": Device.train_on_labels,
}


def measure(device: Device, name: str) -> tuple[float, float | None]:
    """Measure an adaptation here: seconds, and increase of peak memory in MB (None where unavailable)."""
    before, start = _reset_peak(), perf_counter()
    ADAPTATIONS[name](device)
    seconds, peak = perf_counter() - start, read_memory("VmHWM")
    return seconds, None if before is None or peak is None else peak - before


def measure_in_subprocess(device: Device, name: str) -> tuple[float, float | None]:
    """Run `measure` in a separate process, so that memory of other adaptations is not counted.

    Raises:
        CDCError: the process ended without a result.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure(device, name)))
    process.start()
    sender.close()
    try:
        figures: tuple[float, float | None] = receiver.recv()
    except EOFError as error:
        raise CDCError(f"{name}: its process ended without a result; the machine may lack memory") from error
    finally:
        process.join()
    return figures


def _reset_peak() -> float | None:
    """Reset the peak memory of this process; return its current memory in MB, None where unavailable."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return read_memory("VmRSS")


def benchmark(image_size: int, depth: int) -> None:
    """Measure every adaptation in a separate process, and print a table."""
    torch.set_num_threads(1)
    device = Device(image_size, depth)
    table = make_table(
        f"Adapting on the device: {QUESTIONS} questions, {image_size} pixels, depth {depth}, one thread",
        ["adaptation"], ["seconds", "× only answering", "MB more"],
    )  # fmt: skip
    baseline_seconds = 0.0
    for name in ADAPTATIONS:
        seconds, megabytes = measure_in_subprocess(device, name)
        baseline_seconds = baseline_seconds or seconds
        more = "–" if megabytes is None else f"{megabytes:,.0f}"
        table.add_row(name, f"{seconds:.2f}", f"{seconds / baseline_seconds:.2f}", more)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="pixels per side of a frame")
    parser.add_argument("--depth", type=int, default=DEPTH, help="number of blocks of the encoder")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run_to_exit_code(lambda: benchmark(options.image_size, options.depth))
