"""The time delay of the paper's Table 6 on a real socket: what a request for a layer takes beyond dividing by a rate.

A cloud service and a client, both real processes, stand in two network namespaces whose link passes 5, 15, 50 or 100
MiB/s; where those cannot be had, on two sides of a throttling proxy on the loopback device. The generators have the
paper's sizes and random weights: the delay depends on bytes. Written are `delay.json` and `delay.md`.

    payload     bytes of the layer's numbers; the paper's delay is these by the rate, 768 up and these down
    whole       from the first byte of the request to the last of the reply, at the client
    compute     of these what the service says that it generated and waited
    transfer    the others: the link, HTTP, TCP, the processes
    floor       the bytes that the kernel counted on the link, with every header and acknowledgement, by the rate

A third has a whole answer of the device client, stage by stage, for every run of the dataset that was exported.

A second, short series has 20 ms of delay each way: there round trips count. Packets are held back between two TUN
devices, so that both ends speak TCP to each other; netem, which does the same, is missing in many kernels.
"""

import argparse
import csv
import json
import logging
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cdc_mmpg.benchmarks.links import (
    CONGESTION,
    FRAME_BYTES,
    MIB,
    Counts,
    Link,
    Loopback,
    Namespaces,
    Network,
    tcp_settings,
    unstoppable,
)
from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import provenance, write_json
from cdc_mmpg.wire.messages import PATH, UPLOAD_BYTES, Kind, Layout, Versions, decode_layer, encode_upload
from cdc_mmpg.wire.payloads import WIDTH

logger = logging.getLogger("cdc_mmpg.delay")  # also as a program

RESULT, PAGE = "delay.json", "delay.md"
RATES = (5, 15, 50, 100)  # MiB/s
DELAY_RATE = 15  # MiB/s, of the series with delay
DELAY_SECONDS = 0.02  # each way
REQUESTS = 30  # a cell
ENCODER = bytes(range(16))  # digest of an encoder that there is not
READY_SECONDS = 30
REQUEST_SECONDS = 60
STOP_SECONDS = 10  # between asking a process to end and killing it
IDLE_SECONDS = 0.5  # more than TCP's timeout, after which a window may shrink

TIMING = re.compile(r"(\w+);dur=([\d.]+)")


class Case(NamedTuple):
    """A generator, and what is asked of it."""

    name: str
    outputs: int
    inputs: int = 96
    native: Kind = "float32"
    number: int = 0  # the rank, or how many layers the basis has
    kinds: tuple[Kind, ...] = ("float32",)

    def layout(self, kind: Kind) -> Layout:
        """Of a layer that is asked for."""
        return Layout(kind, self.outputs, self.inputs + 1, self.number if kind == self.native else 0)


CASES = (
    Case("msrvtt_qa", 1501, kinds=("float32", "float16", "int8")),
    Case("msvd_qa", 1001),
    Case("tgif", 1541),
    Case("multiple choice", 1, 192),
    Case("msrvtt_qa", 1501, native="low_rank", number=4, kinds=("low_rank",)),
    Case("msrvtt_qa", 1501, native="basis", number=8, kinds=("basis",)),
)


class Exported(NamedTuple):
    """A run's device bundle, and what it is asked."""

    name: str  # <method>/<bundle>
    bundle: Path
    video: Path
    question: str


STAGES = ("decode", "encode", "anchor", "upload", "generate", "download", "verify", "swap", "answer")


class Served(NamedTuple):
    """A service that runs."""

    case: Case
    port: int
    versions: Versions
    public_key: bytes
    key: str  # of the client


def division_ms(count_bytes: int, rate: float) -> float:
    """The paper's delay: bytes by MiB/s."""
    return 1000 * count_bytes / (rate * MIB)


def server_ms(timing: str) -> dict[str, float]:
    """What a `Server-Timing` header says, by name."""
    return {name: float(value) for name, value in TIMING.findall(timing)}


def cell(case: Case, kind: Kind, rate: int, replies: Sequence[dict[str, float]], passed: Counts) -> dict[str, Any]:
    """What the requests for one kind of layer over one link come to; milliseconds.

    Args:
        case: the generator.
        kind: of the layer.
        rate: MiB/s of the link.
        replies: "whole", "compute" and "verify" of each request.
        passed: by the link meanwhile.
    """
    layout = case.layout(kind)
    whole, compute, verify = (np.array([reply[name] for reply in replies]) for name in ("whole", "compute", "verify"))
    up, down = passed.up_bytes / len(replies), passed.down_bytes / len(replies)
    floor = 1000 * (up + down) / (rate * MIB)
    transfer = float(np.median(whole - compute))
    return {
        "case": case.name,
        "kind": kind,
        "outputs": case.outputs,
        "rate_mib_s": rate,
        "payload_bytes": layout.payload_bytes,
        "message_bytes": layout.message_bytes,
        "upload_bytes": UPLOAD_BYTES,
        "link_up_bytes": up,
        "link_down_bytes": down,
        "link_packets": (passed.up_packets + passed.down_packets) / len(replies),
        "dropped": passed.dropped,
        "paper_up_ms": division_ms(4 * WIDTH, rate),
        "paper_down_ms": division_ms(layout.payload_bytes, rate),
        "floor_ms": floor,
        "whole_p50_ms": float(np.percentile(whole, 50)),
        "whole_p99_ms": float(np.percentile(whole, 99)),
        "compute_ms": float(np.median(compute)),
        "transfer_ms": transfer,
        "verify_ms": float(np.median(verify)),
        "transfer_by_floor": transfer / floor,
        "requests": list(replies),
    }


@contextmanager
def process(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process while a block runs, away from the terminal's signals.

    Args:
        command: that begins it.
        log: where its standard error goes.
    """
    with log.open("ab") as file:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
        )
    try:
        yield started
    finally:
        with unstoppable():
            started.terminate()
            try:
                started.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            for pipe in (started.stdin, started.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


class Client:
    """The client's process, a JSON line each way.

    Args:
        running: see `process`.
        log: its standard error.
    """

    def __init__(self, running: "subprocess.Popen[str]", log: Path) -> None:
        self._running, self._log = running, log

    def ask(self, **command: Any) -> Any:
        """What it says to a command of `serve_client`.

        Raises:
            CDCError: it ended.
        """
        assert self._running.stdin is not None
        assert self._running.stdout is not None
        with suppress(BrokenPipeError):
            self._running.stdin.write(json.dumps(command) + "\n")
            self._running.stdin.flush()
        line = self._running.stdout.readline()
        if not line:
            raise CDCError(f"the client ended:\n{last_lines(self._log)}")
        return json.loads(line)


def last_lines(log: Path, number: int = 10) -> str:
    """Of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-number:])


def write_bundles(cases: Sequence[Case], folder: Path) -> list[tuple[Versions, bytes]]:
    """Cloud bundles 0, 1, ... with random weights; their versions and public keys."""
    import torch  # noqa: PLC0415  see `cli`

    from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle  # noqa: PLC0415
    from cdc_mmpg.models.adr import ADR  # noqa: PLC0415
    from cdc_mmpg.models.device_axes import DeviceAxes  # noqa: PLC0415
    from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA  # noqa: PLC0415
    from cdc_mmpg.models.generator import Generator  # noqa: PLC0415

    torch.manual_seed(0)
    found = []
    for place, case in enumerate(cases):
        adaptor: Adaptor
        if case.native == "float32":
            adaptor = FDA(case.inputs, case.outputs, "hyperfan_in", project=True)
        else:
            adaptor = (LowRankFDA if case.native == "low_rank" else BasisFDA)(case.inputs, case.outputs, case.number)
        reader = ADR("small") if case.native == "float32" else DeviceAxes(2)
        cloud = write_cloud_bundle(
            Generator(reader, adaptor).eval(), ENCODER, f"random/{case.name}", folder / str(place)
        )
        found.append((cloud.versions, cloud.key.public_key().public_bytes_raw()))
    return found


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def service(network: Network, bundle: Path, keys: Path, log: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The process and the port of a service that begins, while a block runs."""
    port = free_port()
    command = [*network.command("server"), sys.executable, "-m", "cdc_mmpg.cloud", str(bundle.absolute()),
               "--host", network.host, "--port", str(port), "--keys", str(keys)]  # fmt: skip
    with process(command, log) as running:
        yield running, port


def until_ready(
    client: Client, network: Network, running: "subprocess.Popen[str]", port: int, name: str, log: Path
) -> None:
    """Wait for a service.

    Raises:
        CDCError: it does not come up.
    """
    end = time.monotonic() + READY_SECONDS
    while not client.ask(ready=f"{network.direct(port)}/ready"):
        if (code := running.poll()) is not None or time.monotonic() > end:
            why = f"not ready after {READY_SECONDS} s" if code is None else f"exit code {code}"
            raise CDCError(f"the cloud service of {name} did not come up, {why}:\n{last_lines(log)}")
        time.sleep(0.05)


@contextmanager
def deployed(cases: Sequence[Case], network: Network, folder: Path) -> Iterator[tuple[Client, list[Served]]]:
    """Services that are ready and a client, while a block runs.

    Raises:
        CDCError: one does not come up.
    """
    bundles = write_bundles(cases, folder)
    key, keys = secrets.token_hex(16), folder / "keys"
    keys.write_text(key)
    with ExitStack() as stack:
        running, served = [], []
        for place, (case, (versions, public_key)) in enumerate(zip(cases, bundles, strict=True)):
            log = folder / f"server{place}"
            began, port = stack.enter_context(service(network, folder / str(place), keys, log))
            running.append(began)
            served.append(Served(case, port, versions, public_key, key))
        command = [*network.command("client"), sys.executable, "-m", "cdc_mmpg.delay", "--client"]
        client = Client(stack.enter_context(process(command, folder / "client")), folder / "client")
        for place, (own, started) in enumerate(zip(served, running, strict=True)):
            until_ready(client, network, started, own.port, own.case.name, folder / f"server{place}")
        try:
            yield client, served
        finally:
            for started in running:  # together: each takes a moment
                started.terminate()


def serve_client() -> int:
    """The client: commands come in as lines of JSON, and so do the answers go out; until the input ends.

    {"ready": url} -> whether that says 200. {"url", "key", "encoder", "generator", "public_key", "layout", "requests",
    "connection", "pause"} -> a list of {"whole", "compute", "verify"}, milliseconds; connection is "new" for one that
    is kept for what follows, "kept", or "each" for a new one for every request; before each are so many seconds' pause.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # the link is what is measured
    probe, connection = (httpx2.Client(trust_env=False, timeout=1) for _ in range(2))
    for line in sys.stdin:
        command = json.loads(line)
        if url := command.get("ready"):
            try:
                said: Any = probe.get(url).status_code == 200
            except httpx2.TransportError:
                said = False
        elif bundle := command.get("device"):
            said = answered(Path(bundle), command["url"], command["key"], Path(command["video"]), command["question"],
                            command["requests"])  # fmt: skip
        else:
            layout, key = Layout(*command["layout"]), Ed25519PublicKey.from_public_bytes(
                bytes.fromhex(command["public_key"])
            )  # fmt: skip
            versions = Versions(bytes.fromhex(command["encoder"]), bytes.fromhex(command["generator"]))
            headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity",
                       "Authorization": f"Bearer {command['key']}"}  # fmt: skip
            said = []
            for number in range(command["requests"]):
                if command["connection"] == "each" or (command["connection"] == "new" and number == 0):
                    connection.close()
                    connection = httpx2.Client(headers=headers, trust_env=False, timeout=REQUEST_SECONDS)
                time.sleep(command["pause"])
                said.append(_request(connection, command["url"] + PATH, layout, versions, key))
        print(json.dumps(said), flush=True)
    return 0


def answered(bundle: Path, url: str, key: str, video: Path, question: str, requests: int) -> list[dict[str, float]]:
    """A device's stages in milliseconds, and the "whole" answer, each with a layer of its own; after one more.

    Raises:
        CDCError: a layer did not come.
    """
    from cdc_mmpg.device import Device  # noqa: PLC0415  onnxruntime: not for the other series

    device, found = Device(bundle, url, key=key, deadline=REQUEST_SECONDS), []
    for _ in range(requests + 1):
        device.new_session()
        start = time.perf_counter()
        answer = device.answer(video, question)
        whole = 1000 * (time.perf_counter() - start)
        if answer.origin != "adapted":
            raise CDCError(f"{bundle}: {answer.trouble}")
        found.append({**answer.milliseconds, "whole": whole})
    device.close()
    return found[1:]


def _request(
    connection: httpx2.Client, url: str, layout: Layout, versions: Versions, key: Ed25519PublicKey
) -> dict[str, float]:
    """A verified layer's times in milliseconds.

    Raises:
        CDCError: none came.
    """
    feature = np.random.default_rng().uniform(-1, 1, WIDTH).astype(np.float32)
    upload = encode_upload(feature, layout, versions)
    start = time.perf_counter()
    reply = connection.post(url, content=upload)
    end = time.perf_counter()
    if reply.status_code != 200:
        raise CDCError(f"{url}: {reply.status_code} {reply.text}")
    decode_layer(reply.content, upload, layout, versions, key)
    verified = time.perf_counter()
    compute = sum(server_ms(reply.headers["Server-Timing"]).values())
    return {"whole": 1000 * (end - start), "compute": compute, "verify": 1000 * (verified - end)}


def series(
    client: Client, service: Served, kind: Kind, link: Link, rate: int, requests: int, connection: str = "kept"
) -> dict[str, Any]:
    """A cell: see `cell`; one request more, which does not count, comes first.

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
    pause = IDLE_SECONDS if connection == "idle" else 0
    replies = client.ask(**command, requests=requests, connection=connection, pause=pause)
    passed = Counts(*(after - then for after, then in zip(link.counts(), before, strict=True)))
    for count_bytes, packets in ((passed.up_bytes, passed.up_packets), (passed.down_bytes, passed.down_packets)):
        if packets and count_bytes / packets > FRAME_BYTES:
            raise CDCError(f"packets of {count_bytes / packets:.0f} bytes pass the link: offloads are on, and a token "
                           "bucket does not hold them back; --proxy measures without")  # fmt: skip
    found = cell(service.case, kind, rate, replies, passed)
    return {**found, "connection": connection}


def exported(folder: Path) -> list[Exported]:
    """The open-ended runs of a dataset that were exported, with a clip and a question of their test, where they are."""
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
            found.append(Exported(f"{run.parent.name}/{name}", report.parent / name, clip, asked["question"]))
    return found


def whole_answers(
    client: Client, network: Network, bundles: Sequence[Exported], requests: int, folder: Path
) -> list[dict[str, Any]]:
    """The stages of a device's answers at `DELAY_RATE`, medians in milliseconds.

    Raises:
        CDCError: a service does not come up, or a layer did not come.
    """
    found = []
    keys = folder / "keys"
    for place, each in enumerate(bundles):
        log = folder / f"answers{place}"
        with service(network, each.bundle.parent / "cloud", keys, log) as (running, port):
            until_ready(client, network, running, port, each.name, log)
            with network.link(port, DELAY_RATE, 0.0) as link:
                replies = client.ask(device=str(each.bundle.absolute()), url=link.url, key=keys.read_text(),
                                     video=str(each.video.absolute()), question=each.question,
                                     requests=requests)  # fmt: skip
        stages = {stage: float(np.median([reply.get(stage, 0.0) for reply in replies])) for stage in STAGES}
        whole = [reply["whole"] for reply in replies]
        found.append({"name": each.name, "rate_mib_s": DELAY_RATE, "stages_ms": stages,
                      "whole_p50_ms": float(np.percentile(whole, 50)), "whole_p99_ms": float(np.percentile(whole, 99)),
                      "requests": replies})  # fmt: skip
    return found


def measured(
    cases: Sequence[Case],
    rates: Sequence[int],
    requests: int,
    network: Network,
    why: str = "",
    bundles: Sequence[Exported] = (),
) -> dict[str, Any]:
    """All cells over a network; what `delay.json` says.

    Args:
        cases: the generators.
        rates: MiB/s.
        requests: a cell.
        network: where service and client stand.
        why: it is the proxy, "" where nothing kept from namespaces.
        bundles: of devices whose whole answers are measured.

    Raises:
        CDCError: see `deployed` and `series`.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, deployed(cases, network, Path(scratch)) as (client, served):
        cells, far = [], []
        for rate in rates:
            for service in served:
                for kind in service.case.kinds:
                    with network.link(service.port, rate, 0.0) as link:
                        cells.append(series(client, service, kind, link, rate, requests))
            logger.info("%d MiB/s: %d cells", rate, sum(each["rate_mib_s"] == rate for each in cells))
        for service in (served[0], *(other for other in served[1:] if other.case.native == "low_rank")):
            with network.link(service.port, DELAY_RATE, DELAY_SECONDS) as link:
                for connection in ("each", "idle", "kept"):
                    few = max(2, requests // 3)
                    far.append(series(client, service, service.case.kinds[0], link, DELAY_RATE, few, connection))
        answers = whole_answers(client, network, bundles, requests, Path(scratch))
        return {
            "answers": answers,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(),
            "machine": {"processor": processor(), "processors": count_processors(), "kernel": platform.release(),
                        **network.state()},
            "link": network.kind,
            "why": why,
            "weights": "random",
            "requests": requests,
            "rates_mib_s": list(rates),
            "cells": cells,
            "delay": {"seconds_each_way": DELAY_SECONDS, "rate_mib_s": DELAY_RATE,
                      "link": "TUN" if network.kind == "namespaces" else "proxy", "cells": far},
            "seconds": time.perf_counter() - start,
        }  # fmt: skip


def processor() -> str:
    """Its name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


COLUMNS = ("layer", "kind", "MiB/s", "payload", "on the link", "paper up", "paper down", "floor", "whole p50", "p99",
           "compute", "transfer", "/ floor", "verify")  # fmt: skip


def row(found: dict[str, Any]) -> list[str]:
    """A cell as the tables have it."""
    link = f"{found['link_up_bytes']:,.0f} + {found['link_down_bytes']:,.0f}"
    times = ("paper_up_ms", "paper_down_ms", "floor_ms", "whole_p50_ms", "whole_p99_ms", "compute_ms", "transfer_ms")
    return [
        f"{found['case']}, {found['outputs']}", found["kind"], str(found["rate_mib_s"]), f"{found['payload_bytes']:,}",
        link, *(f"{found[name]:.2f}" if found[name] < 10 else f"{found[name]:.1f}" for name in times),
        f"{found['transfer_by_floor']:.2f}", f"{found['verify_ms']:.2f}",
    ]  # fmt: skip


def remarks(result: dict[str, Any]) -> list[str]:
    """What the first table needs to be read."""
    where = "Two network namespaces, a veth pair, a token bucket (tbf) at both ends"
    counted = "the kernel's count, Ethernet headers and acknowledgements included"
    if result["link"] == "proxy":
        where = "A throttling proxy on the loopback device"
        where += f" ({result['why']})" if result["why"] else " (--proxy)"
        counted = "what passed the proxy, HTTP's headers included, TCP's not"
    machine = result["machine"]
    return [
        f"{where}; {result['requests']} requests a row over a kept connection, after one that does not count.",
        f"Random weights; uploads of {UPLOAD_BYTES} bytes, layers of payload + 132. On the link, up + down: {counted}.",
        "Milliseconds. Paper: 768 bytes, and the payload, by the rate. Floor: both on the link by the rate. "
        "Transfer: whole less compute (generate and wait, as the service says), medians. Acknowledgements are part of "
        "the floor and pass meanwhile: up to 3 % less is possible.",
        f"{machine['processors']} x {machine['processor']}, Linux {machine['kernel']}, "
        f"{machine.get('tcp_congestion_control', 'unknown congestion control')}; {result['made']}, "
        f"commit {result['commit']}.",
    ]


CONNECTIONS = {"each": "new", "idle": f"kept, idle {IDLE_SECONDS} s", "kept": "kept"}
LEFT = ("layer", "kind", "connection", "bundle")
FAR_COLUMNS = ("layer", "kind", "connection", "payload", "whole p50", "p99", "compute", "transfer", "round trips")


def far_row(found: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A cell of the series with delay; round trips are what the transfer has beyond the payload by the rate."""
    trips = (found["transfer_ms"] - found["paper_down_ms"]) / (2000 * result["delay"]["seconds_each_way"])
    return [
        f"{found['case']}, {found['outputs']}", found["kind"], CONNECTIONS[found["connection"]],
        f"{found['payload_bytes']:,}", f"{found['whole_p50_ms']:.1f}", f"{found['whole_p99_ms']:.1f}",
        f"{found['compute_ms']:.1f}", f"{found['transfer_ms']:.1f}", f"{trips:.1f}",
    ]  # fmt: skip


def far_remark(result: dict[str, Any]) -> str:
    """What the second table needs to be read."""
    delay = result["delay"]
    said = f"{1000 * delay['seconds_each_way']:.0f} ms each way at {delay['rate_mib_s']} MiB/s, "
    if delay["link"] == "TUN":
        return said + "packets held back between two TUN devices. Round trips: transfer less payload / rate, by 40 ms."
    return said + (
        "held back by the proxy. It ends connections itself: a handshake, or a window that is small at first, costs no "
        "round trip here, and so these figures do not show them."
    )


def tables(result: dict[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]], list[str]]]:
    """Columns, rows and remarks of both."""
    far = [far_row(found, result) for found in result["delay"]["cells"]]
    made = [
        (COLUMNS, [row(found) for found in result["cells"]], remarks(result)),
        (FAR_COLUMNS, far, [far_remark(result)]),
    ]
    if answers := result["answers"]:
        made.append(
            (
                ("bundle", *STAGES, "whole p50", "p99"),
                [
                    [each["name"], *(f"{each['stages_ms'][stage]:.2f}" for stage in STAGES),
                     f"{each['whole_p50_ms']:.1f}", f"{each['whole_p99_ms']:.1f}"]
                    for each in answers
                ],
                [f"One answer of the device client, each with its own layer, at {DELAY_RATE} MiB/s: medians in ms. "
                 "Generate is the cloud's share, upload and download are the way there and back."],
            )
        )  # fmt: skip
    return made


def page(result: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = ["# The time delay, measured", ""]
    for columns, rows, said in tables(result):
        lines += [*said, ""]
        aligned = ["---" if column in LEFT else "---:" for column in columns]
        lines += [f"| {' | '.join(cells)} |" for cells in (columns, aligned)]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
        lines.append("")
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    """Both tables on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, emoji=False)  # names are no markup
    for columns, rows, said in tables(result):
        table = Table(box=SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="left" if column in LEFT else "right")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
        console.print("\n".join(said), highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--client"]:
        return exit_code(lambda: sys.exit(serve_client()))
    parser = argparse.ArgumentParser(description="the time delay of the paper's Table 6, on a real socket")
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>: delay.json and delay.md are written there")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="a cell")
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
        CDCError: see `measured`; or a file cannot be written.
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
        network, why = chosen(stack, proxy, congestion)
        result = measured(CASES, RATES, requests, network, why, exported(folder))
    show(result)
    write_json(result, folder / RESULT)
    with atomic_write(folder / PAGE) as file:
        file.write(page(result).encode())
    print(f"{folder / RESULT}, {folder / PAGE}: {result['seconds']:.0f} s")


def chosen(stack: ExitStack, proxy: bool, congestion: str = CONGESTION) -> tuple[Network, str]:
    """The network, until the stack ends, and why it is no better one.

    Raises:
        ConfigError: the kernel has no such congestion control.
    """
    if proxy:
        return Loopback(), ""
    known = tcp_settings([]).get("tcp_available_congestion_control", "").split()
    if known and congestion not in known:
        raise ConfigError(f"--congestion {congestion}: this kernel has {', '.join(known)}")
    try:
        return stack.enter_context(Namespaces(congestion)), ""
    except CDCError as error:
        logger.warning("no network namespaces, a proxy instead: %s", error)
        return Loopback(), str(error)


if __name__ == "__main__":
    sys.exit(main())
