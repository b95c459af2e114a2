"""The time delay of the paper's Table 6 on a real socket: what a request for a layer takes beyond dividing by a rate.

A cloud service and a client, both real processes, stand in two network namespaces whose link passes 5, 15, 50 or 100
MiB/s; where those cannot be had, on two sides of a throttling proxy on the loopback device. The generators have the
paper's sizes and random weights: the delay depends on bytes. Written are `delay.json` and `delay.md`, whose columns
`delay_cells` explains.

A second, short series has 20 ms of delay each way: there round trips count. Packets are held back between two TUN
devices, so that both ends speak TCP to each other; netem, which does the same, is missing in many kernels. A third
has a whole answer of the device client, stage by stage, for every run of the dataset that was exported.
"""

import argparse
import csv
import logging
import platform
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cdc_mmpg.benchmarks.delay_cells import (
    ANSWER_STAGES,
    DELAY_CASES,
    FAR_DELAY_SECONDS,
    FAR_RATE,
    LINK_RATES,
    PAUSE_SECONDS,
    DelayCase,
    summarise_cell,
)
from cdc_mmpg.benchmarks.delay_client import Client
from cdc_mmpg.benchmarks.delay_tables import format_page, print_tables
from cdc_mmpg.benchmarks.links import (
    CONGESTION,
    FRAME_BYTES,
    Link,
    LinkCounts,
    Loopback,
    Namespaces,
    Network,
    read_tcp_settings,
)
from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle
from cdc_mmpg.deployment.local import LocalService
from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import provenance, write_json
from cdc_mmpg.wire.messages import LayerKind, Versions

logger = logging.getLogger("cdc_mmpg.benchmarks.delay")  # also as a program

DELAY_JSON, DELAY_PAGE = "delay.json", "delay.md"
CELL_REQUESTS = 30
ENCODER_DIGEST = bytes(range(16))  # of no encoder: only generators are made


class ExportedDevice(NamedTuple):
    """A run's device bundle, and what it is asked."""

    name: str  # <method>/<bundle>
    bundle: Path
    video: Path
    question: str


class RunningService(NamedTuple):
    """A service that is ready, and what its layers have to be."""

    case: DelayCase
    port: int
    versions: Versions
    public_key: bytes
    key: str  # of the client


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="the time delay of the paper's Table 6, on a real socket")
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>: delay.json and delay.md are written there")
    parser.add_argument("--requests", type=int, default=CELL_REQUESTS, help="a cell")
    parser.add_argument(
        "--congestion", default=CONGESTION, help=f"TCP's congestion control in the namespaces; default {CONGESTION}"
    )
    parser.add_argument("--proxy", action="store_true", help="a proxy on the loopback device, no network namespaces")
    options = parser.parse_args(arguments)
    log_to_terminal()
    leave_on_signals()
    return exit_code(lambda: write_delay(options.folder, options.requests, options.proxy, options.congestion))


def write_delay(folder: Path, requests: int, proxy: bool, congestion: str = CONGESTION) -> None:
    """Measure, print and write.

    Args:
        folder: of a dataset's runs.
        requests: a cell.
        proxy: even where there could be namespaces.
        congestion: TCP's congestion control in these.

    Raises:
        ConfigError: there is no place for the folder, or nothing to measure.
        CDCError: see `measure_delay`; or a file cannot be written.
    """
    if requests < 1:
        raise ConfigError(f"--requests {requests}: at least 1")
    if not folder.is_dir():
        if folder.exists() or not folder.absolute().parent.is_dir():
            raise ConfigError(f"{folder}: not a folder, nor could it be one: checkpoints/<dataset> is due")
        try:
            folder.mkdir()
        except OSError as error:
            raise CDCError(f"{folder}: cannot be made ({error.strerror or error})") from error
    with ExitStack() as stack:
        network, why = choose_network(stack, proxy, congestion)
        result = measure_delay(DELAY_CASES, LINK_RATES, requests, network, why, find_exported_devices(folder))
    print_tables(result)
    write_json(result, folder / DELAY_JSON)
    with atomic_write(folder / DELAY_PAGE) as file:
        file.write(format_page(result).encode())
    print(f"{folder / DELAY_JSON}, {folder / DELAY_PAGE}: {result['seconds']:.0f} s")


def choose_network(stack: ExitStack, proxy: bool, congestion: str = CONGESTION) -> tuple[Network, str]:
    """Return the network, which lasts until the stack ends, and why it is no better one.

    Raises:
        ConfigError: the kernel has no such congestion control.
    """
    if proxy:
        return Loopback(), ""
    known = read_tcp_settings([]).get("tcp_available_congestion_control", "").split()
    if known and congestion not in known:
        raise ConfigError(f"--congestion {congestion}: this kernel has {', '.join(known)}")
    try:
        return stack.enter_context(Namespaces(congestion)), ""
    except CDCError as error:
        logger.warning("no network namespaces, a proxy instead: %s", error)
        return Loopback(), str(error)


def measure_delay(
    cases: Sequence[DelayCase],
    rates: Sequence[int],
    requests: int,
    network: Network,
    why: str = "",
    bundles: Sequence[ExportedDevice] = (),
) -> dict[str, Any]:
    """Measure all cells over a network and return what `delay.json` says.

    Args:
        cases: the generators.
        rates: MiB/s.
        requests: a cell.
        network: where service and client stand.
        why: it is the proxy, "" where nothing kept from namespaces.
        bundles: of devices whose whole answers are measured.

    Raises:
        CDCError: see `start_services` and `measure_cell`.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, start_services(cases, network, Path(scratch)) as (client, services):
        cells, far = [], []
        for rate in rates:
            for service in services:
                for kind in service.case.kinds:
                    with network.link(service.port, rate, 0.0) as link:
                        cells.append(measure_cell(client, service, kind, link, rate, requests))
            logger.info("%d MiB/s: %d cells", rate, sum(cell["rate_mib_s"] == rate for cell in cells))
        for service in (services[0], *(other for other in services[1:] if other.case.native == "low_rank")):
            with network.link(service.port, FAR_RATE, FAR_DELAY_SECONDS) as link:
                for connection in ("each", "idle", "kept"):
                    few = max(2, requests // 3)
                    far.append(measure_cell(client, service, service.case.kinds[0], link, FAR_RATE, few, connection))
        answers = measure_answers(client, network, bundles, requests, Path(scratch))
        return {
            "answers": answers,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(),
            "machine": {"processor": read_processor_name(), "processors": count_processors(),
                        "kernel": platform.release(), **network.state()},
            "link": network.kind,
            "why": why,
            "weights": "random",
            "requests": requests,
            "rates_mib_s": list(rates),
            "cells": cells,
            "delay": {"seconds_each_way": FAR_DELAY_SECONDS, "rate_mib_s": FAR_RATE,
                      "link": "TUN" if network.kind == "namespaces" else "proxy", "cells": far},
            "seconds": time.perf_counter() - start,
        }  # fmt: skip


def write_random_bundles(cases: Sequence[DelayCase], folder: Path) -> list[tuple[Versions, bytes]]:
    """Write cloud bundles 0, 1, ... with random weights; return their versions and public keys."""
    torch.manual_seed(0)
    written = []
    for place, case in enumerate(cases):
        adaptor: Adaptor
        if case.native == "float32":
            adaptor = FDA(case.inputs, case.outputs, "hyperfan_in", project=True)
        else:
            adaptor = (LowRankFDA if case.native == "low_rank" else BasisFDA)(case.inputs, case.outputs, case.number)
        reader = ADR("small") if case.native == "float32" else DeviceAxes(2)
        cloud = write_cloud_bundle(
            Generator(reader, adaptor).eval(), ENCODER_DIGEST, f"random/{case.name}", folder / str(place)
        )
        written.append((cloud.versions, cloud.key.public_key().public_bytes_raw()))
    return written


@contextmanager
def begin_service(network: Network, bundle: Path, keys: Path, log: Path, name: str) -> Iterator[LocalService]:
    """Start a service on its side of the network, end it with the block; it is not ready yet."""
    options = ["--host", network.host, "--keys", str(keys)]
    prefix = network.command("server")
    service = LocalService(bundle, log, *options, name=f"the cloud service of {name}", prefix=prefix, own_session=True)
    try:
        service.begin()
        yield service
    finally:
        service.stop()


def wait_until_ready(service: LocalService, client: Client, network: Network) -> None:
    """Wait until the client reaches a service.

    Raises:
        CDCError: it does not come up.
    """
    service.wait_until_ready(lambda: bool(client.ask(ready=f"{network.direct(service.port)}/ready")))


@contextmanager
def start_services(
    cases: Sequence[DelayCase], network: Network, folder: Path
) -> Iterator[tuple[Client, list[RunningService]]]:
    """Start the services and a client, wait until all are ready, end them with the block.

    Raises:
        CDCError: one does not come up.
    """
    bundles = write_random_bundles(cases, folder)
    key, keys = secrets.token_hex(16), folder / "keys"
    keys.write_text(key)
    with ExitStack() as stack:
        services, running = [], []
        for place, (case, (versions, public_key)) in enumerate(zip(cases, bundles, strict=True)):
            log = folder / f"server{place}"
            service = stack.enter_context(begin_service(network, folder / str(place), keys, log, case.name))
            services.append(service)
            running.append(RunningService(case, service.port, versions, public_key, key))
        client = stack.enter_context(Client(network.command("client"), folder / "client"))
        for service in services:
            wait_until_ready(service, client, network)
        try:
            yield client, running
        finally:
            for service in services:  # together: each takes a moment
                service.ask_to_end()


def measure_cell(
    client: Client,
    service: RunningService,
    kind: LayerKind,
    link: Link,
    rate: int,
    requests: int,
    connection: str = "kept",
) -> dict[str, Any]:
    """Measure a cell (see `summarise_cell`) after one more request, which does not count.

    Args:
        client: it asks.
        service: it answers.
        kind: of the layers.
        link: between them.
        rate: of the link, MiB/s.
        requests: that count.
        connection: "kept" for one after the other, "idle" for a pause before each, "each" for a connection each.

    Raises:
        CDCError: packets larger than a frame passed, or some were dropped.
    """
    names = {name: value.hex() for name, value in service.versions._asdict().items()}
    command = {"url": link.url, "key": service.key, "public_key": service.public_key.hex(), **names,
               "layout": list(service.case.layout(kind))}  # fmt: skip
    client.ask(**command, requests=1, connection="new", pause=0)
    before = link.counts()
    pause = PAUSE_SECONDS if connection == "idle" else 0
    replies = client.ask(**command, requests=requests, connection=connection, pause=pause)
    passed = LinkCounts(*(after - then for after, then in zip(link.counts(), before, strict=True)))
    for count_bytes, packets in ((passed.up_bytes, passed.up_packets), (passed.down_bytes, passed.down_packets)):
        if packets and count_bytes / packets > FRAME_BYTES:
            raise CDCError(f"packets of {count_bytes / packets:.0f} bytes pass the link: offloads are on, and a token "
                           "bucket does not hold them back; --proxy measures without")  # fmt: skip
    figures = summarise_cell(service.case, kind, rate, replies, passed)
    return {**figures, "connection": connection}


def find_exported_devices(folder: Path) -> list[ExportedDevice]:
    """Find the open-ended runs of a dataset that were exported, each with a clip and a question of its test."""
    found = []
    for report in sorted(folder.glob("*/seed*/deployment/export.json")):
        run = report.parents[1]
        try:
            with (run / "predictions.test.csv").open(newline="", encoding="utf-8") as file:
                asked = next(csv.DictReader(file))
            clip = next(path for path in folder.glob(f"data/clips/YouTubeClips/{asked['clip']}.*"))
        except (OSError, ValueError, StopIteration, KeyError, csv.Error):
            continue
        for name in ("device", "device-int8"):
            found.append(ExportedDevice(f"{run.parent.name}/{name}", report.parent / name, clip, asked["question"]))
    return found


def measure_answers(
    client: Client, network: Network, bundles: Sequence[ExportedDevice], requests: int, folder: Path
) -> list[dict[str, Any]]:
    """Measure the stages of a device's answers at `FAR_RATE`, medians in milliseconds.

    Raises:
        CDCError: a service does not come up, or a layer did not come.
    """
    found = []
    keys = folder / "keys"
    for place, device in enumerate(bundles):
        log = folder / f"answers{place}"
        with begin_service(network, device.bundle.parent / "cloud", keys, log, device.name) as service:
            wait_until_ready(service, client, network)
            with network.link(service.port, FAR_RATE, 0.0) as link:
                replies = client.ask(device=str(device.bundle.absolute()), url=link.url, key=keys.read_text(),
                                     video=str(device.video.absolute()), question=device.question,
                                     requests=requests)  # fmt: skip
        stages = {stage: float(np.median([reply.get(stage, 0.0) for reply in replies])) for stage in ANSWER_STAGES}
        whole = [reply["whole"] for reply in replies]
        found.append({"name": device.name, "rate_mib_s": FAR_RATE, "stages_ms": stages,
                      "whole_p50_ms": float(np.percentile(whole, 50)), "whole_p99_ms": float(np.percentile(whole, 99)),
                      "requests": replies})  # fmt: skip
    return found


def read_processor_name() -> str:
    """Return the name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
