"""Benchmark of a deployment on this machine: the service, the device, the swap of a layer, a generator on a GPU.

`cdc-mmpg benchmark OF=deployment` prints tables; with `--bundles`, it measures the bundles of that export and writes
`benchmark.json` into its folder. Compared variants take turns, so that noise affects both: compare figures only within
one run. The parts are in `service`, `device` and `generator`; this module calls them and measures file sizes.
"""

import argparse
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cdc_mmpg.benchmarks.device import (
    GOAL_SWAP_MILLISECONDS,
    compare_encoders,
    make_encoder_table,
    make_swap_table,
    time_swaps,
)
from cdc_mmpg.benchmarks.generator import make_generator_table, measure_generator
from cdc_mmpg.benchmarks.render import Report, make_table
from cdc_mmpg.benchmarks.service import compare_services, make_hostile_table, make_service_table
from cdc_mmpg.cloud.model import read_cloud_bundle
from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle
from cdc_mmpg.deployment.export import export_untrained
from cdc_mmpg.device.model import read_bundle
from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import Adaptor, BasisFDA, LowRankFDA
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import describe_provenance, write_json
from cdc_mmpg.wire.messages import Layout, Versions

BENCHMARK_REPORT = "benchmark.json"
BUNDLE_FOLDERS = ("device", "device-int8", "cloud")
EXPERIMENTS = Path(__file__).parents[3] / "experiments"
PAPER_CONFIGURATIONS = [EXPERIMENTS / "methods/cdc_mmpg.yaml", EXPERIMENTS / "datasets/msrvtt.yaml"]
PARTIAL_LAYER_SIZE = 4  # rank of low_rank layers, and number of layers of the basis
DEVICE_AXES = 2
SERVED_KINDS = ("float32", "low_rank")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="speed and size of a deployment on this machine")
    parser.add_argument(
        "--bundles", type=Path, help="folder of an export; default: temporary bundles of the paper's size"
    )
    parser.add_argument("--seconds", type=float, default=2.5, help="seconds per load and server")
    options = parser.parse_args(arguments)
    log_to_terminal()
    exit_on_signals()
    return run_to_exit_code(partial(benchmark, options.bundles, options.seconds))


def benchmark(bundles: Path | None, seconds: float) -> None:
    """Run all measurements, print the tables, and write the report next to the bundles.

    Raises:
        CheckpointError: a bundle is missing or damaged.
        CDCError: a server does not start, or sends an invalid layer.
    """
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        if bundles is None:
            bundles = Path(scratch) / "deployment"
            console.print("writing bundles with random weights at the paper's size ...")
            export_untrained(PAPER_CONFIGURATIONS, bundles)
        clouds = prepare_cloud_bundles(bundles, Path(scratch))
        report: Report = {"machine": describe_machine(), "seconds": seconds}
        report["service"] = {kind: compare_services(clouds[kind], kind, seconds) for kind in SERVED_KINDS}
        console.print(make_service_table(report["service"]))
        console.print(make_hostile_table(report["service"]))
        report["device"] = compare_encoders(bundles, seconds)
        console.print(make_encoder_table(report["device"]))
        report["swap"] = {"goal_milliseconds": GOAL_SWAP_MILLISECONDS, "kinds": time_swaps(bundles, clouds, seconds)}
        console.print(make_swap_table(report["swap"]))
        report["bytes"] = count_file_bytes(bundles)
        console.print(make_size_table(report["bytes"]))
        report["generator"] = measure_generator(seconds)
        console.print(make_generator_table(report["generator"]))
        write_json({**report, **describe_provenance()}, bundles / BENCHMARK_REPORT)


def prepare_cloud_bundles(bundles: Path, scratch: Path) -> dict[str, Path]:
    """Return cloud bundles by kind of layer: the given one, and new low_rank and basis ones of the same size.

    Raises:
        CheckpointError: a bundle is missing or damaged, or bundles are from different exports.
    """
    for folder in BUNDLE_FOLDERS[:2]:
        settings = read_bundle(bundles / folder)
    layout = Layout(*settings["layout"])

    versions = read_cloud_bundle(bundles / "cloud").versions
    if versions != Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"])):
        raise CheckpointError(f"{bundles}: the bundles are not from the same export: export again")
    torch.manual_seed(0)
    low_rank = LowRankFDA(layout.columns - 1, layout.outputs, PARTIAL_LAYER_SIZE)
    torch.nn.init.normal_(low_rank.hyper.weight, std=0.01)  # the residual starts at zero
    adaptors: dict[str, Adaptor] = {
        "low_rank": low_rank,
        "basis": BasisFDA(layout.columns - 1, layout.outputs, PARTIAL_LAYER_SIZE),
    }
    for kind, adaptor in adaptors.items():
        write_cloud_bundle(Generator(DeviceAxes(DEVICE_AXES), adaptor).eval(), versions.encoder, kind, scratch / kind)
    return {"float32": bundles / "cloud", **{kind: scratch / kind for kind in adaptors}}


def describe_machine() -> Report:
    """Describe this machine and its number of threads."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "processors": count_processors(),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),  # also in the servers
        "servers": "one process each; plain: as many threads as Starlette takes (40)",
    }


def count_file_bytes(bundles: Path) -> dict[str, dict[str, int]]:
    """Return the sizes of all files in bytes, by bundle."""
    return {
        folder: {path.name: path.stat().st_size for path in sorted((bundles / folder).iterdir()) if path.is_file()}
        for folder in BUNDLE_FOLDERS
    }


def make_size_table(sizes: Mapping[str, Mapping[str, int]]) -> Table:
    """Return a table of the file sizes."""
    names = sorted({name for files in sizes.values() for name in files})
    table = make_table("sizes, MB", ["file"], list(sizes))
    for name in names:
        table.add_row(name, *(f"{files[name] / 1e6:.3f}" if name in files else "" for files in sizes.values()))
    table.add_section()
    table.add_row("total", *(f"{sum(files.values()) / 1e6:.3f}" for files in sizes.values()))
    return table
