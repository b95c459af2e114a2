"""What adapting takes on the device: seconds and memory, of every way at the paper's size, on one thread.

`make benchmark OF=adapting`: random weights and frames; each way in a process of its own, whose peak of memory is
above what model and frames take. The session's share is what the device does: the anchors. Nothing here tells how well
a way answers.
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
from cdc_mmpg.program import exit_code, log_to_terminal

QUESTIONS = 15  # that a device answers
ANCHORS = 16
CLASSES, WORDS, IMAGE_SIZE, DEPTH = 1001, 10, 224, 12  # of the paper's MSVD-QA
LABEL_STEPS = 100


class Device:
    """A device with questions: a fine-tuned model's size, with random weights.

    Args:
        image_size: pixels of a side of its frames.
        depth: blocks of its encoder.
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
        """Return m̄ (Q, 192) of the questions, one at a time, after answering them."""
        found = []
        with torch.no_grad():
            for place in range(QUESTIONS):
                one = VideoTextBatch(*(part[place : place + 1] for part in self.batch))
                features = self.model.encode(one).frame_features
                self.model(features)
                found.append(self.model.fuse(features))
        return torch.cat(found)

    def collect_anchors(self) -> None:
        """Do the device's part of a session: the anchor features of its clips, one at a time, and their mean."""
        prompt = torch.tensor([[101, *[103] * 8, 102]])
        with torch.no_grad():
            found = [self.model.encoder(normalise(frame[None]), prompt, None).fused for frame in self.anchors]
            torch.cat(found).mean(0)

    def train_on_labels(self) -> None:
        """Fine-tune head and layer on as many labelled questions."""
        with torch.no_grad():
            features = self.model.encode(self.batch).frame_features
        chosen = torch.arange(QUESTIONS)[None]
        Comparison(self.model, self).fine_tuned(features, self.batch.labels, chosen, "head", 1e-3, (LABEL_STEPS,))

    def search(self) -> None:
        """Search FOA's prompts."""
        layers = len(self.model.encoder.transformer.blocks)
        nothing = Statistics(torch.zeros(layers, FEATURE_DIM), torch.ones(layers, FEATURE_DIM))
        with torch.no_grad():
            search_prompts(self.model, [self.batch], nothing, 0.1, 0)


# What is done for the questions of a device in place of only answering them, or before.
WAYS: dict[str, Callable[[Device], object]] = {
    "only answering": Device.answer,
    f"session: {ANCHORS} anchors, before": Device.collect_anchors,
    "T3A": lambda device: adjust_prototypes(device.model.head.phi(device.answer()), device.model.layer, 20),
    "LAME": lambda device: smooth_over_neighbours(
        hidden := device.model.head.phi(device.answer()), device.model.layer(hidden), 5
    ),
    "FOA's shift": lambda device: shift_activations(device.answer(), torch.zeros(FEATURE_DIM), 1.0),
    "TENT": lambda device: adapt_by_entropy(device.model, [device.batch], 1e-3),
    "FOA's prompts": Device.search,
    f"{QUESTIONS} labels, {LABEL_STEPS} steps, before": Device.train_on_labels,
}


def measure(device: Device, way: str) -> tuple[float, float | None]:
    """Return seconds and the peak of memory in MB of a way, in this process; the peak is None where nobody tells it."""
    before, began = _reset_peak(), perf_counter()
    WAYS[way](device)
    seconds, peak = perf_counter() - began, read_memory("VmHWM")
    return seconds, None if before is None or peak is None else peak - before


def measure_apart(device: Device, way: str) -> tuple[float, float | None]:
    """Do `measure` in a process of its own, to which nothing of another way's memory is left.

    Raises:
        CDCError: the process ended without figures.
    """
    context = multiprocessing.get_context("fork")
    own, other = context.Pipe(duplex=False)
    process = context.Process(target=lambda: other.send(measure(device, way)))
    process.start()
    other.close()
    try:
        found: tuple[float, float | None] = own.recv()
    except EOFError as error:
        raise CDCError(f"{way}: its process ended without figures; it may lack memory") from error
    finally:
        process.join()
    return found


def _reset_peak() -> float | None:
    """Begin the peak of this process's memory anew; return what it takes now, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return read_memory("VmRSS")


def benchmark(image_size: int, depth: int) -> None:
    """Measure every way in a process of its own, and print a table."""
    torch.set_num_threads(1)
    device = Device(image_size, depth)
    table = make_table(
        f"Adapting on the device: {QUESTIONS} questions, {image_size} pixels, depth {depth}, one thread",
        ["way"], ["seconds", "× only answering", "MB more"],
    )  # fmt: skip
    alone = 0.0
    for way in WAYS:
        seconds, megabytes = measure_apart(device, way)
        alone = alone or seconds
        more = "–" if megabytes is None else f"{megabytes:,.0f}"
        table.add_row(way, f"{seconds:.2f}", f"{seconds / alone:.2f}", more)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="pixels of a side")
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks of the encoder")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return exit_code(lambda: benchmark(options.image_size, options.depth))
