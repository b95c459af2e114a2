"""Benchmark of the service: relative to a plain endpoint under the same load, and with hostile clients.

- `cdc_mmpg.cloud` against `plain_service`, an endpoint that answers each request separately: the same signed layers,
  without batches, limits, timeouts or a log;
- throughput and latency of good clients beside 300 slow bodies and 300 slow headers, and of ten times as many clients
  on new connections as the service has places.
"""

import gc
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse, Response
from rich.table import Table

from cdc_mmpg.benchmarks.hostile_load import ask_many, find_local_addresses, hold_slow_clients
from cdc_mmpg.benchmarks.load import VERIFY_EVERY, ExpectedLayer, LoadOutcome, measure_load
from cdc_mmpg.benchmarks.render import Report, make_table
from cdc_mmpg.cloud.app import OCTET_STREAM
from cdc_mmpg.cloud.limits import DEFAULT_PLACES, raise_file_limit
from cdc_mmpg.cloud.model import generate_layer, load_model, read_cloud_bundle
from cdc_mmpg.deployment.local import LocalServer, LocalService
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.wire.messages import LAYER_PATH, decode_layer, decode_upload, encode_upload

BUNDLE_VARIABLE = "CDC_MMPG_PLAIN"  # environment variable with the bundle for `plain_service`
CONCURRENT_CLIENTS = (1, 8, 64)
TURNS = 2  # turns of each server at each concurrency
LEAD_SECONDS = 3.0  # time until all slow clients are connected
DIFFERENT_UPLOADS = 256  # number of distinct uploads
GOOD_CLIENTS = 8  # clients beside the slow ones, on new connections
SLOW_CLIENTS = 300  # clients with slow bodies, and as many with slow headers
OVERLOAD_FACTOR = 10  # concurrent clients under overload, as a multiple of the service's places
SOURCE_ADDRESSES = 20  # number of client addresses under overload
GOAL_P99_SECONDS = 1.0  # goal for the 99th percentile latency of served requests under overload


def plain_service() -> "FastAPI":
    """Return the baseline application: one forward pass and one reply per request."""
    served = load_model(Path(os.environ[BUNDLE_VARIABLE]))
    api = FastAPI(openapi_url=None)

    @api.post(LAYER_PATH, response_class=Response)
    def layer(content: Annotated[bytes, Body(media_type=OCTET_STREAM)]) -> Response:
        upload = decode_upload(content, served.layouts, served.versions)
        return Response(generate_layer(served, content, upload), media_type=OCTET_STREAM)

    @api.get("/ready")
    def ready() -> JSONResponse:
        return JSONResponse({"status": "ready"})

    return api


@contextmanager
def start_servers(bundle: Path) -> Iterator[dict[str, int]]:
    """Run the service and the plain endpoint, one process each, during the block; yield their ports by name.

    Raises:
        CDCError: a server does not become ready; with the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = [sys.executable, "-m", "uvicorn", f"{__name__}:plain_service", "--factory", "--no-access-log"]
        servers = {
            "service": LocalService(bundle, Path(folder) / "service"),
            "plain": LocalServer(
                "the plain endpoint", plain, Path(folder) / "plain", environment={BUNDLE_VARIABLE: str(bundle)}
            ),
        }
        try:
            for server in servers.values():
                server.begin()
            for server in servers.values():
                server.wait_until_ready()
            yield {name: server.port for name, server in servers.items()}
        finally:
            for server in servers.values():  # signal all before waiting for any, so that they stop in parallel
                server.send_signal()
            for server in servers.values():
                server.stop()


def compare_services(bundle: Path, kind: str, seconds: float) -> Report:
    """Measure service and plain endpoint under the same loads by concurrency, and the service with hostile clients."""
    settings = read_cloud_bundle(bundle)
    layouts = Generator.load(bundle / "generator.safetensors").layouts()
    layout = next(layout for layout in layouts if layout.kind == kind)
    expected = ExpectedLayer(layout, settings.versions, settings.key.public_key())
    features = np.tanh(np.random.default_rng(0).standard_normal((DIFFERENT_UPLOADS, FEATURE_DIM))).astype(np.float32)
    uploads = [encode_upload(feature, layout, settings.versions) for feature in features]
    report: Report = {"weights": settings.weights, "bytes": layout.message_bytes, "concurrency": {}}
    with start_servers(bundle) as ports, freeze_garbage():
        for concurrency in CONCURRENT_CLIENTS:
            turns: dict[str, list[LoadOutcome]] = {name: [] for name in ports}
            for _, (name, port) in itertools.product(range(TURNS), ports.items()):
                turns[name].append(measure_load(port, uploads, expected, concurrency, seconds / TURNS))
            figures = {name: combine_turns(loads) for name, loads in turns.items()}
            report["concurrency"][str(concurrency)] = {
                **figures,
                "ratio": compare_figures(figures["service"], figures["plain"]),
            }
        report["hostile"] = measure_hostile_clients(ports["service"], uploads, expected, seconds)
    return report


def measure_hostile_clients(port: int, uploads: Sequence[bytes], expected: ExpectedLayer, seconds: float) -> Report:
    """Measure the service for good clients, alone and beside slow ones, and under overload.

    Raises:
        CDCError: a layer is invalid.
    """
    raise_file_limit()
    sources = find_local_addresses(SOURCE_ADDRESSES)
    good = partial(ask_many, port, ["127.0.0.1"], uploads, GOOD_CLIENTS, seconds)
    outcomes = {"good clients alone": good()}
    with hold_slow_clients(port, sources, SLOW_CLIENTS):
        time.sleep(min(seconds, LEAD_SECONDS))  # until all are connected
        outcomes[f"beside {SLOW_CLIENTS} slow bodies and {SLOW_CLIENTS} slow headers"] = good()
    crowd = OVERLOAD_FACTOR * DEFAULT_PLACES
    outcomes[f"{crowd:,} clients at once"] = ask_many(port, sources, uploads, crowd, seconds)
    report: Report = {}
    for name, outcome in outcomes.items():
        for upload, reply in itertools.islice(outcome.layers.items(), VERIFY_EVERY):
            decode_layer(reply, upload, expected.layout, expected.versions, expected.key)
        times = outcome.milliseconds or [float("nan")]
        report[name] = {
            "served": len(outcome.milliseconds),
            "refused": outcome.refused,
            "lost": outcome.lost,
            "served_share": outcome.served_share,
            "served_per_second": len(outcome.milliseconds) / outcome.seconds,
            "refused_per_second": outcome.refused / outcome.seconds,
            "p50_milliseconds": float(np.percentile(times, 50)),
            "p99_milliseconds": float(np.percentile(times, 99)),
            "load_average": os.getloadavg()[0],  # shows other work on this machine
        }
    return report


@contextmanager
def freeze_garbage() -> Iterator[None]:
    """Exempt existing objects from garbage collection in the block: a paused client would look like a slow server."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def combine_turns(loads: Sequence[LoadOutcome]) -> Report:
    """Combine the turns of a server into one set of figures."""
    times, seconds = (
        [milliseconds for load in loads for milliseconds in load.milliseconds],
        sum(load.seconds for load in loads),
    )
    batches = [load.batch for load in loads if load.batch is not None]
    return {
        "replies": len(times),
        "requests_per_second": len(times) / seconds,
        "p50_milliseconds": float(np.percentile(times, 50)),
        "p99_milliseconds": float(np.percentile(times, 99)),
        "mean_batch": sum(batches) / len(batches) if batches else None,
        "client_processors": sum(load.processor for load in loads) / seconds,
    }


def compare_figures(service: Report, plain: Report) -> dict[str, float]:
    """Return the ratios of the service's figures to those of the plain endpoint."""
    return {name: service[name] / plain[name]
            for name in ("requests_per_second", "p50_milliseconds", "p99_milliseconds")}  # fmt: skip


def make_service_table(report: Report) -> Table:
    """Return a table of the figures of both servers."""
    table = make_table(
        "service: cdc_mmpg.cloud against a plain FastAPI endpoint",
        ["layer", "clients", "server"],
        ["requests/s", "p50 ms", "p99 ms", "mean batch", "client CPUs"],
    )
    for kind, figures in report.items():
        for concurrency, servers in figures["concurrency"].items():
            for name in ("service", "plain"):
                values = servers[name]
                table.add_row(
                    f"{kind}, {figures['bytes']:,} B",
                    concurrency,
                    name,
                    f"{values['requests_per_second']:,.1f}",
                    f"{values['p50_milliseconds']:.2f}",
                    f"{values['p99_milliseconds']:.2f}",
                    f"{values['mean_batch']:.1f}" if values["mean_batch"] is not None else "",
                    f"{values['client_processors']:.2f}",
                )
            ratio = [f"× {value:.2f}" for value in servers["ratio"].values()]
            table.add_row("", "", "service / plain", *ratio, "", "", end_section=True)
    return table


def make_hostile_table(report: Report) -> Table:
    """Return a table of the figures with hostile clients."""
    table = make_table(
        f"hostile clients, on new connections from {SOURCE_ADDRESSES} addresses; goal: none lost, "
        f"p99 {GOAL_P99_SECONDS:g} s",
        ["layer", "clients"],
        ["served/s", "refused/s", "served", "lost", "p50 ms", "p99 ms", "load"],
    )
    for kind, figures in report.items():
        for name, values in figures["hostile"].items():
            table.add_row(
                kind,
                name,
                f"{values['served_per_second']:,.0f}",
                f"{values['refused_per_second']:,.0f}",
                f"{values['served_share']:.0%}",
                str(values["lost"]),
                f"{values['p50_milliseconds']:.0f}",
                f"{values['p99_milliseconds']:.0f}",
                f"{values['load_average']:.1f}",
            )
        table.add_section()
    return table
