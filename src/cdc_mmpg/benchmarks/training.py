"""Training speed of each method at the paper's size on one device: samples per second, and share of peak FLOP/s.

Steps run through Lightning as in training, from a batch in pinned memory, with questions of MSVD-QA's and MSRVTT-QA's
lengths. Data loading is measured separately (`data_modules.benchmark_loading`).
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.flop_counter import FlopCounterMode

from cdc_mmpg.data.batch import CaptionBatch, FeatureBatch, SessionBatch, Task, VideoTextBatch
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.files import atomic_write
from cdc_mmpg.methods.adr_pretraining import ADRPretraining
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.methods.encoder_pretraining import EncoderPretraining
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head, MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.program import protect_output
from cdc_mmpg.training.matmul import Matmul, set_matmul

WARM_UP_STEPS = 5  # number of steps before the clock starts
VOCABULARY_WORDS = 30_522  # size of the vocabulary


class Sizes(NamedTuple):
    """Sizes of model and batch."""

    batch: int  # questions per step
    steps: int  # measured steps
    classes: int = 1501
    image: int = 224  # pixels per side
    depth: int = 12  # blocks of the encoder
    compiled: bool = False  # whether the encoder's blocks are compiled


class Mode(NamedTuple):
    """Precision settings of a run."""

    precision: Literal["32-true", "bf16-mixed"]
    matmul: Matmul
    dtype: torch.dtype  # type of the reference matrix product


MODES = {
    "float32": Mode("32-true", "highest", torch.float32),
    "tf32": Mode("32-true", "high", torch.float32),
    "bf16": Mode("bf16-mixed", "highest", torch.bfloat16),
}
BENCHMARK_ROWS: tuple[tuple[str, Task], ...] = (
    ("fine_tuning", "open_ended"), ("cdc_mmpg", "open_ended"), ("cdc_mmpg", "retrieval"),
    ("cdc_mmpg", "multiple_choice"), ("encoder_pretraining", "open_ended"), ("linear", "open_ended"),
    ("hyper", "open_ended"), ("adr_pretraining", "open_ended"), ("cdc_mmpg_session", "open_ended"),
)  # fmt: skip
FEATURE_METHODS = ("linear", "hyper", "adr_pretraining")  # methods that train on precomputed features
STEP_PARTS = {"multiple_choice": 4}  # accumulated batches per step, as in the dataset's configuration


class StepClock(Callback):
    """Callback that records the duration of the steps after the warm-up, and all losses.

    Args:
        steps: number of measured steps.
        warm_up: number of steps before them.
    """

    def __init__(self, steps: int, warm_up: int = WARM_UP_STEPS) -> None:
        self.steps, self.warm_up = steps, warm_up
        self._losses: list[Tensor] = []
        self._times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *others: Any) -> None:
        """Record the loss; synchronise and record the time only at the start and the end of the measured steps."""
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # undoes Lightning's division
        if len(self._losses) in (self.warm_up, self.warm_up + self.steps):
            self._losses[-1].item()
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Duration of all measured steps."""
        return self._times[1] - self._times[0]

    @property
    def losses(self) -> list[float]:
        """Loss of every step, including the warm-up."""
        return [float(loss) for loss in self._losses]


def build_method(name: str, task: Task, sizes: Sizes) -> Method:
    """Build a method with random weights; phase two gets a new reasoner."""
    encoder = AllInOne(image_size=sizes.image, depth=sizes.depth)
    if sizes.compiled:
        encoder.compile_blocks()
    head: Head = OpenEnded(sizes.classes)
    if task != "open_ended":
        head = MultipleChoice() if task == "multiple_choice" else Retrieval()
    if name == "cdc_mmpg":
        with tempfile.TemporaryDirectory() as folder:
            ADR("paper_mc" if task == "multiple_choice" else "paper_qa").save(Path(folder) / "adr.safetensors")
            return CDCMMPG(encoder, head, adr=str(Path(folder) / "adr.safetensors"))
    if name == "cdc_mmpg_session":
        method = CDCMMPGSession(encoder, head)
        method.axes.fit(torch.randn(64, FEATURE_DIM), [list(range(place, 64, 8)) for place in range(8)])  # type: ignore[operator]
        method.setup = lambda stage: None  # type: ignore[method-assign]  # there is no dataset to fit the axes on
        return method
    classes = {"fine_tuning": FineTuning, "linear": Linear, "hyper": Hyper, "adr_pretraining": ADRPretraining}
    if name == "encoder_pretraining":
        return EncoderPretraining(encoder, head, caption_epochs=1, whole_epochs=1)  # trains on captions with all frames
    return classes[name](encoder, head)


def draw_texts(shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw ids and mask (..., L) of questions with lengths as in MSRVTT-QA (mean 10, at most 31)."""
    lengths = torch.from_numpy(np.minimum(6 + generator.gamma(1.6, 2.5, shape), 31).astype(np.int64))
    mask = (torch.arange(int(lengths.max())) < lengths[..., None]).long()
    ids = torch.from_numpy(generator.integers(1000, VOCABULARY_WORDS, mask.shape)) * mask
    return ids, mask


def draw_batch(name: str, task: Task, sizes: Sizes) -> Any:
    """Draw a random batch; in pinned memory if there is a GPU."""
    generator = np.random.default_rng(0)
    size = max(2, sizes.batch // STEP_PARTS.get(task, 1))
    labels = torch.from_numpy(generator.integers(5 if task == "multiple_choice" else sizes.classes, size=size))
    places = torch.arange(size)
    batch: Any
    if name in FEATURE_METHODS or name == "cdc_mmpg_session":
        batch = FeatureBatch(torch.randn(size, 3, FEATURE_DIM), labels, places)
        if name == "cdc_mmpg_session":
            anchors = torch.from_numpy(generator.integers(0, 24, (size, 1)))
            batch = SessionBatch(batch, torch.randn(size, 1, FEATURE_DIM), anchors, torch.zeros(size, 2))
    else:
        frames = torch.from_numpy(generator.integers(256, size=(size, 3, sizes.image, sizes.image, 3), dtype=np.uint8))
        shape = {"open_ended": (size,), "multiple_choice": (size, 5), "retrieval": (size, 1)}[task]
        texts = draw_texts(shape, generator)
        if name == "encoder_pretraining":
            batch = CaptionBatch(frames, *texts, *texts, torch.tensor([101, *[103] * 8, 102]), labels, places)
        else:
            batch = VideoTextBatch(frames, *texts, labels, places)
    return pin_memory(batch) if torch.cuda.is_available() else batch


def measure_matrix_peak(device: torch.device, mode: Mode) -> float:
    """Return the FLOP/s of a large square matrix product in a precision."""
    set_matmul(mode.matmul)
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=mode.dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        float((left @ right)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def count_operations(method: Method, batch: Any) -> float:
    """Return the FLOPs of a training step per sample, counted on the CPU for two samples."""

    def take_two(part: Any) -> Any:
        if isinstance(part, tuple):
            return type(part)(*map(take_two, part))
        return part[:2] if isinstance(part, Tensor) and len(part) == len(batch.labels) else part

    pair = take_two(batch)
    method.cpu().train()
    with FlopCounterMode(display=False) as flops:
        if isinstance(method, EncoderPretraining):
            (method.captions_loss(pair, training=True)[0] + method.anchors_loss(pair)).backward()
        else:
            method._step(pair, "train").backward()
    return flops.get_total_flops() / 2


def measure_training(name: str, task: Task, sizes: Sizes, mode: Mode) -> tuple[StepClock, dict[str, float]]:
    """Train a few steps, each of as many batches as a step of the recipe.

    Returns:
        The clock, and the figures: samples/s, milliseconds per step, TFLOP/s, peak GiB (0 without a GPU), first and
        last loss.
    """
    set_matmul(mode.matmul)
    seed_everything(0, verbose=False)
    method, batch = build_method(name, task, sizes), draw_batch(name, task, sizes)
    parts = STEP_PARTS.get(task, 1)
    clock = StepClock(parts * sizes.steps, parts * WARM_UP_STEPS)
    trainer = Trainer(
        devices=1, max_epochs=1, precision=mode.precision, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=parts,
        default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches: Any = [batch] * (parts * (sizes.steps + WARM_UP_STEPS))
    trainer.fit(method, DataLoader(batches, batch_size=None))
    samples = parts * len(batch.labels) * sizes.steps
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return clock, {
        "samples/s": samples / clock.seconds,
        "ms": 1000 * clock.seconds / sizes.steps,
        "TFLOP/s": count_operations(method, batch) * samples / clock.seconds / 1e12,
        "GiB": memory,
        "first loss": clock.losses[0],
        "last loss": clock.losses[-1],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; compare figures only within one run, since they depend on the machine's current load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256, help="questions per step")
    parser.add_argument("--steps", type=int, default=50, help="measured steps")
    parser.add_argument("--classes", type=int, default=1501, help="answers of open-ended questions")
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side of a frame")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="precisions; default: all")
    rows = [".".join(row) for row in BENCHMARK_ROWS]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="methods with their tasks; default: all")
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--json", type=Path, help="file for the figures, updated after every row")
    options = parser.parse_args(arguments)
    protect_output()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    sizes = Sizes(
        options.batch_size, options.steps, options.classes, options.image_size, options.depth, options.compile
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peaks = {mode: measure_matrix_peak(device, MODES[mode]) for mode in options.modes}
    report: dict[str, Any] = {"machine": machine, **sizes._asdict(), "peak TFLOP/s": {}, "rows": {}}
    report["peak TFLOP/s"] = {mode: peak / 1e12 for mode, peak in peaks.items()}
    table = Table(title=f"{machine}: steps of {sizes.batch}, 3 frames at {sizes.image}, {sizes.steps} steps")
    for column in ("method", "task", "precision", "samples/s", "ms", "TFLOP/s", "of the matrix product", "GiB", "loss"):
        table.add_column(column, justify="left" if column in ("method", "task", "precision") else "right")
    for row in options.rows:
        name, _, task = row.partition(".")
        for mode in options.modes:
            _, figures = measure_training(name, task, sizes, MODES[mode])
            figures["of the matrix product"] = figures["TFLOP/s"] * 1e12 / peaks[mode]
            report["rows"][f"{row}.{mode}"] = figures
            table.add_row(
                name, task, mode, f"{figures['samples/s']:,.0f}", f"{figures['ms']:.1f}", f"{figures['TFLOP/s']:.3f}",
                f"{figures['of the matrix product']:.1%}", f"{figures['GiB']:.1f}",
                f"{figures['first loss']:.3f} to {figures['last loss']:.3f}",
            )  # fmt: skip
            if options.json:
                with atomic_write(options.json) as file:
                    file.write(json.dumps(report, indent=1).encode())
    Console(width=130).print(table)
    return 0
