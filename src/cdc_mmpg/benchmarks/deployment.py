"""How fast a deployment is on this machine: the service, the device, the swap of a layer, and a generator on a GPU.

`cdc-mmpg benchmark OF=deployment` prints tables; with `--bundles`, the folder of an export, it measures that one and
leaves `benchmark.json` in it. What is compared runs in turns, so that noise hits both: figures belong side by side
only within one run.

- service: `cdc_mmpg.cloud` against `plain`, an endpoint that answers each request by itself: the same layers, signed,
  without batches, places, clocks or a log;
- hostile clients: good ones beside 300 slow bodies and 300 slow headers, and ten times as many clients on new
  connections as the service has places: what is served, and how fast;
- device: the encoder of the bundles against torch, eager, of the same size;
- swap: from a message that has arrived to a layer in use;
- generator: on a GPU, against the time that its weights take to be read.
"""

import argparse
import asyncio
import gc
import itertools
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cdc_mmpg.benchmarks.hostile_load import ask_many, local_addresses, slow_clients
from cdc_mmpg.device.model import ENCODER, DeviceModel, read_bundle
from cdc_mmpg.device.state import Layer
from cdc_mmpg.errors import CDCError, CheckpointError
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import provenance, write_json
from cdc_mmpg.wire.messages import PATH, Layout, Versions, decode_layer, decode_upload, encode_upload
from cdc_mmpg.wire.payloads import WIDTH

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from fastapi import FastAPI

    from cdc_mmpg.cloud.model import ServedModel
    from cdc_mmpg.models.fda import Adaptor
    from cdc_mmpg.models.generator import Generator

REPORT = "benchmark.json"
FOLDERS = ("device", "device-int8", "cloud")
EXPERIMENTS = Path(__file__).parents[3] / "experiments"
PAPER = [EXPERIMENTS / "methods/cdc_mmpg.yaml", EXPERIMENTS / "datasets/msrvtt.yaml"]
BUNDLE = "CDC_MMPG_PLAIN"  # tells `plain` what to serve

START_SECONDS = 60.0  # that a server may take to be ready
NUMBER = 4  # rank of the low-rank layers, and layers of the basis
AXES = 2
SERVED = ("float32", "low_rank")
CONCURRENCY = (1, 8, 64)
ROUNDS = 2  # turns of each server at each concurrency
LEAD_SECONDS = 3.0  # after which all slow clients are there
LEAD = 0.25  # of a turn's seconds, before its clock starts
UPLOADS = 256  # different ones
GOOD_CLIENTS = 8  # beside the slow ones, on new connections
SLOW_CLIENTS = 300  # with slow bodies, and as many with slow headers
OVERLOAD = 10  # clients on new connections at once, in the service's places
SOURCES = 20  # addresses that they come from
GOAL_SECONDS = 1.0  # of the 99th percentile of those that are served under overload
VERIFIED = 50  # every so many replies one signature
WORDS = 12  # of a question
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # on a GPU
ANSWERS, INPUTS = 1501, 96  # of its generator: the paper's MSRVTT-QA
GOAL_MILLISECONDS = 1.0  # of a swap

Report = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="speed and size of a deployment on this machine")
    parser.add_argument(
        "--bundles", type=Path, help="folder of an export; default: random weights at the paper's size, not kept"
    )
    parser.add_argument("--seconds", type=float, default=2.5, help="of each load, of both servers")
    options = parser.parse_args(arguments)
    log_to_terminal()
    leave_on_signals()
    return exit_code(partial(benchmark, options.bundles, options.seconds))


def benchmark(bundles: Path | None, seconds: float) -> None:
    """Measure everything, print it, and write it beside the bundles.

    Raises:
        CheckpointError: a bundle is absent or damaged.
        CDCError: a server does not start, or answers wrongly.
    """
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        if bundles is None:
            from cdc_mmpg.deployment.export import export_untrained  # noqa: PLC0415  see `cli`

            bundles = Path(scratch) / "deployment"
            console.print("making bundles of random weights at the paper's size ...")
            export_untrained(PAPER, bundles)
        clouds = clouds_of(bundles, Path(scratch))
        report: Report = {"machine": machine(), "seconds": seconds}
        report["service"] = {kind: compare_services(clouds[kind], kind, seconds) for kind in SERVED}
        console.print(service_table(report["service"]))
        console.print(hostile_table(report["service"]))
        report["device"] = compare_encoders(bundles, seconds)
        console.print(device_table(report["device"]))
        report["swap"] = {"goal_milliseconds": GOAL_MILLISECONDS, "kinds": swaps(bundles, clouds, seconds)}
        console.print(swap_table(report["swap"]))
        report["bytes"] = sizes(bundles)
        console.print(size_table(report["bytes"]))
        report["generator"] = generator_on_gpu(seconds)
        console.print(generator_table(report["generator"]))
        write_json({**report, **provenance()}, bundles / REPORT)


def clouds_of(bundles: Path, scratch: Path) -> dict[str, Path]:
    """The cloud bundle by what is asked of it: whole layers of this one, parts of two of the same size, made here.

    Raises:
        CheckpointError: a bundle is absent or damaged.
    """
    for folder in FOLDERS[:2]:
        settings = read_bundle(bundles / folder)
    layout = Layout(*settings["layout"])

    import torch  # noqa: PLC0415  see `cli`

    from cdc_mmpg.cloud.model import read_cloud_bundle  # noqa: PLC0415
    from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle  # noqa: PLC0415
    from cdc_mmpg.models.device_axes import DeviceAxes  # noqa: PLC0415
    from cdc_mmpg.models.fda import BasisFDA, LowRankFDA  # noqa: PLC0415
    from cdc_mmpg.models.generator import Generator  # noqa: PLC0415

    versions = read_cloud_bundle(bundles / "cloud").versions
    if versions != Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"])):
        raise CheckpointError(f"{bundles}: the bundles are not of one export: export anew")
    torch.manual_seed(0)
    low_rank = LowRankFDA(layout.columns - 1, layout.outputs, NUMBER)
    torch.nn.init.normal_(low_rank.hyper.weight, std=0.01)  # the residual starts at zero
    adaptors: dict[str, Adaptor] = {
        "low_rank": low_rank,
        "basis": BasisFDA(layout.columns - 1, layout.outputs, NUMBER),
    }
    for kind, adaptor in adaptors.items():
        write_cloud_bundle(Generator(DeviceAxes(AXES), adaptor).eval(), versions.encoder, kind, scratch / kind)
    return {"float32": bundles / "cloud", **{kind: scratch / kind for kind in adaptors}}


def machine() -> Report:
    """What it runs on, and with how many threads."""
    import torch  # noqa: PLC0415  see `cli`

    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "processors": count_processors(),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),  # of the servers too
        "servers": "one process each; plain: as many threads as Starlette takes (40)",
    }


# Service


def plain() -> "FastAPI":
    """What the service is measured against: a request, a product, a reply."""
    from typing import Annotated  # noqa: PLC0415

    from fastapi import Body, FastAPI  # noqa: PLC0415  see `cli`
    from fastapi.responses import JSONResponse, Response  # noqa: PLC0415

    from cdc_mmpg.cloud.app import OCTET_STREAM  # noqa: PLC0415
    from cdc_mmpg.cloud.model import generate_layer, load_model  # noqa: PLC0415

    served = load_model(Path(os.environ[BUNDLE]))
    api = FastAPI(openapi_url=None)

    @api.post(PATH, response_class=Response)
    def layer(content: Annotated[bytes, Body(media_type=OCTET_STREAM)]) -> Response:
        upload = decode_upload(content, served.layouts, served.versions)
        return Response(generate_layer(served, content, upload), media_type=OCTET_STREAM)

    @api.get("/ready")
    def ready() -> JSONResponse:
        return JSONResponse({"status": "ready"})

    return api


@contextmanager
def servers(bundle: Path) -> Iterator[dict[str, int]]:
    """The service and the plain one, each a process of its own, until the end of the block; their ports.

    Raises:
        CDCError: one does not get ready; with the end of the log.
    """
    ports = {}
    for name in ("service", "plain"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ports[name] = int(listener.getsockname()[1])
    commands = {
        "service": ["cdc_mmpg.cloud", str(bundle)],
        "plain": ["uvicorn", f"{__package__}.deployment:plain", "--factory", "--no-access-log"],
    }
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as log:
        try:
            for name, command in commands.items():
                with answered_later():
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", *command, "--port", str(ports[name])],
                            stdout=log,
                            stderr=log,
                            env={**os.environ, BUNDLE: str(bundle)},
                        )
                    )
            end = time.monotonic() + START_SECONDS
            while any(got(port, "/ready") is None for port in ports.values()):
                if any(process.poll() is not None for process in processes) or time.monotonic() > end:
                    log.seek(0)
                    raise CDCError(f"a server did not start:\n{log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.1)
            yield ports
        finally:
            stop(processes)


@contextmanager
def answered_later() -> Iterator[None]:
    """A signal that comes in the block is answered after it: a process that began is known by then, and ended."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
        for number in came:
            signal.raise_signal(number)


def got(port: int, path: str) -> str | None:
    """What a server says there; None where it does not, or not yet."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.read().decode() if reply.status == 200 else None
        except (OSError, HTTPException):
            return None


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes, by force where asking does not help."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait(10)
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
            process.wait()


class Expected(NamedTuple):
    """What a reply has to be."""

    layout: Layout
    versions: Versions
    key: "Ed25519PublicKey"


class Load(NamedTuple):
    """What a server did in a turn."""

    milliseconds: list[float]  # of each reply
    seconds: float
    processor: float  # seconds of it that the client took
    batch: float | None  # uploads answered at once, in the mean; the plain one does not count


def compare_services(bundle: Path, kind: str, seconds: float) -> Report:
    """Service and plain endpoint under the same loads, by concurrency."""
    from cdc_mmpg.cloud.model import read_cloud_bundle  # noqa: PLC0415  see `cli`
    from cdc_mmpg.models.generator import Generator  # noqa: PLC0415

    made = read_cloud_bundle(bundle)
    layouts = Generator.load(bundle / "generator.safetensors").layouts()
    layout = next(layout for layout in layouts if layout.kind == kind)
    expected = Expected(layout, made.versions, made.key.public_key())
    features = np.tanh(np.random.default_rng(0).standard_normal((UPLOADS, WIDTH))).astype(np.float32)
    uploads = [encode_upload(feature, layout, made.versions) for feature in features]
    found: Report = {"weights": made.weights, "bytes": layout.message_bytes, "concurrency": {}}
    with servers(bundle) as ports, without_pauses():
        for concurrency in CONCURRENCY:
            turns: dict[str, list[Load]] = {name: [] for name in ports}
            for _, (name, port) in itertools.product(range(ROUNDS), ports.items()):
                turns[name].append(load(port, uploads, expected, concurrency, seconds / ROUNDS))
            each = {name: summed(loads) for name, loads in turns.items()}
            found["concurrency"][str(concurrency)] = {**each, "ratio": ratios(each["service"], each["plain"])}
        found["hostile"] = measure_hostile_clients(ports["service"], uploads, expected, seconds)
    return found


def measure_hostile_clients(port: int, uploads: Sequence[bytes], expected: Expected, seconds: float) -> Report:
    """Return what a service does for good clients beside slow ones, and for far too many at once.

    Raises:
        CDCError: a layer is not what it should be.
    """
    from cdc_mmpg.cloud.limits import DEFAULT_PLACES, raise_file_limit  # noqa: PLC0415  see `cli`

    raise_file_limit()
    sources = local_addresses(SOURCES)
    good = partial(ask_many, port, ["127.0.0.1"], uploads, GOOD_CLIENTS, seconds)
    outcomes = {"good clients alone": good()}
    with slow_clients(port, sources, SLOW_CLIENTS):
        time.sleep(min(seconds, LEAD_SECONDS))  # until all are there
        outcomes[f"beside {SLOW_CLIENTS} slow bodies and {SLOW_CLIENTS} slow headers"] = good()
    crowd = OVERLOAD * DEFAULT_PLACES
    outcomes[f"{crowd:,} clients at once"] = ask_many(port, sources, uploads, crowd, seconds)
    found: Report = {}
    for name, outcome in outcomes.items():
        for upload, reply in itertools.islice(outcome.layers.items(), VERIFIED):
            decode_layer(reply, upload, expected.layout, expected.versions, expected.key)
        times = outcome.milliseconds or [float("nan")]
        found[name] = {
            "served": len(outcome.milliseconds),
            "refused": outcome.refused,
            "lost": outcome.lost,
            "served_share": outcome.served_share,
            "served_per_second": len(outcome.milliseconds) / outcome.seconds,
            "refused_per_second": outcome.refused / outcome.seconds,
            "p50_milliseconds": float(np.percentile(times, 50)),
            "p99_milliseconds": float(np.percentile(times, 99)),
            "load_average": os.getloadavg()[0],  # what else runs here
        }
    return found


def hostile_table(found: Report) -> Table:
    """Return it as a person reads it."""
    table = titled(
        f"hostile clients, on new connections from {SOURCES} addresses; goal: none lost, p99 {GOAL_SECONDS:g} s",
        ["layer", "clients"],
        ["served/s", "refused/s", "served", "lost", "p50 ms", "p99 ms", "load"],
    )
    for kind, own in found.items():
        for name, values in own["hostile"].items():
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


@contextmanager
def without_pauses() -> Iterator[None]:
    """What was imported is not collected in the block: a client that stood still would be a slow server."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def summed(loads: Sequence[Load]) -> Report:
    """The turns of a server as one."""
    times, seconds = [own for load in loads for own in load.milliseconds], sum(load.seconds for load in loads)
    counted = [load.batch for load in loads if load.batch is not None]
    return {
        "replies": len(times),
        "requests_per_second": len(times) / seconds,
        "p50_milliseconds": float(np.percentile(times, 50)),
        "p99_milliseconds": float(np.percentile(times, 99)),
        "mean_batch": sum(counted) / len(counted) if counted else None,
        "client_processors": sum(load.processor for load in loads) / seconds,
    }


def ratios(service: Report, plain: Report) -> dict[str, float]:
    """Of the service to the plain endpoint."""
    return {name: service[name] / plain[name]
            for name in ("requests_per_second", "p50_milliseconds", "p99_milliseconds")}  # fmt: skip


def load(port: int, uploads: Sequence[bytes], expected: Expected, concurrency: int, seconds: float) -> Load:
    """A server under so many clients at once, each of which asks again as soon as it has its reply.

    Raises:
        CDCError: a reply is not what it should be.
    """
    before = counted(port)
    milliseconds, taken, processor, kept = asyncio.run(clients(port, uploads, expected, concurrency, seconds))
    after = counted(port)
    for upload, reply in kept:  # after the clock: it takes as long as making one
        decode_layer(reply, upload, expected.layout, expected.versions, expected.key)
    batch = (after[0] - before[0]) / (after[1] - before[1]) if before and after else None
    return Load(milliseconds, taken, processor, batch)


def counted(port: int) -> tuple[float, float] | None:
    """Uploads that a service has answered, weighed with the size of their batches, and their number; if it counts."""
    page = got(port, "/metrics") or ""
    found = [re.search(rf"^cdc_mmpg_batch_{name} (\S+)", page, re.MULTILINE) for name in ("sum", "count")]
    return (float(found[0][1]), float(found[1][1])) if found[0] and found[1] else None


async def clients(
    port: int, uploads: Sequence[bytes], expected: Expected, concurrency: int, seconds: float
) -> tuple[list[float], float, float, list[tuple[bytes, bytes]]]:
    """Milliseconds of the replies that came within the seconds, those seconds, the client's own, and some replies.

    Raises:
        CDCError: a reply is not what it should be.
    """
    loop, numbers = asyncio.get_running_loop(), itertools.count()
    milliseconds: list[float] = []
    kept: list[tuple[bytes, bytes]] = []
    start = time.perf_counter() + LEAD * seconds
    end = start + seconds
    worked = 0.0

    async def client(connection: socket.socket) -> None:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        view = memoryview(bytearray(expected.layout.message_bytes + 4096))
        while (sent := time.perf_counter()) < end:
            number = next(numbers)
            upload = uploads[number % len(uploads)]
            reply = await exchange(loop, connection, upload, view)
            if len(reply) != expected.layout.message_bytes:
                raise CDCError(f"a layer of {len(reply)} bytes: {expected.layout.message_bytes} are due")
            came = time.perf_counter()
            if start <= came < end:
                milliseconds.append(1000 * (came - sent))
            if number % VERIFIED == 0:
                kept.append((upload, bytes(reply)))

    async def watch() -> None:
        nonlocal worked
        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        before = time.process_time()
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        worked = time.process_time() - before

    try:
        with ExitStack() as stack:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(watch())
                for _ in range(concurrency):
                    connection = stack.enter_context(closing(socket.socket()))
                    connection.setblocking(False)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    tasks.create_task(client(connection))
    except ExceptionGroup as group:
        first = group.exceptions[0]
        if isinstance(first, OSError):
            raise CDCError(f"a server is not there any more: {first}") from first
        raise first from None
    return milliseconds, seconds, worked, kept


async def exchange(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, upload: bytes, view: memoryview
) -> memoryview:
    """The body of the reply to an upload, in `view`. As little work as can be: it runs on the servers' processors.

    Raises:
        CDCError: the reply is none, or a refusal.
    """
    headers = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    await loop.sock_sendall(connection, f"{headers}Content-Length: {len(upload)}\r\n\r\n".encode() + upload)
    whole = body = came = 0
    while not whole or came < whole:
        if came == len(view):
            raise CDCError("a reply that is longer than a layer")
        size = await loop.sock_recv_into(connection, view[came:])
        if not size:
            raise CDCError("a server closed the connection in the middle of a reply")
        came += size
        if not whole and (ended := bytes(view[:came][:4096]).find(b"\r\n\r\n")) >= 0:
            head = bytes(view[:ended])
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                raise CDCError(f"a server refused: {bytes(view[:came][:500])!r}")
            body = ended + 4
            whole = body + int(length[1])
    return view[body:whole]


def service_table(found: Report) -> Table:
    """As a person reads it."""
    table = titled(
        "service: cdc_mmpg.cloud against a plain FastAPI endpoint",
        ["layer", "clients", "server"],
        ["requests/s", "p50 ms", "p99 ms", "mean batch", "client, processors"],
    )
    for kind, own in found.items():
        for concurrency, each in own["concurrency"].items():
            for name in ("service", "plain"):
                values = each[name]
                table.add_row(
                    f"{kind}, {own['bytes']:,} B",
                    concurrency,
                    name,
                    f"{values['requests_per_second']:,.1f}",
                    f"{values['p50_milliseconds']:.2f}",
                    f"{values['p99_milliseconds']:.2f}",
                    f"{values['mean_batch']:.1f}" if values["mean_batch"] is not None else "",
                    f"{values['client_processors']:.2f}",
                )
            ratio = [f"× {value:.2f}" for value in each["ratio"].values()]
            table.add_row("", "", "service / plain", *ratio, "", "", end_section=True)
    return table


# Device


def compare_encoders(bundles: Path, seconds: float) -> Report:
    """Milliseconds of a question about a decoded clip: the bundles' encoders and torch's, with one thread and with all.

    The first run of a turn is not counted: threads that another runtime left spinning end in it. Beside the median the
    least: where others use the processors, the threads of an inference wait for each other far longer than they work.
    """
    import torch  # noqa: PLC0415  see `cli`

    found: Report = {"threads": {}}
    frames, text = example(bundles)
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, count_processors()}):
            torch.set_num_threads(threads)
            runs: dict[str, Callable[[], Any]] = {
                "float32": partial(DeviceModel(bundles / "device", threads).features, frames, [text]),
                "int8": partial(DeviceModel(bundles / "device-int8", threads).features, frames, [text]),
                "torch": eager(bundles),
            }
            times = in_turns(runs, 3 * seconds)
            own: Report = {name: {"p50_milliseconds": float(np.median(each)), "least_milliseconds": min(each),
                                  "runs": len(each)} for name, each in times.items()}  # fmt: skip
            for name in runs:
                own[name]["torch_ratio"] = own["torch"]["p50_milliseconds"] / own[name]["p50_milliseconds"]
            found["threads"][str(threads)] = own
    finally:
        torch.set_num_threads(before)
    found["clip"] = list(frames.shape)
    found["words"] = len(text)
    found["peak_megabytes"] = {name: peak_megabytes(bundles, name) for name in ("float32", "int8", "torch")}
    return found


def example(bundles: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """The frames of a clip (T, S, S, 3) as the device decodes them, and a question's words: noise."""
    settings = read_bundle(bundles / "device")
    generator, size = np.random.default_rng(0), settings["frames"]["size"]
    frames = generator.integers(256, size=(settings["frames"]["number"], size, size, 3), dtype=np.uint8)
    words = min(WORDS, settings["text"]["length"])
    return frames, [int(word) for word in generator.integers(settings["text"]["known"], size=words)]


def eager(bundles: Path) -> Callable[[], Any]:
    """The same encoder in torch, with random weights."""
    import onnx  # noqa: PLC0415  see `cli`
    import torch  # noqa: PLC0415

    from cdc_mmpg.data.batch import normalise  # noqa: PLC0415
    from cdc_mmpg.models.all_in_one import AllInOne  # noqa: PLC0415

    frames, text = example(bundles)
    settings = read_bundle(bundles / "device")
    graph = onnx.load(str(bundles / "device" / ENCODER)).graph
    encoder = AllInOne(
        num_frames=len(frames),
        image_size=settings["frames"]["size"],
        depth=sum(node.op_type == "Softmax" for node in graph.node),  # one a block
        vocab_size=settings["text"]["known"],
        text_length=settings["text"]["length"],
    ).eval()
    clip, ids = torch.from_numpy(frames)[None], torch.tensor([text])

    def run() -> None:
        with torch.inference_mode():
            encoder.one_clip(normalise(clip), ids)

    return run


def in_turns(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of runs that take turns for so many seconds; three times each at least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def peak_megabytes(bundles: Path, name: str) -> float | None:
    """Most memory that a process held which answers one question with an encoder; None where the system does not say.

    Raises:
        CDCError: the process failed.
    """
    if not Path("/proc/self/status").is_file():
        return None
    code = f"from {__package__}.deployment import print_peak; print_peak({str(bundles)!r}, {name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CDCError(f"a process that measures memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def print_peak(bundles: str, name: str) -> None:
    """In a process of its own: encode a question, and print the most megabytes that this took."""
    if name == "torch":
        run = eager(Path(bundles))
    else:
        frames, text = example(Path(bundles))
        folder = Path(bundles) / ("device" if name == "float32" else "device-int8")
        run = partial(DeviceModel(folder).features, frames, [text])
    run()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    print(int(peak[1]) * 1024 / 1e6 if peak else "nan")


def device_table(found: Report) -> Table:
    """As a person reads it."""
    columns = [f"p50 ms, {threads} thread{'s' if threads != '1' else ''}" for threads in found["threads"]]
    count, size = found["clip"][:2]
    table = titled(
        f"device: the encoder, {count} frames at {size}, {found['words']} words",
        ["encoder"],
        [part for column in columns for part in (column, "least", "torch / it")] + ["peak MB"],
    )
    for name in ("float32", "int8", "torch"):
        each = [own[name] for own in found["threads"].values()]
        values = [part for own in each for part in (f"{own['p50_milliseconds']:.1f}",
                  f"{own['least_milliseconds']:.1f}", f"× {own['torch_ratio']:.2f}")]  # fmt: skip
        peak = found["peak_megabytes"][name]
        table.add_row("torch, eager" if name == "torch" else f"bundle, {name}", *values, f"{peak:.0f}" if peak else "")
    return table


# Swap


def swaps(bundles: Path, clouds: Mapping[str, Path], seconds: float) -> Report:
    """Milliseconds from a received message to a layer in use, by kind: verifying it, and the swap."""
    from cdc_mmpg.cloud.model import load_model  # noqa: PLC0415  see `cli`

    model = DeviceModel(bundles / "device")
    served = {kind: load_model(folder) for kind, folder in clouds.items()}
    messages = {kind: message(served.get(kind, served["float32"]), kind)
                for kind in ("float32", "float16", "int8", "low_rank", "basis")}  # fmt: skip
    # What a bundle for such layers has in basis.npy.
    adaptor: Any = served["basis"].generator.adaptor
    model._basis = adaptor.basis.detach().cpu().numpy()
    device = SimpleNamespace(layer=Layer(model.shared, 0, "shared"))
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in messages}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 20:
        for kind, (upload, content, expected) in messages.items():
            start = time.perf_counter()
            matrices = decode_layer(content, upload, expected.layout, expected.versions, expected.key)
            verified = time.perf_counter()
            device.layer = Layer(model.install(matrices, expected.layout), 1, "adapted")
            times[kind].append((verified - start, time.perf_counter() - verified))
    found: Report = {}
    for kind, each in times.items():
        verifying, swapping = 1000 * np.array(each).T
        found[kind] = {
            "bytes": len(messages[kind][1]),
            "verify_milliseconds": float(np.median(verifying)),
            "swap_milliseconds": float(np.median(swapping)),
            "swap_p99_milliseconds": float(np.percentile(swapping, 99)),
            "milliseconds": float(np.median(verifying + swapping)),
            "runs": len(each),
        }
    return found


def message(served: "ServedModel", kind: str) -> tuple[bytes, bytes, Expected]:
    """An upload, the message that answers it, and what is expected of that."""
    from cdc_mmpg.cloud.model import generate_layer  # noqa: PLC0415  see `cli`

    layout = next(layout for layout in served.layouts if layout.kind == kind)
    feature = np.tanh(np.random.default_rng(1).standard_normal(WIDTH)).astype(np.float32)
    upload = encode_upload(feature, layout, served.versions)
    content = generate_layer(served, upload, decode_upload(upload, served.layouts, served.versions))
    return upload, content, Expected(layout, served.versions, served.key.public_key())


def swap_table(found: Report) -> Table:
    """As a person reads it."""
    table = titled(
        f"swap: a received message becomes the layer in use; goal {found['goal_milliseconds']:g} ms",
        ["layer"],
        ["bytes", "verify ms", "swap ms", "swap p99 ms", "both ms", "goal"],
    )
    for kind, own in found["kinds"].items():
        table.add_row(
            kind,
            f"{own['bytes']:,}",
            *(f"{own[name]:.3f}" for name in ("verify_milliseconds", "swap_milliseconds", "swap_p99_milliseconds")),
            f"{own['milliseconds']:.3f}",
            "met" if own["swap_milliseconds"] <= found["goal_milliseconds"] else "missed",
        )
    return table


# Sizes


def sizes(bundles: Path) -> dict[str, dict[str, int]]:
    """Bytes of every file, by bundle."""
    return {
        folder: {path.name: path.stat().st_size for path in sorted((bundles / folder).iterdir()) if path.is_file()}
        for folder in FOLDERS
    }


def size_table(found: Mapping[str, Mapping[str, int]]) -> Table:
    """As a person reads it."""
    names = sorted({name for files in found.values() for name in files})
    table = titled("sizes, MB", ["file"], list(found))
    for name in names:
        table.add_row(name, *(f"{files[name] / 1e6:.3f}" if name in files else "" for files in found.values()))
    table.add_section()
    table.add_row("together", *(f"{sum(files.values()) / 1e6:.3f}" for files in found.values()))
    return table


# Generator


def generator_on_gpu(seconds: float) -> Report | None:
    """The paper's generator for MSRVTT-QA on a GPU, by batch; None where there is no GPU.

    `host` is what the service does: uploads there, layers back in ordinary memory. `pinned` takes them back into memory
    that the card writes by itself. `device` is the generator alone, by the card's clock.
    """
    import torch  # noqa: PLC0415  see `cli`

    if not torch.cuda.is_available():
        return None

    from cdc_mmpg.models.adr import ADR  # noqa: PLC0415
    from cdc_mmpg.models.fda import FDA  # noqa: PLC0415
    from cdc_mmpg.models.generator import Generator  # noqa: PLC0415

    generator = Generator(ADR(), FDA(INPUTS, ANSWERS, "hyperfan_in", project=True)).requires_grad_(False).eval()
    generator.round_weights()
    generator.cuda()
    hyper: Any = generator.adaptor.hyper
    weights = sum(value.numel() * value.element_size() for value in hyper.parameters())
    bandwidth = copy_bandwidth()
    read = 1000 * weights / bandwidth
    found: Report = {
        "name": torch.cuda.get_device_name(),
        "weights": "bfloat16",
        "weight_bytes": weights,
        "copy_bytes_per_second": bandwidth,
        "read_milliseconds": read,
        "batches": {},
    }
    with torch.inference_mode():
        for batch in BATCHES:
            # By batch, all ways: what is compared runs side by side.
            times = on_gpu(generator, batch, seconds / 3)
            own: Report = {}
            for way, each in times.items():
                mean = float(np.mean(each))
                own[way] = {
                    "batches_per_second": 1000 / mean,
                    "requests_per_second": 1000 * batch / mean,
                    "p50_milliseconds": float(np.percentile(each, 50)),
                    "p99_milliseconds": float(np.percentile(each, 99)),
                    "runs": len(each),
                }
            own["read_ratio"] = own["device"]["p50_milliseconds"] / read
            found["batches"][str(batch)] = own
    return found


def copy_bandwidth() -> float:
    """Bytes per second that the card's memory reads and writes, together, in a large copy."""
    import torch  # noqa: PLC0415  see `cli`

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


def on_gpu(generator: "Generator", batch: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a batch of float32 layers, in three ways that take turns; twenty times each at least."""
    import torch  # noqa: PLC0415  see `cli`

    uploads = torch.rand(batch, WIDTH) * 2 - 1
    there = uploads.cuda()
    back = torch.empty(batch, ANSWERS, INPUTS + 1, pin_memory=True)

    def timed(run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    def host() -> None:
        generator(uploads.cuda())[0].cpu().numpy()

    def pinned() -> None:
        back.copy_(generator(uploads.cuda())[0], non_blocking=True)

    def device() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        generator(there)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    ways: dict[str, Callable[[], float]] = {"host": partial(timed, host), "pinned": partial(timed, pinned),
                                            "device": device}  # fmt: skip
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5):  # kernels are chosen, and memory is taken
        for run in ways.values():
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["device"]) < 20:
        for way, run in ways.items():
            times[way].append(run())
    return times


def generator_table(found: Report | None) -> Table | str:
    """As a person reads it."""
    if found is None:
        return "generator on a GPU: not measured, there is none here"
    table = titled(
        f"generator of {ANSWERS:,} answers on {found['name']}, bfloat16: {found['weight_bytes'] / 1e6:.1f} MB of "
        f"weights are read in {found['read_milliseconds']:.4f} ms at {found['copy_bytes_per_second'] / 1e12:.2f} TB/s",
        [],
        ["batch", "batches/s", "requests/s", "host p50 ms", "p99", "pinned p50 ms", "p99", "device p50 ms", "p99",
         "device / read"],
    )  # fmt: skip
    for batch, own in found["batches"].items():
        table.add_row(
            batch,
            f"{own['host']['batches_per_second']:,.1f}",
            f"{own['host']['requests_per_second']:,.0f}",
            *(f"{own[way][name]:.3f}" for way in ("host", "pinned", "device")
              for name in ("p50_milliseconds", "p99_milliseconds")),
            f"× {own['read_ratio']:.2f}",
        )  # fmt: skip
    return table


def titled(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table with columns of words, then of numbers."""
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main())
