"""The cloud's service: an uploaded feature comes in, the signed weights of a last layer go out, raw bytes both ways.

    POST /v1/layer   an upload of `wire` -> a layer of `wire`; errors are JSON: {"error": ..., "detail": ...}
    GET  /health     200 as long as the process answers
    GET  /ready      200 once the weights are there, 503 before
    GET  /metrics    for Prometheus

A body is read first, no further than an upload is long and no longer than `BODY_SECONDS`; then the request takes one of
`--places` places, of which no client (a key, an address) can take all, or is refused (503, Retry-After). Everything
that can be refused is refused before FastAPI sees it, and is logged as a count (see `limits`). Any number of such
processes may stand behind a load balancer: a request needs nothing but the bundle.
"""

import asyncio
import gc
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from cdc_mmpg.cloud.batcher import Batcher
from cdc_mmpg.cloud.keys import find_key, read_keys
from cdc_mmpg.cloud.limits import FULL_DETAIL, RETRY_SECONDS, Door, Loop, connection_limit, name_network
from cdc_mmpg.cloud.logs import configure_logs, log_event, logger
from cdc_mmpg.cloud.model import describe_model, load_model
from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.processors import count_processors
from cdc_mmpg.wire.messages import LAYER_PATH, UPLOAD_BYTES, Reason, Upload, UploadRejected, decode_upload

OCTET_STREAM = "application/octet-stream"
BODY_SECONDS = 5.0  # from the end of the headers to the end of the body
SEND_CHUNK_BYTES = 65_536  # of a reply that are written at once
SUPERVISOR_CHECK_SECONDS = 1.0  # after which a process notices that its supervisor is gone
# Environment variables: the settings of one service's processes, and the folder where they count together.
SETTINGS_VARIABLE, METRICS_VARIABLE = "CDC_MMPG_CLOUD", "PROMETHEUS_MULTIPROC_DIR"
UPLOAD_STATUSES: dict[Reason, int] = {"encoder": 409, "generator": 409, "range": 422}  # of other rejected uploads, 400
ABSOLUTE_URL = re.compile("https?://[^/]*(/.*)", re.IGNORECASE | re.DOTALL)
UPLOAD_KEY = "cdc_mmpg.upload"  # where a request's scope holds what `Gate` has read


class Settings(NamedTuple):
    """What a process serves, and to whom."""

    bundle: str
    keys: str  # a file with a key a line; "" lets everyone in
    places: int  # requests that may wait, be answered or be sent
    weights: str  # "float32" or "bfloat16"; "" is the bundle's choice
    supervisor: int  # process that replaces a lost one; 0 where there is none
    address: str = ""  # where it listens, for its log


class Metrics:
    """Counters of replies, bytes, times and batches, over all processes of a service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.replies = Counter("cdc_mmpg_replies", "replies by status", ["status"], registry=self._registry)
        self.sent = Counter("cdc_mmpg_layer_bytes", "bytes of layers sent, by kind", ["kind"], registry=self._registry)
        self.seconds = Histogram("cdc_mmpg_seconds", "from headers to reply", registry=self._registry)
        self.generating = Histogram("cdc_mmpg_generating_seconds", "of a batch", registry=self._registry)
        self.batch = Histogram(
            "cdc_mmpg_batch", "uploads answered at once", buckets=[1, 2, 4, 8, 16, 32], registry=self._registry
        )

    def render(self) -> bytes:
        """Return all counts in the format of Prometheus."""
        registry = self._registry
        if METRICS_VARIABLE in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


class AdmittedUpload(NamedTuple):
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
        """Load the weights while the process answers already; stop the generator at the end."""
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
        log_event("stopped")

    async def _start(self) -> None:
        try:
            served = await asyncio.to_thread(load_model, Path(self.settings.bundle), self.settings.weights)
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
        place = {"address": self.settings.address, "device": str(served.device), "processors": count_processors()}
        log_event("ready", **describe_model(served), **place)

    async def _watch(self) -> None:
        """End this process when its supervisor is gone: it would hold the port, and nobody would replace it."""
        while os.getppid() == self.settings.supervisor:
            await asyncio.sleep(SUPERVISOR_CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    async def report_health(self, _: Request) -> Response:
        """Reply that the process answers."""
        return JSONResponse({"status": "alive"})

    async def report_ready(self, _: Request) -> Response:
        """Reply whether the weights are loaded (200) or not yet (503)."""
        if self.batcher is None:
            return make_refusal(503, "loading", "the weights are being read")
        return JSONResponse({"status": "ready", **describe_model(self.batcher.served)})

    async def report_metrics(self, _: Request) -> Response:
        """Reply with the counts of all processes."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def answer_upload(self, request: Request) -> Response:
        """Reply with the layer for an upload that `Gate` has let in."""
        assert self.batcher is not None
        content, upload, start = request.scope[UPLOAD_KEY]
        try:
            generated = await self.batcher.generate(content, upload)
        except DataError as error:
            return self.refuse(422, "finite", f"{error}: ask for float32")
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
        """Return a refusal, which is counted."""
        self.door.refusals.count(status, error)
        return make_refusal(status, error, detail)


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
        if scope["type"] == "http" and (target := ABSOLUTE_URL.fullmatch(scope["path"])):
            scope["path"] = target[1]  # as a proxy asks
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
            return AdmittedUpload(
                content, decode_upload(content, batcher.served.layouts, batcher.served.versions), start
            )
        except UploadRejected as error:
            raise Refused(UPLOAD_STATUSES.get(error.reason, 400), error.reason, error.detail) from error


class BackpressuredResponse(Response):
    """Response that holds its place until the client has read the body, but for what the socket buffers.

    It is sent in pieces: TLS takes whatever is written at once, and waits before the next piece.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body, wait until it is sent, end."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), SEND_CHUNK_BYTES):
            piece = self.body[start : start + SEND_CHUNK_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def app() -> Gate:
    """Return the ASGI application of a process that `cdc_mmpg.cloud.__main__` started."""
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

    @api.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        refusal = service.refuse(error.status_code, "http", str(error.detail))
        refusal.headers.update(error.headers or {})
        return refusal

    @api.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return service.refuse(500, "failed", type(error).__name__)

    return Gate(service, api)


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


def make_refusal(status: int, error: str, detail: str) -> JSONResponse:
    """Return a refusal, after which the connection closes: what the client still sends is not read."""
    headers = {"Connection": "close"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error, "detail": detail}, status, headers)
