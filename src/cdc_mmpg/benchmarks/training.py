"""How fast each method trains at the paper's size, on one device: samples a second, and the share of its arithmetic.

A step is measured as a run takes it, through Lightning, from a batch in pinned memory, with questions as long as
MSVD-QA's and MSRVTT-QA's. What brings the batches is measured apart (`data_modules.benchmark_loading`).
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

WARM_UP = 5  # steps before the clock starts
VOCABULARY_WORDS = 30_522  # of the vocabulary


class Sizes(NamedTuple):
    """What is measured."""

    batch: int  # questions of a step
    steps: int
    classes: int = 1501
    image: int = 224  # pixels
    depth: int = 12
    compiled: bool = False


class Mode(NamedTuple):
    """A precision as a run is given it."""

    precision: Literal["32-true", "bf16-mixed"]
    matmul: Matmul
    dtype: torch.dtype  # of the matrix product that the row is compared with


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
ON_FEATURES = ("linear", "hyper", "adr_pretraining")  # which the encoder has computed before
STEP_PARTS = {"multiple_choice": 4}  # parts of a step that are accumulated, as the dataset's configuration has it


class StepClock(Callback):
    """Seconds of the steps after the warm-up, and all losses.

    Args:
        steps: to be measured.
        warm_up: steps before them.
    """

    def __init__(self, steps: int, warm_up: int = WARM_UP) -> None:
        self.steps, self.warm_up = steps, warm_up
        self._losses: list[Tensor] = []
        self._times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *others: Any) -> None:
        """Read the time when the device has finished; wait for it at the beginning and at the end only."""
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # as Lightning has divided it
        if len(self._losses) in (self.warm_up, self.warm_up + self.steps):
            self._losses[-1].item()
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of all steps that are measured."""
        return self._times[1] - self._times[0]

    @property
    def losses(self) -> list[float]:
        """Of every step, those of the warm-up first."""
        return [float(loss) for loss in self._losses]


def build_method(name: str, task: Task, sizes: Sizes) -> Method:
    """Return a method at the paper's size, with random weights; phase two with a reasoner of its own."""
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
        method.setup = lambda stage: None  # type: ignore[method-assign]  # there is no dataset to fit them on
        return method
    classes = {"fine_tuning": FineTuning, "linear": Linear, "hyper": Hyper, "adr_pretraining": ADRPretraining}
    if name == "encoder_pretraining":
        return EncoderPretraining(encoder, head, caption_epochs=1, whole_epochs=1)  # captions, of all frames
    return classes[name](encoder, head)


def draw_texts(shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return ids and mask (..., L) of questions whose lengths are distributed as MSRVTT-QA's (mean 10, at most 31)."""
    lengths = torch.from_numpy(np.minimum(6 + generator.gamma(1.6, 2.5, shape), 31).astype(np.int64))
    mask = (torch.arange(int(lengths.max())) < lengths[..., None]).long()
    ids = torch.from_numpy(generator.integers(1000, VOCABULARY_WORDS, mask.shape)) * mask
    return ids, mask


def draw_batch(name: str, task: Task, sizes: Sizes) -> Any:
    """Return a batch at the paper's size; in pinned memory where there is a GPU."""
    generator = np.random.default_rng(0)
    size = max(2, sizes.batch // STEP_PARTS.get(task, 1))
    labels = torch.from_numpy(generator.integers(5 if task == "multiple_choice" else sizes.classes, size=size))
    places = torch.arange(size)
    batch: Any
    if name in ON_FEATURES or name == "cdc_mmpg_session":
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


def matrix_peak(device: torch.device, mode: Mode) -> float:
    """Return FLOP/s of a large square matrix product in a precision."""
    set_matmul(mode.matmul)
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=mode.dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def count_operations(method: Method, batch: Any) -> float:
    """Return the multiplications and additions of a training step for one sample, counted on the CPU for two."""

    def take_two(part: Any) -> Any:
        if isinstance(part, tuple):
            return type(part)(*map(take_two, part))
        return part[:2] if isinstance(part, Tensor) and len(part) == len(batch.labels) else part

    few = take_two(batch)
    method.cpu().train()
    with FlopCounterMode(display=False) as flops:
        if isinstance(method, EncoderPretraining):
            (method.captions_loss(few, training=True)[0] + method.anchors_loss(few)).backward()
        else:
            method._step(few, "train").backward()
    return flops.get_total_flops() / 2


def measure_training(name: str, task: Task, sizes: Sizes, mode: Mode) -> tuple[StepClock, dict[str, float]]:
    """Train a few steps, each of the batches that make up a step of the recipe.

    Returns:
        The clock, and the row: samples/s, milliseconds a step, TFLOP/s, GiB at the peak (0 without a GPU), first and
        last loss.
    """
    set_matmul(mode.matmul)
    seed_everything(0, verbose=False)
    method, batch = build_method(name, task, sizes), draw_batch(name, task, sizes)
    parts = STEP_PARTS.get(task, 1)
    clock = StepClock(parts * sizes.steps, parts * WARM_UP)
    trainer = Trainer(
        devices=1, max_epochs=1, precision=mode.precision, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=parts,
        default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches: Any = [batch] * (parts * (sizes.steps + WARM_UP))
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
    """Print a table; figures are of this machine, now, and belong side by side only within one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256, help="questions of a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--classes", type=int, default=1501)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    rows = [".".join(row) for row in BENCHMARK_ROWS]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--json", type=Path, help="write the figures there, too, after every row")
    options = parser.parse_args(arguments)
    protect_output()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    sizes = Sizes(
        options.batch_size, options.steps, options.classes, options.image_size, options.depth, options.compile
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peaks = {mode: matrix_peak(device, MODES[mode]) for mode in options.modes}
    found: dict[str, Any] = {"machine": machine, **sizes._asdict(), "peak TFLOP/s": {}, "rows": {}}
    found["peak TFLOP/s"] = {mode: peak / 1e12 for mode, peak in peaks.items()}
    table = Table(title=f"{machine}: steps of {sizes.batch}, 3 frames at {sizes.image}, {sizes.steps} steps")
    for column in ("method", "task", "precision", "samples/s", "ms", "TFLOP/s", "of the matrix product", "GiB", "loss"):
        table.add_column(column, justify="left" if column in ("method", "task", "precision") else "right")
    for row in options.rows:
        name, _, task = row.partition(".")
        for mode in options.modes:
            _, figures = measure_training(name, task, sizes, MODES[mode])
            figures["of the matrix product"] = figures["TFLOP/s"] * 1e12 / peaks[mode]
            found["rows"][f"{row}.{mode}"] = figures
            table.add_row(
                name, task, mode, f"{figures['samples/s']:,.0f}", f"{figures['ms']:.1f}", f"{figures['TFLOP/s']:.3f}",
                f"{figures['of the matrix product']:.1%}", f"{figures['GiB']:.1f}",
                f"{figures['first loss']:.3f} to {figures['last loss']:.3f}",
            )  # fmt: skip
            if options.json:
                with atomic_write(options.json) as file:
                    file.write(json.dumps(found, indent=1).encode())
    Console(width=130).print(table)
    return 0
