"""The cloud's service: an uploaded feature comes in, the signed weights of a last layer go out, raw bytes both ways.

    POST /v1/layer   an upload of `wire` -> a layer of `wire`; errors are JSON: {"error": ..., "detail": ...}
    GET  /health     200 as long as the process answers
    GET  /ready      200 once the weights are there, 503 before
    GET  /metrics    for Prometheus

A body is read first, no further than an upload is long and no longer than `BODY_SECONDS`; then the request takes one of
`--places` places, of which no client (a key, an address) can take all, or is told to come again (503, Retry-After).
Uploads that wait are answered together: whenever the generator is free it takes all of them, up to `BATCH`. Everything
that can be refused is refused before FastAPI sees it, and is logged as a count (see `limits`). Any number of such
processes may stand behind a load balancer: a request needs nothing but the bundle.
"""

import argparse
import asyncio
import gc
import hmac
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

try:
    import torch
    import uvicorn
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
    from starlette.exceptions import HTTPException
    from starlette.types import Receive, Scope, Send
    from uvicorn.supervisors import Multiprocess
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"ConfigError: the service needs what a device does not ({error}): pip install '.[serve]'", file=sys.stderr)
    sys.exit(2)

from cdc_mmpg.cloud.limits import (
    ACCEPTS,
    FULL,
    IDLE_SECONDS,
    PLACES,
    RETRY_SECONDS,
    Door,
    Loop,
    connection_limit,
    name_network,
    raise_file_limit,
)
from cdc_mmpg.errors import CDCError, CheckpointError, ConfigError, DataError
from cdc_mmpg.files import json_digest
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_code
from cdc_mmpg.wire.messages import (
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
from cdc_mmpg.wire.payloads import WIDTH

logger = logging.getLogger("cdc_mmpg.cloud")

WEIGHTS = ("float32", "bfloat16")
BYTES = "application/octet-stream"
BATCH = 32  # most uploads that are answered at once
BODY_SECONDS = 5.0
PIECE_BYTES = 65_536  # of a reply that are written at once
GRACE_SECONDS = 30  # for accepted requests after SIGTERM
START_SECONDS = 60  # that a process may import before its supervisor takes it for lost
PARENT_SECONDS = 1.0  # after which a process notices that its supervisor is gone
NOTHING = 1e-12  # of a feature: numbers near the smallest that there are slow processors down a hundred times

# How the processes of one service are told what to serve, and where they count together.
SETTINGS, COUNTS = "CDC_MMPG_CLOUD", "PROMETHEUS_MULTIPROC_DIR"

STATUS: dict[Reason, int] = {"encoder": 409, "generator": 409, "range": 422}  # of other rejected uploads, 400
ABSOLUTE = re.compile("https?://[^/]*(/.*)", re.IGNORECASE | re.DOTALL)
UPLOAD = "cdc_mmpg.upload"  # where a request's scope holds what `Gate` has read


class Settings(NamedTuple):
    """What is served, and to whom."""

    bundle: str
    keys: str  # a file with a key a line; "" lets everyone in
    places: int  # requests that may wait, be answered or be sent
    weights: str  # "float32" or "bfloat16"; "" is the bundle's choice
    supervisor: int  # process that replaces a lost one; 0 where there is none


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
    try:
        answer_one(served, bytes(UPLOAD_BYTES), nothing)  # what the first request would wait for
    except DataError as error:
        raise CheckpointError(f"{folder / 'generator.safetensors'}: {error}: train and export anew") from error
    return served


def answer(served: Served, waiting: Sequence[tuple[bytes, Upload]]) -> list[bytes | DataError]:
    """Return the layers for uploads (as they came, and as they were read), each encoded and signed.

    A layer that its precision cannot hold is the error of its own upload; the others are answered.
    """
    uploads = torch.stack([torch.from_numpy(upload.feature.copy()) for _, upload in waiting]).to(served.device)
    uploads[uploads.abs() < NOTHING] = 0
    with torch.inference_mode():
        parts = served.generator(uploads)
        sent = {}
        for kind in dict.fromkeys(upload.layout.kind for _, upload in waiting):
            sent[kind] = [part.cpu().numpy() for part in served.generator.matrices(parts, kind)]
    layers: list[bytes | DataError] = []
    for place, (content, upload) in enumerate(waiting):
        matrices = [part[place] for part in sent[upload.layout.kind]]
        try:
            layers.append(encode_layer(matrices, content, upload.layout, served.versions, served.key))
        except DataError as error:
            layers.append(error)
    return layers


def answer_one(served: Served, content: bytes, upload: Upload) -> bytes:
    """Return the layer for one upload.

    Raises:
        DataError: its precision cannot hold it.
    """
    layer = answer(served, [(content, upload)])[0]
    if isinstance(layer, DataError):
        raise layer
    return layer


class Batcher:
    """Answers what waits, together, in a thread of its own.

    Args:
        served: the bundle.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self._waiting: asyncio.Queue[tuple[bytes, Upload, float, asyncio.Future[Made]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "generator")
        self._task = asyncio.create_task(self._run())

    async def layer(self, content: bytes, upload: Upload) -> Made:
        """Return the layer for an upload, signed.

        Raises:
            DataError: its precision cannot hold it.
        """
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
                if made.done():
                    continue
                if isinstance(layer, DataError):
                    made.set_exception(layer)
                else:
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


class Admitted(NamedTuple):
    """An upload that has a place."""

    content: bytes
    upload: Upload
    start: float  # when its headers had come


class Service:
    """The endpoints of one process.

    Args:
        settings: what is served, and to whom.

    Raises:
        ConfigError: the file of keys has none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.keys, self.metrics = settings, read_keys(settings.keys), Metrics()
        self.door = Door(settings.places, connection_limit(), self.metrics.replies)
        self.batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Read the weights while the process answers already; at the end let the generator go."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        loop.door = self.door
        tasks = [asyncio.create_task(self._start())]
        if self.settings.supervisor:
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
        except CDCError as error:
            logger.error("no service", extra={"fields": {"error": f"{type(error).__name__}: {error}"}})
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except Exception:
            logger.exception("no service")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        gc.collect()
        gc.freeze()  # what is there stays: looking through it again and again makes every hundredth request late
        self.batcher = Batcher(served)
        log("ready", **described(served), device=str(served.device), processors=count_processors())

    async def _watch(self) -> None:
        """One of several processes ends with their supervisor: it would hold the port, and nobody would replace it."""
        while os.getppid() == self.settings.supervisor:
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
        """Answer an upload that `Gate` has let in by a layer."""
        assert self.batcher is not None
        content, upload, start = request.scope[UPLOAD]
        try:
            made = await self.batcher.layer(content, upload)
        except DataError as error:
            return self.refuse(422, "finite", f"{error}: ask for float32")
        milliseconds = 1000 * (perf_counter() - start)
        kind = upload.layout.kind
        self.metrics.replies.labels(200).inc()
        self.metrics.seconds.observe(milliseconds / 1000)
        self.metrics.sent.labels(kind).inc(len(made.layer))
        self.metrics.generating.observe(made.generating)
        self.metrics.batch.observe(made.batch)
        fields = {"kind": kind, "bytes": len(made.layer), "batch": made.batch}
        log("layer", status=200, milliseconds=round(milliseconds, 2), **fields)
        timing = f"generate;dur={1000 * made.generating:.3f}, wait;dur={1000 * made.waiting:.3f}"
        return Whole(made.layer, 200, {"Server-Timing": timing}, BYTES)

    def refuse(self, status: int, error: str, detail: str) -> Response:
        """Return a refusal, which is counted."""
        self.door.refusals.count(status, error)
        return failure(status, error, detail)


class Refused(Exception):
    """A request that does not come in.

    Args:
        status: of the reply.
        error: the reason in one word.
        detail: the reason in a sentence.
    """

    def __init__(self, status: int, error: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.error, self.detail = status, error, detail


class ClientLeft(Exception):
    """The client closed the connection before its upload was complete."""


class Gate:
    """The ASGI application: reads uploads and refuses what does not come in; the rest goes to FastAPI.

    Args:
        service: the endpoints.
        api: the FastAPI application.
    """

    def __init__(self, service: Service, api: FastAPI) -> None:
        self._service, self._api = service, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (target := ABSOLUTE.fullmatch(scope["path"])):
            scope["path"] = target[1]  # as a proxy asks
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._api(scope, receive, send)
            return
        places, clients = self._service.door.places, [name_network(scope["client"][0])]
        try:
            scope[UPLOAD] = await self._read(scope, receive, clients)
            if not places.take(*clients):
                raise Refused(503, "full", FULL)
        except Refused as refused:
            await self._service.refuse(refused.status, refused.error, refused.detail)(scope, receive, send)
            return
        except ClientLeft:
            return  # `Protocol` counts it
        try:
            await self._api(scope, receive, send)
        finally:
            places.give_back(*clients)

    async def _read(self, scope: Scope, receive: Receive, clients: list[Hashable]) -> Admitted:
        """Return the upload of a request, and add the key of its client to the client's names.

        Raises:
            Refused: a key, the headers or the upload are not what they should be.
            ClientLeft: the upload is not complete.
        """
        start, headers = perf_counter(), scope["headers"]
        if self._service.keys:
            key = find_key([value for name, value in headers if name == b"authorization"], self._service.keys)
            if key is None:
                raise Refused(401, "key", "no key that is known here: Authorization: Bearer <key>")
            clients.append(key)
        check_length(headers)
        batcher = self._service.batcher
        if batcher is None:
            raise Refused(503, "loading", "the weights are being read")
        content = await read_body(receive)
        try:
            return Admitted(content, decode_upload(content, batcher.served.layouts, batcher.served.versions), start)
        except UploadRejected as error:
            raise Refused(STATUS.get(error.reason, 400), error.reason, error.detail) from error


class Whole(Response):
    """A reply that ends when the client has read it, but for what its socket holds: until then its place is taken.

    It is sent in pieces: TLS takes whatever is written at once, and waits before the next piece.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body, wait until it is gone, end."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            piece = self.body[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def app() -> Gate:
    """Return the service of a process that `main` started."""
    configure_logs()
    service = Service(Settings(**json.loads(os.environ[SETTINGS])))
    api = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=service.lifespan)
    for path, endpoint in (("/health", service.health), ("/ready", service.ready), ("/metrics", service.count)):
        api.add_api_route(path, endpoint, methods=["GET", "HEAD"])
    api.add_api_route(PATH, service.layer, methods=["POST"])

    @api.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        refusal = service.refuse(error.status_code, "http", str(error.detail))
        refusal.headers.update(error.headers or {})
        return refusal

    @api.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return service.refuse(500, "failed", type(error).__name__)

    return Gate(service, api)


def described(served: Served) -> dict[str, Any]:
    """What is served, for those who ask and for the log."""
    versions = {name: value.hex() for name, value in served.versions._asdict().items()}
    kinds = [layout.kind for layout in served.layouts]
    return {"model": served.name, **versions, "weights": served.weights, "kinds": kinds}


def check_length(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a request whose headers declare another length than an upload has, before its body is read.

    Raises:
        Refused: they do, or leave two ways to read the body.
    """
    declared = [int(value) for name, value in headers if name == b"content-length"]
    if declared and any(name == b"transfer-encoding" for name, _ in headers):
        raise Refused(400, "http", "both Content-Length and Transfer-Encoding")
    if declared and declared[0] != UPLOAD_BYTES:
        raise Refused(413 if declared[0] > UPLOAD_BYTES else 400, "body",
                      f"{declared[0]} bytes declared: an upload has {UPLOAD_BYTES}")  # fmt: skip


async def read_body(receive: Receive) -> bytes:
    """Return a request's body.

    Raises:
        Refused: it is longer than an upload, or came too slowly.
        ClientLeft: the connection closed before its end.
    """
    content = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                content += message["body"]
                if len(content) > UPLOAD_BYTES:
                    raise Refused(413, "body", f"more than the {UPLOAD_BYTES} bytes of an upload")
                if not message["more_body"]:
                    return content
    except TimeoutError as error:
        raise Refused(408, "body", f"{len(content)} of {UPLOAD_BYTES} bytes came in {BODY_SECONDS} s") from error


def failure(status: int, error: str, detail: str) -> JSONResponse:
    """A refusal, after which the connection closes: what the client still sends is not read."""
    headers = {"Connection": "close"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error, "detail": detail}, status, headers)


def read_keys(path: str) -> list[bytes]:
    """Return the digests of the keys in a file, one a line; none where there is no file to read.

    Raises:
        ConfigError: it is not there or empty, or a line holds what no header can carry.
    """
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no file of keys ({error}); KEYS= names one, with a key a line") from error
    if not any(lines):
        raise ConfigError(f"{path}: no key in it; write one a line")
    for number, line in enumerate(lines, 1):
        if not line.isprintable():
            raise ConfigError(f"{path}, line {number}: a character that no key can hold; write one key a line")
    return [digest(line.encode()) for line in lines if line]


def find_key(authorizations: Sequence[bytes], keys: Sequence[bytes]) -> bytes | None:
    """Return the digest of the key that the only Authorization header brings, or None where it brings none of `keys`.

    The time does not depend on which key it is or on how much of one is right.
    """
    scheme, _, key = (authorizations[0] if len(authorizations) == 1 else b"").partition(b" ")
    given = digest(key.strip())
    same = [hmac.compare_digest(given, own) for own in keys]
    return given if any(same) and scheme.lower() == b"bearer" else None


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
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every odd request, which we count


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a bundle until SIGTERM or SIGINT; returns the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="the cloud's service: features in, weights of last layers out")
    parser.add_argument("bundle", type=Path, help="the cloud/ folder of an export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes; with two or more a lost one is replaced")
    parser.add_argument("--places", type=int, default=PLACES, help="requests inside a process at once")
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
    check_certificate(options.certificate, options.certificate_key)
    read_keys(options.keys)
    load(options.bundle, options.weights)
    listener = listen(options.host, options.port)
    configure_logs()
    if options.keys and not options.certificate and not is_loopback(options.host):
        logger.warning("keys are sent without encryption: end https here (CERTIFICATE=) or in what stands before")
    raise_file_limit()
    supervisor = os.getpid() if options.workers > 1 else 0
    settings = Settings(str(options.bundle), options.keys, options.places, options.weights, supervisor)
    os.environ[SETTINGS] = json.dumps(settings._asdict())
    config = uvicorn.Config(
        "cdc_mmpg.cloud.app:app",
        factory=True,
        workers=options.workers,
        loop="cdc_mmpg.cloud.limits:Loop",
        http="cdc_mmpg.cloud.limits:Protocol",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client's address is whom its bytes come from, not what it says
        backlog=ACCEPTS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=int(IDLE_SECONDS),
        timeout_worker_healthcheck=START_SECONDS,
        h11_max_incomplete_event_size=16_384,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.certificate_key,
    )
    with listener, tempfile.TemporaryDirectory() as counts:
        if options.workers == 1:
            try:
                uvicorn.Server(config).run([listener])  # leaves by the signal that stops it
            except KeyboardInterrupt:
                raise SystemExit(128 + signal.SIGINT) from None
        else:
            os.environ[COUNTS] = counts
            Multiprocess(config, [listener]).run()
            raise SystemExit(128 + signal.SIGTERM)


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Refuse files that are no certificate with its key.

    Raises:
        ConfigError: one of two is given, or they are not there, damaged, encrypted or do not belong together.
    """
    if not certificate and not key:
        return
    if not certificate or not key:
        raise ConfigError("https needs both a certificate and its key (CERTIFICATE=, CERTIFICATE_KEY=)")
    for path in (certificate, key):
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file (CERTIFICATE=, CERTIFICATE_KEY=)")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate and its unencrypted key in PEM ({error}); CERTIFICATE= "
            "and CERTIFICATE_KEY= name them"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        ConfigError: the address does not exist here, or is in use.
    """
    try:
        return socket.create_server((host, port), family=family(host))
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"{host}:{port} cannot be had ({error}); HOST= and PORT= name another") from error


def family(host: str) -> socket.AddressFamily:
    """Of an address or a name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
