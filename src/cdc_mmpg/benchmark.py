"""How fast each method trains at the paper's size, in float32 and in bfloat16, beside this machine's matrix product."""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from cdc_mmpg.batch import FeatureBatch, VideoTextBatch
from cdc_mmpg.methods.adr_pretraining import ADRPretraining
from cdc_mmpg.methods.base import Batch, Method
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.payloads import WIDTH
from cdc_mmpg.terminal import protect_output

WARM_UP = 5  # steps before the clock starts


class Clock(Callback):
    """Seconds of the steps after the warm-up, and all losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.started = 0.0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *others: Any) -> None:
        """Count after the device has finished."""
        self.losses.append(float(outputs["loss"]))  # waits for the device
        now = time.perf_counter()
        if len(self.losses) == WARM_UP:
            self.started = now
        self.seconds = now - self.started


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product here."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def measure(build: Callable[[], Method], batch: Batch, steps: int, precision: Any) -> tuple[Clock, float, float]:
    """The clock of a run, its FLOP per step, and its peak memory in GiB (0 without a GPU)."""
    seed_everything(0, verbose=False)
    method, clock = build(), Clock()
    trainer = Trainer(
        max_epochs=1,
        precision=precision,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    batches: Any = [batch] * (steps + WARM_UP)
    trainer.fit(method, DataLoader(batches, batch_size=None))
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    few: list[Any] = [None if part is None else part[:2] for part in batch]
    with FlopCounterMode(display=False) as flops:
        method.cpu()._step(type(batch)(*few), "train").backward()
    return clock, flops.get_total_flops() / 2 * len(batch.labels), memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; figures are of this machine, now, and belong side by side only within one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--classes", type=int, default=1501)
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    options = parser.parse_args(arguments)
    protect_output()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    size, generator = options.batch_size, torch.Generator().manual_seed(0)
    labels, indices = torch.randint(options.classes, (size,), generator=generator), torch.arange(size)
    frames = torch.randint(256, (size, 3, 224, 224, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1000, 30_000, (size, 12), generator=generator)
    clips = VideoTextBatch(frames, ids, torch.ones_like(ids), labels, indices)
    kept = FeatureBatch(torch.randn(size, 3, WIDTH, generator=generator), labels, indices)

    with tempfile.TemporaryDirectory() as folder:
        adr = Path(folder) / "adr.safetensors"
        ADR("paper_qa").save(adr)

        def parts() -> tuple[AllInOne, OpenEnded]:
            return AllInOne(), OpenEnded(options.classes)

        methods: dict[str, tuple[Callable[[], Method], Batch]] = {
            "fine_tuning": (lambda: FineTuning(*parts()), clips),
            "cdc_mmpg": (lambda: CDCMMPG(*parts(), adr=str(adr)), clips),
            "linear, kept features": (lambda: Linear(*parts()), kept),
            "hyper, kept features": (lambda: Hyper(*parts()), kept),
            "adr_pretraining, kept features": (lambda: ADRPretraining(*parts()), kept),
        }
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        table = Table(title=f"{name}: batch {size}, 3 frames at 224, {options.classes} answers, {options.steps} steps")
        columns = (
            "method",
            "precision",
            "samples/s",
            "TFLOP/s",
            "of the matrix product",
            "GiB",
            "first loss",
            "last loss",
        )
        for column in columns:
            table.add_column(column, justify="left" if column in ("method", "precision") else "right")
        for precision in options.precisions:
            peak = matrix_peak(device, torch.bfloat16 if "bf16" in precision else torch.float32)
            for method, (build, batch) in methods.items():
                clock, flops, memory = measure(build, batch, options.steps, precision)
                rate = flops * options.steps / clock.seconds
                table.add_row(
                    method,
                    precision,
                    f"{size * options.steps / clock.seconds:,.0f}",
                    f"{rate / 1e12:.3f}",
                    f"{rate / peak:.1%}",
                    f"{memory:.1f}",
                    f"{clock.losses[0]:.4f}",
                    f"{clock.losses[-1]:.4f}",
                )
    Console(width=130).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
