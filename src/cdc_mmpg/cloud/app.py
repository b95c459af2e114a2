"""ASGI application of the cloud service: answers an uploaded feature with the signed weights of a last layer.

    POST /v1/layer   an upload of `wire` -> a layer of `wire`; errors are JSON: {"error": ..., "detail": ...}
    GET  /health     200 while the process answers
    GET  /ready      200 once the weights are loaded, 503 before
    GET  /metrics    counts in the Prometheus format
    GET  /           with `--web`: the browser's page and its files (see `pages`)

The body is read first, limited to the length of an upload and to `BODY_SECONDS`; then the request takes one of
`--places` places, of which no client (a key or an address) can take all, or is refused (503, Retry-After). Invalid
requests are refused before they reach FastAPI, and are logged as counts (see `limits`). Requests are stateless, so any
number of such processes can run behind a load balancer.
"""

import asyncio
import gc
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cdc_mmpg.cloud.batcher import Batcher
from cdc_mmpg.cloud.keys import find_key, read_keys
from cdc_mmpg.cloud.limits import FULL_DETAIL, RETRY_SECONDS, Door, Loop, compute_connection_limit, name_network
from cdc_mmpg.cloud.logs import configure_logs, log_event, logger
from cdc_mmpg.cloud.model import describe_model, load_model
from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.processors import count_processors
from cdc_mmpg.wire.messages import LAYER_PATH, UPLOAD_BYTES, Reason, Upload, UploadRejected, decode_upload

OCTET_STREAM = "application/octet-stream"
BODY_SECONDS = 5.0  # time limit from the end of the headers to the end of the body
SEND_CHUNK_BYTES = 65_536  # size of the pieces in which a reply is written
SUPERVISOR_CHECK_SECONDS = 1.0  # interval at which a process checks that its supervisor runs
# Environment variables: the settings of a service's processes, and the folder of their shared metrics.
SETTINGS_VARIABLE, METRICS_VARIABLE = "CDC_MMPG_CLOUD", "PROMETHEUS_MULTIPROC_DIR"
UPLOAD_STATUSES: dict[Reason, int] = {"encoder": 409, "generator": 409, "range": 422}  # 400 for other reasons
ABSOLUTE_URL = re.compile("https?://[^/]*(/.*)", re.IGNORECASE | re.DOTALL)
UPLOAD_KEY = "cdc_mmpg.upload"  # key in a request's scope of the `AdmittedUpload` that `Gate` has read


class Settings(NamedTuple):
    """Settings of a service process."""

    bundle: str  # folder of the cloud bundle
    keys: str  # file with one key per line; with "", no key is required
    places: int  # maximum requests in flight: queued, computed or being sent
    weights: str  # "float32" or "bfloat16"; "" for the bundle's choice
    supervisor: int  # process ID of the supervisor; 0 without one
    address: str = ""  # URL of the service, for the log
    web: str = ""  # folder of the export whose files browsers may load; with "", there is no page
    origins: tuple[str, ...] = ()  # other origins whose pages may request layers


class Metrics:
    """Counters of replies, bytes, times and batches, summed over all processes of a service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.replies = Counter("cdc_mmpg_replies", "replies by status", ["status"], registry=self._registry)
        self.sent = Counter("cdc_mmpg_layer_bytes", "bytes of layers sent, by kind", ["kind"], registry=self._registry)
        self.seconds = Histogram("cdc_mmpg_seconds", "seconds from headers to reply", registry=self._registry)
        self.generating = Histogram("cdc_mmpg_generating_seconds", "seconds per batch", registry=self._registry)
        self.batch = Histogram(
            "cdc_mmpg_batch", "uploads per batch", buckets=[1, 2, 4, 8, 16, 32], registry=self._registry
        )

    def render(self) -> bytes:
        """Return all counts in the Prometheus format."""
        registry = self._registry
        if METRICS_VARIABLE in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


class AdmittedUpload(NamedTuple):
    """An upload that was read and accepted."""

    content: bytes
    upload: Upload
    start: float  # `perf_counter` time at the end of the headers


class Service:
    """The endpoints of one process.

    Args:
        settings: settings of this process.

    Raises:
        ConfigError: the file of keys, or the page, cannot be used.
        CheckpointError: the page's export has no device bundle.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.keys, self.metrics = settings, read_keys(settings.keys), Metrics()
        self.door = Door(settings.places, compute_connection_limit(), self.metrics.replies)
        self.batcher: Batcher | None = None
        self.send_page: Callable[[Request], Awaitable[Response]] | None = None
        if settings.web:
            from cdc_mmpg.cloud.pages import Page  # noqa: PLC0415  it imports the device's packages

            self.send_page = Page(Path(settings.web)).send

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Load the weights in the background, and stop the generator at shutdown."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        loop.door = self.door
        tasks = [asyncio.create_task(self._load_model())]
        if self.settings.supervisor:
            tasks.append(asyncio.create_task(self._watch_supervisor()))
        yield
        for task in tasks:
            task.cancel()
        if self.batcher is not None:
            await self.batcher.stop()
        log_event("stopped")

    async def _load_model(self) -> None:
        try:
            served = await asyncio.to_thread(load_model, Path(self.settings.bundle), self.settings.weights)
        except CDCError as error:
            logger.error("start failed", extra={"fields": {"error": f"{type(error).__name__}: {error}"}})
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except Exception:
            logger.exception("start failed")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        gc.collect()
        gc.freeze()  # permanent objects: scanning them repeatedly delays every hundredth request
        self.batcher = Batcher(served)
        host = {"address": self.settings.address, "device": str(served.device), "processors": count_processors()}
        log_event("ready", **describe_model(served), **host)

    async def _watch_supervisor(self) -> None:
        """End this process when its supervisor has exited: an orphan would keep the port and never be replaced."""
        while os.getppid() == self.settings.supervisor:
            await asyncio.sleep(SUPERVISOR_CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    async def report_health(self, _: Request) -> Response:
        """Reply that the process is alive."""
        return JSONResponse({"status": "alive"})

    async def report_ready(self, _: Request) -> Response:
        """Reply 200 if the weights are loaded, else 503."""
        if self.batcher is None:
            return make_refusal(503, "loading", "the weights are still loading")
        return JSONResponse({"status": "ready", **describe_model(self.batcher.served)})

    async def report_metrics(self, _: Request) -> Response:
        """Reply with the metrics of all processes."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def answer_upload(self, request: Request) -> Response:
        """Reply with the layer for an upload that `Gate` has admitted."""
        assert self.batcher is not None
        content, upload, start = request.scope[UPLOAD_KEY]
        try:
            generated = await self.batcher.generate(content, upload)
        except DataError as error:
            remedy = "" if upload.layout.kind == "float32" else ": request a float32 layer"
            return self.refuse(422, "finite", f"{error}{remedy}")
        milliseconds = 1000 * (perf_counter() - start)
        kind = upload.layout.kind
        self.metrics.replies.labels(200).inc()
        self.metrics.seconds.observe(milliseconds / 1000)
        self.metrics.sent.labels(kind).inc(len(generated.content))
        self.metrics.generating.observe(generated.generating)
        self.metrics.batch.observe(generated.batch)
        fields = {"kind": kind, "bytes": len(generated.content), "batch": generated.batch}
        log_event("layer", status=200, milliseconds=round(milliseconds, 2), **fields)
        timing = f"generate;dur={1000 * generated.generating:.3f}, wait;dur={1000 * generated.waiting:.3f}"
        return BackpressuredResponse(generated.content, 200, {"Server-Timing": timing}, OCTET_STREAM)

    def refuse(self, status: int, error: str, detail: str) -> Response:
        """Count a refusal and return its response."""
        self.door.refusals.count(status, error)
        return make_refusal(status, error, detail)


class Refused(Exception):
    """A refused request.

    Args:
        status: HTTP status of the reply.
        error: reason in one word.
        detail: reason in a sentence.
    """

    def __init__(self, status: int, error: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.error, self.detail = status, error, detail


class ClientLeft(Exception):
    """End of a connection before its upload was complete."""


class Gate:
    """ASGI application that reads uploads, refuses invalid ones, and passes all other requests to FastAPI.

    Args:
        service: endpoints and shared state of this process.
        api: FastAPI application with the endpoints.
    """

    def __init__(self, service: Service, api: FastAPI) -> None:
        self._service, self._api = service, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (target := ABSOLUTE_URL.fullmatch(scope["path"])):
            scope["path"] = target[1]  # proxies may send absolute URLs
        if scope["type"] != "http" or scope["path"] != LAYER_PATH or scope["method"] != "POST":
            await self._api(scope, receive, send)
            return
        places, clients = self._service.door.places, [name_network(scope["client"][0])]
        try:
            scope[UPLOAD_KEY] = await self._read(scope, receive, clients)
            if not places.take(*clients):
                raise Refused(503, "full", FULL_DETAIL)
        except Refused as refused:
            await self._service.refuse(refused.status, refused.error, refused.detail)(scope, receive, send)
            return
        except ClientLeft:
            return  # `Protocol` counts it
        try:
            await self._api(scope, receive, send)
        finally:
            places.give_back(*clients)

    async def _read(self, scope: Scope, receive: Receive, clients: list[Hashable]) -> AdmittedUpload:
        """Read the upload of a request, and add the client's key to `clients`, the names under which it is counted.

        Raises:
            Refused: the key, the headers or the upload are invalid, or the weights are not loaded yet.
            ClientLeft: the client disconnected before the upload was complete.
        """
        start, headers = perf_counter(), scope["headers"]
        if self._service.keys:
            key = find_key([value for name, value in headers if name == b"authorization"], self._service.keys)
            if key is None:
                raise Refused(401, "key", "missing or unknown key: send the header Authorization: Bearer <key>")
            clients.append(key)
        check_length(headers)
        batcher = self._service.batcher
        if batcher is None:
            raise Refused(503, "loading", "the weights are still loading")
        content = await read_body(receive)
        try:
            return AdmittedUpload(
                content, decode_upload(content, batcher.served.layouts, batcher.served.versions), start
            )
        except UploadRejected as error:
            raise Refused(UPLOAD_STATUSES.get(error.reason, 400), error.reason, error.detail) from error


class BackpressuredResponse(Response):
    """Response that holds its place until the client has read the body, except for the part in the socket's buffer.

    The body is sent in pieces, because TLS accepts a write of any size and applies backpressure only before the next.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body in pieces, then end the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), SEND_CHUNK_BYTES):
            piece = self.body[start : start + SEND_CHUNK_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def app() -> ASGIApp:
    """Return the ASGI application for a process started by `cdc_mmpg.cloud.__main__`."""
    configure_logs()
    service = Service(Settings(**json.loads(os.environ[SETTINGS_VARIABLE])))
    api = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=service.lifespan)
    for path, endpoint in (
        ("/health", service.report_health),
        ("/ready", service.report_ready),
        ("/metrics", service.report_metrics),
    ):
        api.add_api_route(path, endpoint, methods=["GET", "HEAD"])
    api.add_api_route(LAYER_PATH, service.answer_upload, methods=["POST"])
    if service.send_page:
        api.add_api_route("/{path:path}", service.send_page, methods=["GET", "HEAD"])

    @api.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        refusal = service.refuse(error.status_code, "http", str(error.detail))
        refusal.headers.update(error.headers or {})
        return refusal

    @api.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return service.refuse(500, "failed", f"the service failed ({type(error).__name__}): see its log")

    gate = Gate(service, api)
    origins = service.settings.origins
    if not origins:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=origins,
        allow_methods=["POST"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Server-Timing", "Retry-After"],
    )


def check_length(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a request by its headers, before the body is read, if it cannot be an upload.

    Raises:
        Refused: the declared length is not that of an upload, or the end of the body is ambiguous.
    """
    declared = [int(value) for name, value in headers if name == b"content-length"]
    if declared and any(name == b"transfer-encoding" for name, _ in headers):
        raise Refused(400, "http", "the request has both Content-Length and Transfer-Encoding: send only one of them")
    if declared and declared[0] != UPLOAD_BYTES:
        raise Refused(413 if declared[0] > UPLOAD_BYTES else 400, "body",
                      f"Content-Length is {declared[0]}: an upload has {UPLOAD_BYTES} bytes")  # fmt: skip


async def read_body(receive: Receive) -> bytes:
    """Read a request's body.

    Raises:
        Refused: the body is longer than an upload, or arrived too slowly.
        ClientLeft: the connection closed before the end of the body.
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
                    raise Refused(413, "body", f"the body has more than the {UPLOAD_BYTES} bytes of an upload")
                if not message["more_body"]:
                    return content
    except TimeoutError as error:
        raise Refused(408, "body", f"{len(content)} of {UPLOAD_BYTES} bytes arrived in {BODY_SECONDS} s") from error


def make_refusal(status: int, error: str, detail: str) -> JSONResponse:
    """Return a refusal that closes the connection, so that the rest of the request is not read."""
    headers = {"Connection": "close"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error, "detail": detail}, status, headers)
