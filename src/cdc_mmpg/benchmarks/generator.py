"""Benchmark of the paper's generator on a GPU by batch size, relative to the time of reading its weights."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table

from cdc_mmpg.benchmarks.render import Report, make_table
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.fda import FDA
from cdc_mmpg.models.generator import Generator

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GENERATOR_OUTPUTS, GENERATOR_INPUTS = 1501, 96  # last layer of the paper's MSRVTT-QA


def measure_generator(seconds: float) -> Report | None:
    """Measure the paper's generator for MSRVTT-QA on a GPU, by batch size; return None without a GPU.

    `host` is the service's way: copy uploads to the GPU, and layers back into pageable memory. `pinned` copies layers
    back into pinned memory, which the GPU writes directly. `device` is the generator alone, timed by CUDA events.
    """
    if not torch.cuda.is_available():
        return None

    generator = (
        Generator(ADR(), FDA(GENERATOR_INPUTS, GENERATOR_OUTPUTS, "hyperfan_in", project=True))
        .requires_grad_(False)
        .eval()
    )
    generator.round_weights()
    generator.cuda()
    hyper: Any = generator.adaptor.hyper
    weights = sum(value.numel() * value.element_size() for value in hyper.parameters())
    bandwidth = measure_copy_bandwidth()
    read = 1000 * weights / bandwidth
    report: Report = {
        "name": torch.cuda.get_device_name(),
        "weights": "bfloat16",
        "weight_bytes": weights,
        "copy_bytes_per_second": bandwidth,
        "read_milliseconds": read,
        "batches": {},
    }
    with torch.inference_mode():
        for batch in BATCH_SIZES:
            # All variants of a batch size take turns, so that noise affects them equally.
            times = time_batch(generator, batch, seconds / 3)
            figures: Report = {}
            for way, milliseconds in times.items():
                mean = float(np.mean(milliseconds))
                figures[way] = {
                    "batches_per_second": 1000 / mean,
                    "requests_per_second": 1000 * batch / mean,
                    "p50_milliseconds": float(np.percentile(milliseconds, 50)),
                    "p99_milliseconds": float(np.percentile(milliseconds, 99)),
                    "runs": len(milliseconds),
                }
            figures["read_ratio"] = figures["device"]["p50_milliseconds"] / read
            report["batches"][str(batch)] = figures
    return report


def measure_copy_bandwidth() -> float:
    """Return the GPU's memory bandwidth in bytes per second, reads plus writes, in a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):  # the first ones warm up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return 2 * source.numel() / (best / 1000)


def time_batch(generator: "Generator", batch: int, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of a batch of float32 layers in three variants that take turns; at least 20 runs each."""
    uploads = torch.rand(batch, FEATURE_DIM) * 2 - 1
    gpu_uploads = uploads.cuda()
    pinned_layers = torch.empty(batch, GENERATOR_OUTPUTS, GENERATOR_INPUTS + 1, pin_memory=True)

    def time_run(run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    def run_host() -> None:
        generator(uploads.cuda())[0].cpu().numpy()

    def run_pinned() -> None:
        pinned_layers.copy_(generator(uploads.cuda())[0], non_blocking=True)

    def time_device() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        generator(gpu_uploads)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    ways: dict[str, Callable[[], float]] = {"host": partial(time_run, run_host),
                                            "pinned": partial(time_run, run_pinned), "device": time_device}  # fmt: skip
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5):  # warm-up: selects kernels and allocates memory
        for run in ways.values():
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["device"]) < 20:
        for way, run in ways.items():
            times[way].append(run())
    return times


def make_generator_table(report: Report | None) -> Table | str:
    """Return a table of the figures, or a text that explains their absence."""
    if report is None:
        return "generator on a GPU: not measured, no GPU available"
    table = make_table(
        f"generator of {GENERATOR_OUTPUTS:,} answers on {report['name']}, bfloat16: "
        f"{report['weight_bytes'] / 1e6:.1f} MB of weights, read in {report['read_milliseconds']:.4f} ms at "
        f"{report['copy_bytes_per_second'] / 1e12:.2f} TB/s",
        [],
        ["batch", "batches/s", "requests/s", "host p50 ms", "p99", "pinned p50 ms", "p99", "device p50 ms", "p99",
         "device / read"],
    )  # fmt: skip
    for batch, figures in report["batches"].items():
        table.add_row(
            batch,
            f"{figures['host']['batches_per_second']:,.1f}",
            f"{figures['host']['requests_per_second']:,.0f}",
            *(f"{figures[way][name]:.3f}" for way in ("host", "pinned", "device")
              for name in ("p50_milliseconds", "p99_milliseconds")),
            f"× {figures['read_ratio']:.2f}",
        )  # fmt: skip
    return table
