"""The cloud's service: an uploaded feature comes in, the signed weights of a last layer go out, raw bytes both ways.

    POST /v1/layer   an upload of `wire` -> a layer of `wire`; errors are JSON: {"error": ..., "detail": ...}
    GET  /health     200 as long as the process answers
    GET  /ready      200 once the weights are there, 503 before
    GET  /metrics    for Prometheus

Requests that wait are answered together: whenever the generator is free it takes all of them, up to `BATCH`. Beyond
`--places` that wait, are answered or are sent, the next are told to come again (503, Retry-After). A body is read no
further than an upload is long, and no longer than `BODY_SECONDS`. Any number of such processes may stand behind a load
balancer: a request needs nothing but the bundle.
"""

import argparse
import asyncio
import gc
import hmac
import json
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from asyncio import constants
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import h11
import torch
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cdc_mmpg.cli import exit_code
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.files import json_digest
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.payloads import WIDTH
from cdc_mmpg.processors import count_processors
from cdc_mmpg.wire import (
    PATH,
    UPLOAD_BYTES,
    Layout,
    Reason,
    Upload,
    UploadRejected,
    Versions,
    decode_upload,
    digest,
    encode_layer,
)

logger = logging.getLogger("cdc_mmpg.cloud")

WEIGHTS = ("float32", "bfloat16")
BYTES = "application/octet-stream"
BATCH = 32  # most uploads that are answered at once
HEADER_SECONDS = 5.0  # from a connection, or a request's first byte on a kept one, to the end of its headers
IDLE_SECONDS = 60.0  # that a connection is kept for the next request: another one costs round trips
BODY_SECONDS = 5.0
REQUEST_SECONDS = 60.0  # from the headers to the last byte of the reply, which a client may read slowly
GRACE_SECONDS = 30  # for accepted requests after SIGTERM
RETRY_SECONDS = 1
START_SECONDS = 60  # that a process may import before its supervisor takes it for lost
PARENT_SECONDS = 1.0  # after which a process notices that its supervisor is gone
NOTHING = 1e-12  # of a feature: numbers near the smallest that there are slow processors down a hundred times

# TLS handshakes have a minute, unless told.
constants.SSL_HANDSHAKE_TIMEOUT = HEADER_SECONDS

# How the processes of one service are told what to serve, and where they count together.
SETTINGS, COUNTS = "CDC_MMPG_CLOUD", "PROMETHEUS_MULTIPROC_DIR"

STATUS: dict[Reason, int] = {"encoder": 409, "generator": 409, "range": 422}  # of other rejected uploads, 400


class Settings(NamedTuple):
    """What is served, and to whom."""

    bundle: str
    keys: str  # a file with a key a line; "" lets everyone in
    places: int  # requests that may wait, be answered or be sent
    weights: str  # "float32" or "bfloat16"; "" is the bundle's choice


class Served(NamedTuple):
    """A cloud bundle in memory."""

    name: str
    generator: Generator
    layouts: list[Layout]
    versions: Versions
    key: Ed25519PrivateKey
    device: torch.device
    weights: str


class Made(NamedTuple):
    """A layer, and what it took."""

    layer: bytes
    generating: float  # seconds
    waiting: float
    batch: int


class Bundle(NamedTuple):
    """A cloud bundle whose parts belong together; the weights are not read yet."""

    name: str
    versions: Versions
    key: Ed25519PrivateKey
    weights: str


def read_bundle(folder: Path) -> Bundle:
    """A cloud bundle as `make export` wrote it.

    Raises:
        CheckpointError: it is none, damaged, or its parts do not belong together.
    """
    part = folder / "cloud.json"
    try:
        settings = json.loads(part.read_text(encoding="utf-8"))
        if settings.pop("digest", None) != json_digest(settings):
            raise ValueError("changed since it was exported, or of an older export")
        versions = Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"]))
        public = settings["public_key"]
        name, weights = str(settings["name"]), WEIGHTS[WEIGHTS.index(settings["weights"])]
        part = folder / "signing_key.pem"
        key = load_pem_private_key(part.read_bytes(), password=None)
        part = folder / "generator.safetensors"
        found = digest(part.read_bytes())
    except Exception as error:  # whatever stands there
        raise CheckpointError(
            f"{part}: not a part of a cloud bundle ({type(error).__name__}: {error}): make export writes one"
        ) from error
    if found != versions.generator:
        raise CheckpointError(f"{folder}: generator.safetensors is not the one that cloud.json tells of: export anew")
    if not isinstance(key, Ed25519PrivateKey) or key.public_key().public_bytes_raw().hex() != public:
        raise CheckpointError(f"{folder}: signing_key.pem is not the key that devices know: restore it, or export anew")
    return Bundle(name, versions, key, weights)


def load(folder: Path, weights: str = "") -> Served:
    """A cloud bundle in memory, on a GPU where there is one.

    Args:
        folder: the bundle.
        weights: their precision, in place of the bundle's choice.

    Raises:
        CheckpointError: see `read_bundle`.
    """
    bundle = read_bundle(folder)
    generator = Generator.load(folder / "generator.safetensors")
    weights = weights or bundle.weights
    if weights == "bfloat16":
        generator.round_weights()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    served = Served(
        bundle.name, generator.to(device), generator.layouts(), bundle.versions, bundle.key, device, weights
    )
    nothing = Upload(served.layouts[0], served.versions, torch.zeros(WIDTH).numpy())
    answer(served, [(bytes(UPLOAD_BYTES), nothing)])  # what the first one would wait for
    return served


def answer(served: Served, waiting: Sequence[tuple[bytes, Upload]]) -> list[bytes]:
    """The layers for uploads, as they came and as they were read: each encoded and signed."""
    uploads = torch.stack([torch.from_numpy(upload.feature.copy()) for _, upload in waiting]).to(served.device)
    uploads[uploads.abs() < NOTHING] = 0
    with torch.inference_mode():
        parts = served.generator(uploads)
        sent = {}
        for kind in {upload.layout.kind for _, upload in waiting}:
            sent[kind] = [part.cpu().numpy() for part in served.generator.matrices(parts, kind)]
    return [
        encode_layer(
            [part[place] for part in sent[upload.layout.kind]], content, upload.layout, served.versions, served.key
        )
        for place, (content, upload) in enumerate(waiting)
    ]


class Batcher:
    """Answers what waits, together, in a thread of its own.

    Args:
        served: the bundle.
        places: requests that may be inside at once.
    """

    def __init__(self, served: Served, places: int) -> None:
        self.served, self.free = served, places
        self._waiting: asyncio.Queue[tuple[bytes, Upload, float, asyncio.Future[Made]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "generator")
        self._task = asyncio.create_task(self._run())

    def enter(self) -> bool:
        """Take a place, if one is free; `leave` gives it back."""
        if self.free == 0:
            return False
        self.free -= 1
        return True

    def leave(self) -> None:
        """Give a place back."""
        self.free += 1

    async def sent(self) -> None:
        """The reply is out: `leave`, on the event loop and not in a thread."""
        self.leave()

    async def layer(self, content: bytes, upload: Upload) -> Made:
        """The layer for an upload, signed."""
        made: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((content, upload, perf_counter(), made))
        return await made

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [item for item in batch if not item[3].done()]  # whose client has left
            if not batch:
                continue
            start = perf_counter()
            try:
                layers = await loop.run_in_executor(self._thread, answer, self.served, [item[:2] for item in batch])
            except Exception as error:
                for *_, made in batch:
                    if not made.done():
                        made.set_exception(error)
                continue
            seconds = perf_counter() - start
            for (_, _, came, made), layer in zip(batch, layers, strict=True):
                if not made.done():
                    made.set_result(Made(layer, seconds, start - came, len(batch)))

    async def stop(self) -> None:
        """Let the thread go; nothing waits any more."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()


class Metrics:
    """What is counted, over all processes of a service."""

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        self.replies = Counter("cdc_mmpg_replies", "replies by status", ["status"], registry=self._own)
        self.sent = Counter("cdc_mmpg_layer_bytes", "bytes of layers sent, by kind", ["kind"], registry=self._own)
        self.seconds = Histogram("cdc_mmpg_seconds", "from headers to reply", registry=self._own)
        self.generating = Histogram("cdc_mmpg_generating_seconds", "of a batch", registry=self._own)
        self.batch = Histogram(
            "cdc_mmpg_batch", "uploads answered at once", buckets=[1, 2, 4, 8, 16, 32], registry=self._own
        )

    def page(self) -> bytes:
        """As Prometheus reads it."""
        registry = self._own
        if COUNTS in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


class Service:
    """The endpoints of one process.

    Args:
        settings: what is served, and to whom.

    Raises:
        ConfigError: the file of keys has none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.keys, self.metrics = settings, read_keys(settings.keys), Metrics()
        self.batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Read the weights while the process answers already; at the end let the generator go."""
        tasks = [asyncio.create_task(self._start())]
        if COUNTS in os.environ:
            tasks.append(asyncio.create_task(self._watch()))
        yield
        for task in tasks:
            task.cancel()
        if self.batcher is not None:
            await self.batcher.stop()
        log("stopped")

    async def _start(self) -> None:
        try:
            served = await asyncio.to_thread(load, Path(self.settings.bundle), self.settings.weights)
        except Exception:
            logger.exception("no service")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        gc.collect()
        gc.freeze()  # what is there stays: looking through it again and again makes every hundredth request late
        self.batcher = Batcher(served, self.settings.places)
        log("ready", **described(served), device=str(served.device), processors=count_processors())

    async def _watch(self) -> None:
        """One of several processes ends with their supervisor: it would hold the port, and nobody would replace it."""
        supervisor = os.getppid()
        while os.getppid() == supervisor:
            await asyncio.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    async def health(self, _: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        """The weights are there."""
        if self.batcher is None:
            return failure(503, "loading", "the weights are being read")
        return JSONResponse({"status": "ready", **described(self.batcher.served)})

    async def count(self, _: Request) -> Response:
        """Metrics."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def layer(self, request: Request) -> Response:
        """A layer for an upload, or why there is none."""
        start = perf_counter()
        refusal = self._refusal(request)
        reply, fields = (refusal, {}) if refusal is not None else await self._reply(request)
        seconds = perf_counter() - start
        self.metrics.replies.labels(reply.status_code).inc()
        self.metrics.seconds.observe(seconds)
        log("layer", status=reply.status_code, milliseconds=round(1000 * seconds, 2), **fields)
        return reply

    def _refusal(self, request: Request) -> Response | None:
        """Why a request may not come in; None takes a place for it."""
        if self.keys and not admitted(request.headers.get("authorization", ""), self.keys):
            return failure(401, "key", "no key that is known here: Authorization: Bearer <key>")
        if self.batcher is None:
            return failure(503, "loading", "the weights are being read")
        if not self.batcher.enter():
            return failure(503, "full", f"{self.settings.places} requests are inside already")
        return None

    async def _reply(self, request: Request) -> tuple[Response, dict[str, Any]]:
        """What a request that has a place is told, and what the log says of it."""
        assert self.batcher is not None
        made: Made | None = None
        try:
            content = await read_body(request)
            upload = decode_upload(content, self.batcher.served.layouts, self.batcher.served.versions)
            made = await self.batcher.layer(content, upload)
        except UploadRejected as error:
            return failure(STATUS.get(error.reason, 400), error.reason, error.detail), {"reason": error.reason}
        except HTTPException as error:
            return failure(error.status_code, "body", str(error.detail)), {"reason": "body"}
        finally:
            if made is None:
                self.batcher.leave()
        kind = upload.layout.kind
        self.metrics.sent.labels(kind).inc(len(made.layer))
        self.metrics.generating.observe(made.generating)
        self.metrics.batch.observe(made.batch)
        timing = f"generate;dur={1000 * made.generating:.3f}, wait;dur={1000 * made.waiting:.3f}"
        leave = BackgroundTask(self.batcher.sent)
        reply = Whole(made.layer, 200, {"Server-Timing": timing}, BYTES, leave)
        return reply, {"kind": kind, "bytes": len(made.layer), "batch": made.batch}


class Whole(Response):
    """A reply that ends when the client has read it, but for what its socket holds: until then its place is taken."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body, wait until it is gone, end."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        if self.background is not None:
            await self.background()


def app() -> FastAPI:
    """The service of a process that `main` started."""
    configure_logs()
    service = Service(Settings(**json.loads(os.environ[SETTINGS])))
    api = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=service.lifespan)
    api.add_api_route("/health", service.health)
    api.add_api_route("/ready", service.ready)
    api.add_api_route("/metrics", service.count)
    api.add_api_route(PATH, service.layer, methods=["POST"])

    @api.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, "http", str(error.detail))

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return failure(500, "failed", type(error).__name__)

    return api


def described(served: Served) -> dict[str, Any]:
    """What is served, for those who ask and for the log."""
    versions = {name: value.hex() for name, value in served.versions._asdict().items()}
    kinds = [layout.kind for layout in served.layouts]
    return {"model": served.name, **versions, "weights": served.weights, "kinds": kinds}


async def read_body(request: Request) -> bytes:
    """As many bytes as an upload has.

    Raises:
        HTTPException: another number was declared or came, or they came too slowly.
    """
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) != UPLOAD_BYTES:
        raise HTTPException(413 if int(declared) > UPLOAD_BYTES else 400,
                            f"{declared} bytes declared: an upload has {UPLOAD_BYTES}")  # fmt: skip
    content = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > UPLOAD_BYTES:
                    raise HTTPException(413, f"more than the {UPLOAD_BYTES} bytes of an upload")
    except ClientDisconnect as error:
        raise HTTPException(400, f"the client left after {len(content)} of {UPLOAD_BYTES} bytes") from error
    except TimeoutError as error:
        raise HTTPException(408, f"{len(content)} of {UPLOAD_BYTES} bytes came in {BODY_SECONDS} s") from error
    return content


def failure(status: int, error: str, detail: str) -> JSONResponse:
    """A refusal, after which the connection closes: what the client still sends is not read."""
    headers = {"Connection": "close"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error, "detail": detail}, status, headers)


def read_keys(path: str) -> list[bytes]:
    """The digests of the keys in a file, one a line; none where there is no file to read.

    Raises:
        ConfigError: it is not there, or empty.
    """
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no file of keys ({error}); KEYS= names one, with a key a line") from error
    if not any(lines):
        raise ConfigError(f"{path}: no key in it; write one a line")
    return [digest(line.encode()) for line in lines if line]


def admitted(authorization: str, keys: Sequence[bytes]) -> bool:
    """Whether a header brings a key, in a time that does not depend on which or on how much of one."""
    scheme, _, key = authorization.partition(" ")
    given = digest(key.strip().encode("latin-1", "replace"))  # the bytes as they came
    same = [hmac.compare_digest(given, own) for own in keys]
    return any(same) and scheme.lower() == "bearer"


class Protocol(H11Protocol):
    """uvicorn's HTTP with a clock: it has none between a connection and the end of a request's headers."""

    _clock: asyncio.TimerHandle | None = None
    _idle = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers."""
        transport.set_write_buffer_limits(1, 0)  # see `Whole`
        # asyncio does so, but not for the sockets that several processes share: 40 ms between headers and body.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._wind(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """The first bytes of the next request: wait for its headers."""
        if self._idle:
            self._idle = False
            self._wind(HEADER_SECONDS)
        super().data_received(data)

    def handle_events(self) -> None:
        """A request came: wait for its reply."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._wind(REQUEST_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._idle = True
        self._wind(IDLE_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        if self._clock is not None:
            self._clock.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is."""
        body = json.dumps({"error": "http", "detail": msg}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                   (b"connection", b"close")]  # fmt: skip
        events: list[h11.Event] = [h11.Response(status_code=400, headers=headers), h11.Data(data=body)]
        with suppress(h11.LocalProtocolError):  # in the middle of a reply there is nothing to say
            for event in [*events, h11.EndOfMessage()]:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wind(self, seconds: float) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self.loop.call_later(seconds, self.transport.abort)


class JSONLines(logging.Formatter):
    """Every record as a line of JSON: when, how grave, what, and its fields; never a feature or a key."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "process": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log(event: str, **fields: Any) -> None:
    """A line of the log."""
    logger.info(event, extra={"fields": fields})


def configure_logs() -> None:
    """All logs of this process as lines of JSON on the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a bundle until SIGTERM or SIGINT; returns the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="the cloud's service: features in, weights of last layers out")
    parser.add_argument("bundle", type=Path, help="the cloud/ folder of an export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes; with two or more a lost one is replaced")
    parser.add_argument("--places", type=int, default=256, help="requests inside a process at once")
    parser.add_argument(
        "--keys", default="", help="a file with a key a line; without, everyone on this machine may ask"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="", help="in place of the bundle's choice")
    parser.add_argument("--certificate", help="PEM, for https")
    parser.add_argument("--certificate-key", help="PEM, for https")
    options = parser.parse_args(arguments)
    return exit_code(lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    """Check what can be checked at once, then serve.

    Raises:
        CheckpointError: the bundle is none.
        ConfigError: options that do not go together.
    """
    if options.workers < 1 or options.places < 1:
        raise ConfigError("workers and places are at least 1 (WORKERS=, ARGS=--places=)")
    if not options.keys and not is_loopback(options.host):
        raise ConfigError(
            f"{options.host} can be reached from other machines, and without keys everyone may ask: give a file of "
            "them (KEYS=), or serve on 127.0.0.1"
        )
    if bool(options.certificate) != bool(options.certificate_key):
        raise ConfigError("https needs both a certificate and its key (CERTIFICATE=, CERTIFICATE_KEY=)")
    for path in (options.certificate, options.certificate_key):
        if path and not Path(path).is_file():
            raise ConfigError(f"{path}: no such file (CERTIFICATE=, CERTIFICATE_KEY=)")
    read_keys(options.keys)
    load(options.bundle, options.weights)
    try:
        with socket.create_server((options.host, options.port), family=family(options.host)):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{options.host}:{options.port} cannot be had ({error}); PORT= names another") from error
    configure_logs()
    if options.keys and not options.certificate and not is_loopback(options.host):
        logger.warning("keys are sent without encryption: end https here (CERTIFICATE=) or in what stands before")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 65_536), hard), hard))
    settings = Settings(str(options.bundle), options.keys, options.places, options.weights)
    os.environ[SETTINGS] = json.dumps(settings._asdict())
    with tempfile.TemporaryDirectory() as counts:
        if options.workers > 1:
            os.environ[COUNTS] = counts
        uvicorn.run(
            "cdc_mmpg.cloud:app",
            factory=True,
            host=options.host,
            port=options.port,
            workers=options.workers,
            http="cdc_mmpg.cloud:Protocol",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=4096,
            timeout_graceful_shutdown=GRACE_SECONDS,
            timeout_keep_alive=int(IDLE_SECONDS),
            timeout_worker_healthcheck=START_SECONDS,
            h11_max_incomplete_event_size=16_384,
            ssl_certfile=options.certificate,
            ssl_keyfile=options.certificate_key,
        )
    if options.workers > 1:  # a single process leaves by the signal itself
        raise SystemExit(128 + signal.SIGTERM)


def family(host: str) -> socket.AddressFamily:
    """Of an address or a name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
