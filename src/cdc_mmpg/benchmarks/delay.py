"""The time delay of the paper's Table 6 on a real socket: time of a layer request, compared with bytes / rate.

A cloud service and a client run as processes in two network namespaces whose link has 5, 15, 50 or 100 MiB/s; if
namespaces are not available, a throttling proxy on the loopback device connects them. The generators have the paper's
sizes and random weights, since the delay depends only on bytes. The results are `delay.json` and `delay.md`;
`delay_cells` explains their columns.

A second, short series has 20 ms of delay each way, to show round trips. Packets are delayed between two TUN devices, so
that both ends speak TCP to each other; netem does the same, but is missing in many kernels. A third series measures a
complete answer of the device client by stage, for every exported run of the dataset.
"""

import argparse
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
    IDLE_PAUSE_SECONDS,
    LINK_RATES,
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
from cdc_mmpg.evaluation.answers import read_answers
from cdc_mmpg.files import atomic_write
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import PREDICTIONS, describe_provenance, write_json
from cdc_mmpg.training.wandb_record import Subject, start_record
from cdc_mmpg.wire.messages import LayerKind, Versions

logger = logging.getLogger("cdc_mmpg.benchmarks.delay")  # not `__name__`, which differs when run as a program

DELAY_JSON, DELAY_PAGE = "delay.json", "delay.md"
CELL_REQUESTS = 30  # number of measured requests per cell
ENCODER_DIGEST = bytes(range(16))  # placeholder: no encoder is created


class ExportedDevice(NamedTuple):
    """A run's device bundle with a clip and a question."""

    name: str  # <method>/<bundle>
    bundle: Path
    video: Path
    question: str


class RunningService(NamedTuple):
    """A service, with the data to verify its layers."""

    case: DelayCase
    port: int
    versions: Versions
    public_key: bytes
    key: str  # access key of the client


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="the time delay of the paper's Table 6, on a real socket")
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>, for delay.json and delay.md")
    parser.add_argument("--requests", type=int, default=CELL_REQUESTS, help="number of requests per cell")
    parser.add_argument(
        "--congestion", default=CONGESTION, help=f"TCP congestion control in the namespaces; default: {CONGESTION}"
    )
    parser.add_argument("--proxy", action="store_true", help="use a proxy on the loopback device, no namespaces")
    options = parser.parse_args(arguments)
    log_to_terminal()
    exit_on_signals()
    return run_to_exit_code(lambda: write_delay(options.folder, options.requests, options.proxy, options.congestion))


def write_delay(folder: Path, requests: int, proxy: bool, congestion: str = CONGESTION) -> None:
    """Measure the delay, print the tables, and write `delay.json` and `delay.md`.

    Args:
        folder: folder of a dataset's runs.
        requests: number of requests per cell.
        proxy: whether to use the proxy even if namespaces are available.
        congestion: TCP congestion control in the namespaces.

    Raises:
        ConfigError: the folder cannot exist, `requests` is below 1, or the congestion control is not available.
        CDCError: see `measure_delay`; or a file cannot be written.
    """
    if requests < 1:
        raise ConfigError(f"--requests {requests}: must be at least 1")
    if not folder.is_dir():
        if folder.exists() or not folder.absolute().parent.is_dir():
            raise ConfigError(f"{folder}: not a folder, and cannot be created: give checkpoints/<dataset>")
        try:
            folder.mkdir()
        except OSError as error:
            raise CDCError(f"{folder}: cannot be created ({error.strerror or error})") from error
    with ExitStack() as stack:
        network, reason = choose_network(stack, proxy, congestion)
        result = measure_delay(DELAY_CASES, LINK_RATES, requests, network, reason, find_exported_devices(folder))
    print_tables(result)
    write_json(result, folder / DELAY_JSON)
    with atomic_write(folder / DELAY_PAGE) as file:
        file.write(format_page(result).encode())
    print(f"{folder / DELAY_JSON}, {folder / DELAY_PAGE}: {result['seconds']:.0f} s")
    record_delay(folder, result)


def record_delay(folder: Path, result: dict[str, Any]) -> None:
    """Record a measurement in W&B: the cells as tables, and the median times of the device's answers."""
    config = {name: result[name] for name in ("machine", "link", "requests", "commit")}
    record = start_record(folder / "delay", Subject("delay", folder.absolute().name, "delay"), config)
    if record.run is None:
        return
    for name, cells in (("delay/cells", result["cells"]), ("delay/far", result["delay"]["cells"])):
        columns = [column for column in cells[0] if column != "requests"]
        record.log_table(name, columns, [[cell[column] for column in columns] for cell in cells])
    record.summarise({f"delay/{answer['name']}/p50_ms": answer["whole_p50_ms"] for answer in result["answers"]})
    record.end()


def choose_network(stack: ExitStack, proxy: bool, congestion: str = CONGESTION) -> tuple[Network, str]:
    """Return a network that lasts as long as the stack, and why it is the proxy, "" if this was chosen.

    Raises:
        ConfigError: the kernel does not have the congestion control.
    """
    if proxy:
        return Loopback(), ""
    known = read_tcp_settings([]).get("tcp_available_congestion_control", "").split()
    if known and congestion not in known:
        raise ConfigError(f"--congestion {congestion}: not available in this kernel, choose from {', '.join(known)}")
    try:
        return stack.enter_context(Namespaces(congestion)), ""
    except CDCError as error:
        logger.warning("network namespaces are not available, using a proxy: %s", error)
        return Loopback(), str(error)


def measure_delay(
    cases: Sequence[DelayCase],
    rates: Sequence[int],
    requests: int,
    network: Network,
    reason: str = "",
    bundles: Sequence[ExportedDevice] = (),
) -> dict[str, Any]:
    """Measure all cells over a network and return the content of `delay.json`.

    Args:
        cases: generators and kinds of layers to measure.
        rates: rates of the link in MiB/s.
        requests: number of requests per cell.
        network: network that connects service and client.
        reason: why namespaces are not available, "" if they are or the proxy was chosen.
        bundles: device bundles whose complete answers are measured.

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
                    count, kind = max(2, requests // 3), service.case.kinds[0]
                    far.append(measure_cell(client, service, kind, link, FAR_RATE, count, connection))
        answers = measure_answers(client, network, bundles, requests, Path(scratch))
        return {
            "answers": answers,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            **describe_provenance(),
            "machine": {"processor": read_processor_name(), "processors": count_processors(),
                        "kernel": platform.release(), **network.read_settings()},
            "link": network.kind,
            "why": reason,
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
    """Start a service on its side of the network without waiting until it is ready; stop it after the block."""
    options = ["--host", network.host, "--keys", str(keys)]
    prefix = network.command_prefix("server")
    service = LocalService(bundle, log, *options, name=f"the cloud service of {name}", prefix=prefix, own_session=True)
    try:
        service.begin()
        yield service
    finally:
        service.stop()


def wait_until_ready(service: LocalService, client: Client, network: Network) -> None:
    """Wait until the client reaches a service.

    Raises:
        CDCError: the service does not start.
    """
    service.wait_until_ready(lambda: bool(client.ask(ready=f"{network.direct_url(service.port)}/ready")))


@contextmanager
def start_services(
    cases: Sequence[DelayCase], network: Network, folder: Path
) -> Iterator[tuple[Client, list[RunningService]]]:
    """Start the services and a client, wait until all are ready, and stop them after the block.

    Raises:
        CDCError: a process does not start.
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
        client = stack.enter_context(Client(network.command_prefix("client"), folder / "client"))
        for service in services:
            wait_until_ready(service, client, network)
        try:
            yield client, running
        finally:
            for service in services:  # signal all before waiting for any, so that they stop in parallel
                service.send_signal()


def measure_cell(
    client: Client,
    service: RunningService,
    kind: LayerKind,
    link: Link,
    rate: int,
    requests: int,
    connection: str = "kept",
) -> dict[str, Any]:
    """Measure a cell (see `summarise_cell`), after one warm-up request.

    Args:
        client: client that sends the requests.
        service: service that answers them.
        kind: kind of the requested layers.
        link: link between client and service.
        rate: rate of the link in MiB/s.
        requests: number of measured requests.
        connection: "kept" to reuse one connection, "idle" to pause before each request, "each" for one per request.

    Raises:
        CDCError: packets larger than a frame passed the link.
    """
    names = {name: value.hex() for name, value in service.versions._asdict().items()}
    command = {"url": link.url, "key": service.key, "public_key": service.public_key.hex(), **names,
               "layout": list(service.case.layout(kind))}  # fmt: skip
    client.ask(**command, requests=1, connection="new", pause=0)
    before = link.counts()
    pause = IDLE_PAUSE_SECONDS if connection == "idle" else 0
    replies = client.ask(**command, requests=requests, connection=connection, pause=pause)
    passed = LinkCounts(*(after - then for after, then in zip(link.counts(), before, strict=True)))
    for count_bytes, packets in ((passed.up_bytes, passed.up_packets), (passed.down_bytes, passed.down_packets)):
        if packets and count_bytes / packets > FRAME_BYTES:
            raise CDCError(f"packets of {count_bytes / packets:.0f} bytes pass the link: offloading is enabled, so the "
                           "token bucket does not limit the rate; use --proxy")  # fmt: skip
    figures = summarise_cell(service.case, kind, rate, replies, passed)
    return {**figures, "connection": connection}


def find_exported_devices(folder: Path) -> list[ExportedDevice]:
    """Find the exported open-ended runs of a dataset, each with a clip and a question of its test set."""
    devices = []
    for report in sorted(folder.glob("*/seed*/deployment/export.json")):
        run = report.parents[1]
        try:
            asked = read_answers(run / PREDICTIONS).asked
            clip = next(path for path in folder.glob(f"data/clips/YouTubeClips/{asked['clip'][0]}.*"))
            question = asked["question"][0]
        except (OSError, ValueError, StopIteration, KeyError):
            continue
        for name in ("device", "device-int8"):
            devices.append(ExportedDevice(f"{run.parent.name}/{name}", report.parent / name, clip, question))
    return devices


def measure_answers(
    client: Client, network: Network, bundles: Sequence[ExportedDevice], requests: int, folder: Path
) -> list[dict[str, Any]]:
    """Measure the stages of a device's answers at `FAR_RATE`, as medians in milliseconds.

    Raises:
        CDCError: a service does not start, or a layer was not received.
    """
    answers = []
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
        answers.append({"name": device.name, "rate_mib_s": FAR_RATE, "stages_ms": stages,
                        "whole_p50_ms": float(np.percentile(whole, 50)),
                        "whole_p99_ms": float(np.percentile(whole, 99)), "requests": replies})  # fmt: skip
    return answers


def read_processor_name() -> str:
    """Return the name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
