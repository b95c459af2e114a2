"""The service as a real process on a real socket: correct layers, refusals, overload, kills, keys and TLS."""

import asyncio
import hashlib
import json
import os
import random
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client import CollectorRegistry, Counter
from test_wire import ENCODER, GENERATOR, KIND, MAGIC, MESSAGE, OTHER, SHAPE, VERSION, mutate_bytes, patch_bytes

from cdc_mmpg.cloud import __main__ as command
from cdc_mmpg.cloud import limits
from cdc_mmpg.cloud.batcher import Batcher, GeneratedLayer
from cdc_mmpg.cloud.keys import find_key, read_keys
from cdc_mmpg.cloud.model import load_model, read_cloud_bundle
from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.files import hash_json
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.wire.messages import (
    HEADER,
    LAYER_PATH,
    UPLOAD_BYTES,
    Layout,
    Versions,
    compute_digest,
    decode_layer,
    decode_upload,
    encode_upload,
)
from cdc_mmpg.wire.payloads import INT8_MAX, decode_matrices, encode_matrices
from deployments import Cloud, Kind, build_cloud_bundle, build_generator

LARGE_OUTPUTS = 501  # outputs: a layer is larger than what the socket takes at once
PLACES = 4
HOST = "127.0.0.1"
TIMEOUT_SECONDS = 20  # time limit for everything that a test waits for
CHUNKED = b"Transfer-Encoding: chunked"
CLOSE = b"Connection: close"
KEY_ENCODING = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


class Model(NamedTuple):
    """Bundle with its generator, which computes here what the service should answer."""

    bundle: Path
    generator: Generator
    versions: Versions
    key: object
    rounding: float = 0  # of weights in bfloat16

    @property
    def layouts(self) -> list[Layout]:
        return self.generator.layouts()

    def make_upload(self, seed: int, kind: str = "") -> bytes:
        """Return an upload of a random feature."""
        return self.encode_feature(np.random.default_rng(seed).uniform(-1, 1, FEATURE_DIM), kind)

    def encode_feature(self, feature: np.ndarray, kind: str = "") -> bytes:
        layout = next(layout for layout in self.layouts if layout.kind == (kind or self.generator.native))
        return encode_upload(feature.astype(np.float32), layout, self.versions)

    def accepts(self, body: bytes, upload: bytes, of: bytes = b"") -> bool:
        """Return whether a body is the layer for an upload, up to rounding; `of`: that for another upload's feature."""
        layout = decode_upload(upload, self.layouts, self.versions).layout
        feature = decode_upload(of or upload, self.layouts, self.versions).feature.copy()
        feature[np.abs(feature) < 1e-12] = 0
        with torch.inference_mode():
            matrices = self.generator.matrices(self.generator(torch.from_numpy(feature)[None]), layout.kind)
        expected = decode_matrices(
            encode_matrices([matrix[0].numpy() for matrix in matrices], layout.precision),
            layout.shapes,
            layout.precision,
        )
        received = decode_layer(body, upload, layout, self.versions, self.key)
        tolerance = self.rounding + {"float32": 1e-5, "float16": 2.0**-10, "int8": 1.02 / INT8_MAX}[layout.precision]
        return all(
            (np.abs(a - b) <= tolerance * np.abs(b).max(axis=1, keepdims=True)).all()
            for a, b in zip(received, expected, strict=True)
        )


class Reply(NamedTuple):
    """HTTP reply."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def refusal(self) -> tuple[int, str]:
        """Return status and reason of a refusal, whose form is checked."""
        assert self.headers["content-type"] == "application/json"
        content = json.loads(self.body)
        assert set(content) == {"error", "detail"}
        assert all(isinstance(value, str) and value for value in content.values())
        return self.status, content["error"]


def build_post(content: bytes, *headers: bytes, length: int | None = None, path: str = LAYER_PATH) -> bytes:
    """Return a POST request as bytes."""
    if CHUNKED not in headers:
        headers = (*headers, b"Content-Length: %d" % (len(content) if length is None else length))
    return b"\r\n".join([b"POST %s HTTP/1.1" % path.encode(), b"Host: cloud", *headers, b"", content])


def encode_chunks(content: bytes, size: int) -> bytes:
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def parse_reply(data: bytes, bodiless: bool = False) -> Reply | None:
    """Return the first complete reply, if there is one; that to HEAD has no body."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split()[1])
    if status == 100:
        return parse_reply(body)
    headers = dict(line.lower().split(": ", 1) for line in lines)
    length = 0 if bodiless else int(headers["content-length"])
    return Reply(status, headers, body[:length]) if len(body) >= length else None


def receive(connection: socket.socket, bodiless: bool = False) -> Reply | None:
    """Read a reply; return None where the other side closed before its first byte. Half a reply is an error."""
    data = b""
    while (reply := parse_reply(data, bodiless)) is None:
        try:
            received = connection.recv(1 << 16)
        except ConnectionError:
            received = b""
        if not received:
            assert not data, f"cut after {len(data)} bytes: {data[:200]!r}"
            return None
        data += received
    return reply


def connect(port: int, source: str = HOST) -> socket.socket:
    return socket.create_connection((HOST, port), TIMEOUT_SECONDS, (source, 0))


def connect_slowly(port: int, source: str = HOST) -> socket.socket:
    """Return a connection that takes little data at a time, as over radio."""
    connection = socket.socket()
    connection.settimeout(TIMEOUT_SECONDS)
    connection.bind((source, 0))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.connect((HOST, port))
    return connection


def reset(connection: socket.socket) -> None:
    """Close a connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send_request(port: int, request: bytes, source: str = HOST) -> Reply:
    """Send one request on a new connection; return its reply."""
    with connect(port, source) as connection:
        connection.sendall(request)
        reply = receive(connection)
    assert reply is not None
    return reply


def get(port: int, path: str) -> Reply:
    return send_request(port, b"GET %s HTTP/1.1\r\nHost: cloud\r\n\r\n" % path.encode())


def send_concurrently(port: int, requests: Sequence[bytes]) -> list[Reply | None]:
    """Send requests on one connection each, all of them opened before the first is sent; return the replies."""

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Reply | None:
        data = b""
        with suppress(ConnectionError):
            writer.write(request)
            while parse_reply(data) is None and (received := await reader.read(1 << 16)):
                data += received
        writer.close()
        assert not data or parse_reply(data) is not None, f"cut after {len(data)} bytes"
        return parse_reply(data)

    async def exchange_all() -> list[Reply | None]:
        opened = await asyncio.gather(*(asyncio.open_connection(HOST, port) for _ in requests))
        return await asyncio.gather(
            *(exchange(*streams, request) for streams, request in zip(opened, requests, strict=True))
        )

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    return asyncio.run(exchange_all())


def wait_until(condition, message: str = "", seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait for a condition; fail with a message when it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def read_resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")  # Linux
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text()).group(1)) if status.exists() else 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Return a bundle of each kind."""

    def build(kind: Kind, outputs: int) -> Model:
        folder = tmp_path_factory.mktemp(kind)
        versions = build_cloud_bundle(folder, kind, outputs)
        key = serialization.load_pem_private_key((folder / "signing_key.pem").read_bytes(), None).public_key()
        return Model(folder, Generator.load(folder / "generator.safetensors"), versions, key)

    return {"low_rank": build("low_rank", 17), "full": build("full", LARGE_OUTPUTS), "basis": build("basis", 17)}


@pytest.fixture(scope="module")
def rounded(models: dict[str, Model]) -> Model:
    """Return the model with large layers, its weights in bfloat16."""
    model = models["full"]._replace(
        generator=Generator.load(models["full"].bundle / "generator.safetensors"), rounding=2.0**-7
    )
    model.generator.round_weights()
    return model


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["low_rank"]


class Services:
    """Services that start in parallel."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._pool = folder, ThreadPoolExecutor(2)
        self._all: dict[str, tuple[Cloud, Future[Cloud]]] = {}

    def add(self, name: str, bundle: Path, *options: str, https: bool = False) -> None:
        running = Cloud(bundle, self.folder / f"{name}.log", *options)
        running.url = running.url.replace("http:", "https:") if https else running.url
        self._all[name] = running, self._pool.submit(running.start)

    def __getitem__(self, name: str) -> Cloud:
        return self._all[name][1].result()

    def stop(self) -> None:
        self._pool.shutdown()
        for running, _ in self._all.values():
            running.stop()


KEYS = ["first-key-4711", "zweiter Schlüssel"]


@pytest.fixture(scope="module")
def services(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Yield the services under test, as processes."""
    folder = tmp_path_factory.mktemp("services")
    (folder / "keys").write_text("\n" + "\n".join(KEYS) + " \n\n", encoding="utf-8")
    write_certificate(folder)
    https = {"keys": "keys", "certificate": "certificate.pem", "certificate-key": "key.pem"}
    running = Services(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "certificate.pem"))  # for the health checks while they start
        running.add("cloud", models["low_rank"].bundle)
        running.add("narrow", models["full"].bundle, f"--places={PLACES}", "--weights=bfloat16")
        running.add("twofold", models["basis"].bundle, "--workers=2")
        options = [f"--{name}={folder / file}" for name, file in https.items()]
        running.add("secured", models["full"].bundle, f"--places={PLACES}", "--weights=float32", *options, https=True)
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="module")
def cloud(services: Services) -> Cloud:
    """Return the service that most tests use."""
    return services["cloud"]


@pytest.fixture(scope="module")
def narrow(services: Services) -> Cloud:
    """Return a service with few places, large layers, and weights in bfloat16."""
    return services["narrow"]


@pytest.fixture(scope="module")
def twofold(services: Services) -> Cloud:
    """Return a service of two processes."""
    running = services["twofold"]
    wait_until(lambda: len(list_workers(running)) >= 2, "one process alone", 60)
    return running


@pytest.fixture(scope="module")
def secured(services: Services) -> tuple[Cloud, Path]:
    """Return a service with keys and TLS, and its certificate."""
    return services["secured"], services.folder / "certificate.pem"


def write_certificate(folder: Path) -> None:
    """Write a self-signed certificate and its key."""
    private, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(private.private_bytes(*KEY_ENCODING))


def list_workers(running: Cloud) -> list[int]:
    """Return the ids of all processes that have ever been ready."""
    return [int(str(line["process"])) for line in running.read_log() if line["event"] == "ready"]


# Answered requests


def test_the_service_logs_its_address(cloud):
    (ready,) = (line for line in cloud.read_log() if line["event"] == "ready")
    assert ready["address"] == f"http://{HOST}:{cloud.port}"


@pytest.mark.parametrize(
    ("kind", "running", "offered", "weights"),
    [
        ("low_rank", "cloud", ["float32", "float16", "int8", "low_rank"], "float32"),
        ("full", "narrow", ["float32", "float16", "int8"], "bfloat16"),
        ("basis", "twofold", ["float32", "float16", "int8", "basis"], "float32"),
    ],
)
def test_a_layer_is_what_the_generator_computes_from_the_upload(
    kind, running, offered, weights, models, rounded, request
):
    model, port = rounded if kind == "full" else models[kind], request.getfixturevalue(running).port
    ready = json.loads(get(port, "/ready").body)
    assert (ready["model"], ready["kinds"], ready["weights"]) == (f"test/{kind}", offered, weights)
    assert (ready["encoder"], ready["generator"]) == tuple(version.hex() for version in model.versions)
    for layout in model.layouts:
        upload, other = model.make_upload(1, layout.kind), model.make_upload(2, layout.kind)
        reply = send_request(port, build_post(upload))
        assert (reply.status, reply.headers["content-type"]) == (200, "application/octet-stream")
        assert len(reply.body) == layout.message_bytes
        assert model.accepts(reply.body, upload)
        assert not model.accepts(reply.body, upload, of=other)


def test_the_same_upload_gets_the_same_layer(cloud, model):
    for layout in model.layouts:
        upload = model.make_upload(3, layout.kind)
        first, second = (send_request(cloud.port, build_post(upload)).body for _ in range(2))
        assert first == second


def test_a_layer_does_not_depend_on_its_batch(cloud, model):
    first_upload = model.make_upload(0)
    uploads = [first_upload] + [model.make_upload(seed, model.layouts[seed % 4].kind) for seed in range(1, 160)]
    first_body = send_request(cloud.port, build_post(first_upload)).body
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(partial(send_request, cloud.port), [build_post(upload) for upload in uploads]))
    assert all(model.accepts(reply.body, upload) for reply, upload in zip(replies, uploads, strict=True))
    batches = [line["batch"] for line in cloud.read_log() if line.get("status") == 200]
    assert max(batches) > 1, "nothing was answered together"
    assert model.accepts(first_body, first_upload)


@pytest.mark.parametrize("size", [1, 7, 835, 836])
def test_an_upload_may_come_in_chunks(size, cloud, model):
    upload = model.make_upload(4)
    reply = send_request(cloud.port, build_post(encode_chunks(upload, size), CHUNKED))
    assert reply.status == 200
    assert model.accepts(reply.body, upload)


def test_a_connection_serves_sequential_and_pipelined_requests(cloud, model):
    uploads = [model.make_upload(seed) for seed in range(8)]
    with connect(cloud.port) as connection:
        for upload in uploads:
            connection.sendall(build_post(upload))
            assert model.accepts(receive(connection).body, upload)
        connection.sendall(b"".join(map(build_post, uploads)))
        data, length = b"", model.layouts[-1].message_bytes
        for upload in uploads:
            while parse_reply(data) is None:
                data += connection.recv(1 << 16)
            body = parse_reply(data).body
            assert len(body) == length
            assert model.accepts(body, upload)
            data = data[data.index(b"\r\n\r\n") + 4 + length :]
    assert not data


@pytest.mark.parametrize("value", [0, 1, -1, 0.5, 1e-45, 1e-40, 1e-38, 1e-12, -1e-30])
@pytest.mark.parametrize(("kind", "running"), [("low_rank", "cloud"), ("full", "narrow"), ("basis", "twofold")])
def test_constant_and_tiny_features_are_answered(kind, running, value, models, rounded, request):
    model, port = rounded if kind == "full" else models[kind], request.getfixturevalue(running).port
    uploads = [model.encode_feature(np.full(FEATURE_DIM, value), layout.kind) for layout in model.layouts]
    for upload in uploads:
        reply = send_request(port, build_post(upload))
        assert reply.status == 200
        assert model.accepts(reply.body, upload)


def test_health_and_metrics_are_served(cloud):
    assert (get(cloud.port, "/health").status, get(cloud.port, "/health").body) == (200, b'{"status":"alive"}')
    page = get(cloud.port, "/metrics")
    assert page.status == 200
    assert b"cdc_mmpg_seconds_bucket" in page.body


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_head_is_answered_as_get_without_a_body(path, cloud):
    with connect(cloud.port) as connection:
        connection.sendall(b"HEAD %s HTTP/1.1\r\nHost: cloud\r\nConnection: close\r\n\r\n" % path.encode())
        head, full = receive(connection, bodiless=True), get(cloud.port, path)
        assert connection.recv(1) == b""
    assert head.status == 200
    assert head.headers["content-type"] == full.headers["content-type"]
    if path != "/metrics":  # whose counters go on
        assert head.headers["content-length"] == full.headers["content-length"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW", "CONNECT"])
@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", LAYER_PATH])
def test_a_wrong_method_is_refused_with_the_allowed_ones(path, method, cloud):
    reply = send_request(cloud.port, f"{method} {path} HTTP/1.1\r\nHost: cloud\r\n\r\n".encode())
    assert reply.refusal == (405, "http")
    allowed = {"post"} if path == LAYER_PATH else {"get", "head"}
    assert set(reply.headers["allow"].split(", ")) == allowed


def test_an_absolute_request_target_is_accepted(cloud, model):
    upload = model.make_upload(5)
    reply = send_request(cloud.port, build_post(upload, path=f"http://cloud.example:80{LAYER_PATH}"))
    assert model.accepts(reply.body, upload)
    assert get(cloud.port, "http://cloud/health").status == 200


# Refused requests


def build_patched_post(offset: int, new: bytes, model: Model) -> bytes:
    return build_post(patch_bytes(model.make_upload(0), offset, new))


def build_post_with_value(value: float, model: Model) -> bytes:
    return build_patched_post(HEADER.size + 400, np.array(value, "<f4").tobytes(), model)


@pytest.mark.parametrize(
    ("build", "status", "reason"),
    [
        (lambda model: build_post(b""), 400, "body"),
        (lambda model: build_post(model.make_upload(0)[:-1]), 400, "body"),
        (lambda model: build_post(model.make_upload(0) + b"\0"), 413, "body"),
        (lambda model: build_post(model.make_upload(0)[HEADER.size :]), 400, "body"),
        (lambda model: build_post(bytes(100_000)), 413, "body"),
        (lambda model: build_post(encode_chunks(model.make_upload(0)[:-1], 100), CHUNKED), 400, "length"),
        (lambda model: build_post(encode_chunks(model.make_upload(0) + b"\0", 100), CHUNKED), 413, "body"),
        (lambda model: build_post(encode_chunks(b"", 100), CHUNKED), 400, "length"),
        (lambda model: b"POST /v1/layer HTTP/1.1\r\nHost: cloud\r\n\r\n", 400, "length"),
        (lambda model: build_post(b'{"feature": [0.5, 0.25]}', b"Content-Type: application/json"), 400, "body"),
        (lambda model: build_post(b'{"feature": ['.ljust(UPLOAD_BYTES - 2, b"0") + b"]}"), 400, "magic"),
        (lambda model: build_post(np.zeros(209, np.float32).tobytes()), 400, "magic"),
        (partial(build_patched_post, MAGIC, b"CDCN"), 400, "magic"),
        (partial(build_patched_post, VERSION, b"\x02"), 400, "version"),
        (partial(build_patched_post, MESSAGE, b"\x01"), 400, "message"),
        (partial(build_patched_post, KIND, b"\x04"), 400, "kind"),  # basis, which this service does not offer
        (partial(build_patched_post, KIND, b"\xff"), 400, "kind"),
        (partial(build_patched_post, SHAPE, b"\xff\xff\xff\x7f"), 400, "shape"),
        (partial(build_patched_post, ENCODER, OTHER), 409, "encoder"),
        (partial(build_patched_post, GENERATOR, OTHER), 409, "generator"),
        (partial(build_post_with_value, np.nan), 422, "range"),
        (partial(build_post_with_value, np.inf), 422, "range"),
        (partial(build_post_with_value, -np.inf), 422, "range"),
        (partial(build_post_with_value, 1.5), 422, "range"),
        (lambda model: build_post(model.make_upload(0), path="/v2/layer"), 404, "http"),
        (lambda model: build_post(model.make_upload(0), path="/docs"), 404, "http"),
        (lambda model: build_post(model.make_upload(0), path="/v1/layer/../../etc/passwd"), 404, "http"),
        (lambda model: build_post(model.make_upload(0), path="/health"), 405, "http"),
        (lambda model: b"GET /v1/layer HTTP/1.1\r\nHost: cloud\r\n\r\n", 405, "http"),
        (lambda model: build_post(model.make_upload(0)).replace(b"POST", b"BREW"), 405, "http"),
        (lambda model: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, "http"),
        (lambda model: random.Random(0).randbytes(2000) + b"\r\n\r\n", 400, "http"),
        (lambda model: build_post(model.make_upload(0), b"Content-Length: 12"), 400, "http"),
        (lambda model: build_post(model.make_upload(0)).replace(b"Length: 836", b"Length: -1"), 400, "http"),
        (lambda model: build_post(b"zz\r\n", CHUNKED), 400, "http"),
        (lambda model: build_post(model.make_upload(0), b"Transfer-Encoding: gzip"), 400, "http"),
        (
            lambda model: build_post(encode_chunks(model.make_upload(0), 99), CHUNKED, b"Content-Length: 836"),
            400,
            "http",
        ),
        (lambda model: b"GET /health HTTP/1.1\r\nHost: cloud\r\nX: " + b"a" * 200_000, 400, "http"),
    ],
)
def test_a_faulty_request_is_refused_with_its_reason(build, status, reason, cloud, model):
    assert send_request(cloud.port, build(model)).refusal == (status, reason)


@pytest.mark.parametrize("path", ["/v1/layer/", "/health/"])
def test_a_path_with_a_trailing_slash_is_unknown(path, cloud):
    assert get(cloud.port, path).refusal == (404, "http")


def test_a_declared_gigabyte_is_refused_before_it_is_sent(cloud):
    before = read_resident_bytes(cloud.process.pid)
    with connect(cloud.port) as connection:
        connection.sendall(build_post(b"", length=1 << 30))
        assert receive(connection).refusal == (413, "body")
        assert connection.recv(1) == b""
    assert read_resident_bytes(cloud.process.pid) - before < 50e6


@pytest.mark.parametrize("path", [LAYER_PATH, "/nowhere"])
def test_a_gigabyte_that_is_sent_anyway_is_not_buffered(path, cloud):
    before, sent, chunk = read_resident_bytes(cloud.process.pid), 0, bytes(1 << 20)
    with connect(cloud.port) as connection, suppress(ConnectionError):
        connection.sendall(build_post(b"", length=1 << 30, path=path))
        while sent < 1 << 30:
            connection.sendall(chunk)
            sent += len(chunk)
    assert sent < 100e6
    assert read_resident_bytes(cloud.process.pid) - before < 50e6


def test_endless_chunks_are_cut_off(cloud):
    before = read_resident_bytes(cloud.process.pid)
    with connect(cloud.port) as connection:
        connection.sendall(build_post(b"", CHUNKED))
        connection.settimeout(0.02)
        reply = None
        for _ in range(100):
            connection.sendall(b"40\r\n" + bytes(64) + b"\r\n")
            with suppress(TimeoutError):
                reply = receive(connection)
                break
        assert reply is not None
        assert reply.refusal == (413, "body")
        connection.settimeout(TIMEOUT_SECONDS)
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
    assert read_resident_bytes(cloud.process.pid) - before < 50e6


def test_slow_senders_are_closed_but_not_slow_readers_and_idle_connections(cloud, secured, narrow, model, rounded):
    request, large = build_post(model.make_upload(0)), rounded.make_upload(0)
    idle, reader = connect(cloud.port), connect_slowly(narrow.port)
    idle.sendall(request)
    assert receive(idle).status == 200
    reader.sendall(build_post(large))
    expiry = time.monotonic() + limits.HEADER_SECONDS + 0.5
    slow = {name: connect(cloud.port) for name in ("silent", "headers", "body", "next headers")}
    slow["handshake"] = connect(secured[0].port)
    slow["headers"].sendall(request[:25])
    slow["body"].sendall(request[:-400])
    slow["next headers"].sendall(request)
    assert receive(slow["next headers"]).status == 200
    slow["next headers"].sendall(request[:25])
    slow["handshake"].sendall(b"\x16\x03\x01")
    closed: dict[str, Reply | None] = {}
    deadline, number = time.monotonic() + TIMEOUT_SECONDS, 0
    while len(closed) < len(slow):
        assert time.monotonic() < deadline, f"still open: {set(slow) - set(closed)}"
        upload = model.make_upload(number := number + 1)
        assert model.accepts(send_request(cloud.port, build_post(upload)).body, upload)  # other clients, meanwhile
        for name, piece in (("headers", b"X: y\r\n"), ("next headers", b"X: y\r\n"), ("body", b"\0")):
            with suppress(OSError):  # the time limit is for the whole request, not for a piece
                if name not in closed:
                    slow[name].sendall(piece)
        for name, connection in slow.items():
            if name not in closed:
                connection.settimeout(0.03)
                with suppress(TimeoutError):
                    closed[name] = receive(connection)
    for connection in slow.values():
        connection.close()
    assert closed.pop("body").refusal == (408, "body")
    assert set(closed.values()) == {None}
    time.sleep(max(0, expiry - time.monotonic()))
    with idle, reader:
        idle.sendall(request)
        assert receive(idle).status == 200
        assert rounded.accepts(receive(reader).body, large)


# Concurrent clients


def test_a_thousand_concurrent_requests_are_answered_or_refused(cloud, model):
    uploads = [model.make_upload(seed % 50) for seed in range(1000)]
    replies = send_concurrently(cloud.port, [build_post(upload) for upload in uploads])
    assert {reply.status for reply in replies} <= {200, 503}
    assert sum(reply.status == 200 for reply in replies) >= 128  # half of the places, for one address
    for reply, upload in zip(replies, uploads, strict=True):
        if reply.status == 200:
            assert model.accepts(reply.body, upload)
        else:
            assert reply.refusal == (503, "full")


OTHER_ADDRESSES = [f"127.0.0.{number}" for number in range(2, 2 + PLACES)]  # of this machine, in place of other hosts


@contextmanager
def take_all_places(running: Cloud, upload: bytes) -> Iterator[list[socket.socket]]:
    """Take all places with clients of several addresses that do not read their layers."""
    request, taken = build_post(upload), []

    def take_anew() -> bool:
        """Take all places; return whether none was still held by an earlier client."""
        while taken:
            taken.pop().close()
        for source in OTHER_ADDRESSES:
            taken.append(connect_slowly(running.port, source))
            taken[-1].sendall(request)
        wait_until(lambda: send_request(running.port, request).status == 503, "more places than there were")
        status_lines = [connection.recv(12, socket.MSG_PEEK) for connection in taken]
        return set(status_lines) == {b"HTTP/1.1 200"}

    wait_until(take_anew, "fewer places than there were")
    yield taken
    for connection in taken:
        connection.close()


def check_that_no_place_is_lost(running: Cloud, model: Model) -> None:
    """Check that all places can be taken and that their clients are answered."""
    upload = model.make_upload(0)
    with take_all_places(running, upload) as taken:
        for connection in taken:
            assert model.accepts(receive(connection).body, upload)


def test_requests_beyond_the_places_are_refused_with_a_retry_time(narrow, rounded):
    upload = rounded.make_upload(0)
    request = build_post(upload)
    with take_all_places(narrow, upload) as taken:
        for beginning in (request, request[:-1]):  # refused before or after it is parsed
            with connect(narrow.port) as connection:
                connection.sendall(beginning)
                time.sleep(0.1)
                connection.sendall(request[len(beginning) :])
                reply = receive(connection)
                assert reply.refusal == (503, "full")
                assert int(reply.headers["retry-after"]) >= 1
                assert connection.recv(1) == b""
        assert get(narrow.port, "/health").status == get(narrow.port, "/ready").status == 200
        assert receive(taken[0]).status == 200
        wait_until(lambda: send_request(narrow.port, request).status == 200)


def test_slow_bodies_and_headers_take_no_place(narrow, rounded):
    request, slow = build_post(rounded.make_upload(0, "int8")), []
    for number in range(10 * PLACES):
        for part in (request[:-1], request[:40]):
            slow.append(connect(narrow.port, OTHER_ADDRESSES[number % PLACES]))
            slow[-1].sendall(part)
    time.sleep(0.2)
    statuses = {send_request(narrow.port, request).status for _ in range(10)}
    for connection in slow:
        connection.close()
    assert statuses == {200}


def test_one_address_cannot_take_all_places(narrow, rounded):
    request, other = build_post(rounded.make_upload(0)), build_post(rounded.make_upload(1, "int8"))
    wait_until(lambda: send_request(narrow.port, request).status == 200)
    readers = [connect_slowly(narrow.port, OTHER_ADDRESSES[0]) for _ in range(2 * PLACES)]
    for connection in readers:
        connection.sendall(request)
    status_lines = [connection.recv(12, socket.MSG_PEEK) for connection in readers]
    statuses = {send_request(narrow.port, other).status for _ in range(10)}
    for connection in readers:
        connection.close()
    assert statuses == {200}
    assert status_lines.count(b"HTTP/1.1 200") == PLACES // 2
    assert status_lines.count(b"HTTP/1.1 503") == len(readers) - PLACES // 2


def test_one_key_cannot_take_all_places(secured, models):
    (running, certificate), model = secured, models["full"]
    context = ssl.create_default_context(cafile=str(certificate))

    def post_over_tls(source: str, key: str, kind: str) -> socket.socket:
        connection = context.wrap_socket(connect_slowly(running.port, source), server_hostname=HOST)
        connection.sendall(build_post(model.make_upload(0, kind), b"Authorization: Bearer " + key.encode()))
        return connection

    readers = [post_over_tls(source, KEYS[0], "float32") for source in OTHER_ADDRESSES]
    status_lines = [connection.recv(12) for connection in readers]
    statuses = set()
    for _ in range(5):
        with post_over_tls(OTHER_ADDRESSES[0], KEYS[1], "int8") as connection:
            statuses.add(receive(connection).status)
    for connection in readers:
        connection.close()
    assert statuses == {200}
    assert status_lines.count(b"HTTP/1.1 200") == PLACES // 2


class ManualListener:
    """Listener in this process whose connections a test accepts itself."""

    def __init__(self, places: int, connections: int) -> None:
        self.metric = Counter("replies", "by status", ["status"], registry=CollectorRegistry())
        self.door = limits.Door(places, connections, self.metric)
        self.listener = limits.Listener(socket.create_server((HOST, 0)), self.door)
        self.listener.listen()
        self.listener.settimeout(0.2)
        self.port = self.listener.getsockname()[1]

    def accept(self) -> socket.socket | None:
        """Return the next connection that is admitted, if there is one."""
        try:
            return self.listener.accept()[0]
        except (TimeoutError, BlockingIOError):
            return None


def test_one_address_cannot_take_all_connections_and_releases_them():
    async def run() -> None:
        server = ManualListener(places=1, connections=8)
        with server.listener:
            clients = [connect(server.port, OTHER_ADDRESSES[0]) for _ in range(8)]
            accepted = [server.accept() for _ in range(5)]
            assert [connection is not None for connection in accepted] == [True] * 4 + [False]
            for client in clients[4:]:
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            with connect(server.port, OTHER_ADDRESSES[1]), server.accept() as other:
                assert other is not None
            for connection in accepted[:4]:
                connection.close()
                connection.close()  # releases its place only once
            assert server.door.connections.free == 8
            for client in clients:
                client.close()

    asyncio.run(run())


def test_only_a_complete_upload_without_a_free_place_is_refused_by_the_listener():
    async def run() -> None:
        server = ManualListener(places=1, connections=100)
        complete = build_post(bytes(UPLOAD_BYTES))
        with server.listener:
            with connect(server.port) as client:  # while there is a free place
                client.sendall(complete)
                assert server.accept() is not None
            assert server.door.places.take("somebody else")
            with connect(server.port) as client:
                client.sendall(complete)
                assert server.accept() is None
                assert receive(client).refusal == (503, "full")
                assert client.recv(1) == b""  # closed without a reset
            for request in (
                complete[:-1],
                complete[:30],
                b"",
                b"GET /health HTTP/1.1\r\nHost: cloud\r\n\r\n".ljust(2000),
            ):
                with connect(server.port) as client:
                    client.sendall(request)
                    with server.accept() as connection:
                        assert connection.recv(4000, socket.MSG_DONTWAIT) == request if request else True

    asyncio.run(run())


def test_places_are_shared_fairly():
    places = limits.Shares(12)
    assert sum(places.take("a") for _ in range(12)) == 6
    assert sum(places.take("b") for _ in range(12)) == 3
    assert sum(places.take("c") for _ in range(12)) == 2
    assert not places.take("a", "d")  # either name of a client counts
    assert places.take("d")
    assert places.free == 0
    places.give_back("a")
    assert places.take("e")
    assert limits.Shares(1).take("alone")


def test_addresses_are_grouped_by_network():
    assert limits.name_network("127.0.0.1") != limits.name_network("127.0.0.2")
    assert limits.name_network("2001:db8::1") == limits.name_network("2001:db8::2:3")
    assert limits.name_network("2001:db8::1") != limits.name_network("2001:db8:0:1::1")
    assert limits.name_network("::ffff:10.0.0.1") != limits.name_network("::ffff:10.0.0.2")
    assert limits.name_network("fe80::1%eth0") == limits.name_network("fe80::2%eth0")


def test_admitted_requests_are_answered_under_fifty_fold_overload(narrow, rounded):
    uploads = [rounded.make_upload(seed, "float16") for seed in range(50 * PLACES)]
    replies = send_concurrently(narrow.port, [build_post(upload) for upload in uploads])
    assert {reply.status for reply in replies} == {200, 503}
    for reply, upload in zip(replies, uploads, strict=True):
        if reply.status == 200:
            assert rounded.accepts(reply.body, upload)
        else:
            assert reply.refusal == (503, "full")
            assert int(reply.headers["retry-after"]) >= 1
    check_that_no_place_is_lost(narrow, rounded)


def test_a_client_that_disconnects_releases_its_place(narrow, rounded):
    request = build_post(rounded.make_upload(0))
    for leave in (reset, socket.socket.close):
        for part in (request[:40], request[:-UPLOAD_BYTES], request[:-300], request):
            for number in range(2 * PLACES):
                connection = connect(narrow.port)
                connection.sendall(part)
                time.sleep(0.002 * number)
                leave(connection)
        for _ in range(2 * PLACES):  # in the middle of a reply
            connection = connect_slowly(narrow.port)
            connection.sendall(request)
            connection.recv(100)
            leave(connection)
    check_that_no_place_is_lost(narrow, rounded)


def test_a_client_that_disconnects_is_not_logged_as_an_error(narrow, rounded):
    connection = connect(narrow.port)
    connection.sendall(build_post(rounded.make_upload(0))[:-300])
    time.sleep(0.2)
    reset(connection)
    time.sleep(0.2)
    assert [line["event"] for line in narrow.read_log() if line["level"] == "error"] == []


# Kills


class Load:
    """Eight clients that send requests until the block ends."""

    def __init__(self, port: int, rounded: Model) -> None:
        self.port, self.model, self.answered, self.refused = port, rounded, 0, 0
        self.failures: list[BaseException] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(8)]

    def _run(self, seed: int) -> None:
        upload = self.model.make_upload(seed, "int8")
        while not self._stopped.is_set():
            try:
                with connect(self.port) as connection:
                    connection.sendall(build_post(upload))
                    reply = receive(connection)
            except ConnectionError:
                reply = None
            except AssertionError as error:  # cut
                self.failures.append(error)
                return
            if reply is None:
                self.refused += 1
                time.sleep(0.02)
            elif reply.status != 200 or not self.model.accepts(reply.body, upload):
                self.failures.append(AssertionError(f"{reply.status}, or another layer"))
            else:
                self.answered += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
def test_the_service_restarts_after_a_kill_and_finishes_its_requests_on_sigterm(models, tmp_path):
    model = models["full"]
    upload = model.make_upload(0)
    running = Cloud(model.bundle, tmp_path / "log", "--weights=float32").start()
    with Load(running.port, model) as load:
        wait_until(lambda: load.answered > 20)
        assert running.stop(signal.SIGKILL) == -signal.SIGKILL
        load.failures.clear()  # a reply may be cut
    running.start()
    assert model.accepts(send_request(running.port, build_post(upload)).body, upload)
    with Load(running.port, model) as load, connect(running.port) as late_client, connect(running.port) as idle_client:
        wait_until(lambda: load.answered > 20)
        late_client.sendall(build_post(upload)[:-300])
        time.sleep(0.2)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: load.refused > 8, "it still takes connections")
        time.sleep(0.5)
        assert idle_client.recv(1) == b""
        late_client.sendall(upload[-300:])
        assert model.accepts(receive(late_client).body, upload)
        assert running.process.wait(TIMEOUT_SECONDS) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert load.failures == []
    assert running.read_log()[-1]["event"] == "stopped"


def test_the_service_is_alive_but_not_ready_while_it_loads_the_weights(tmp_path):
    versions = write_cloud_bundle(build_overflowing_generator(), bytes(16), "test/large", tmp_path).versions
    model = Model(tmp_path, Generator.load(tmp_path / "generator.safetensors"), versions, None)
    content = (tmp_path / "cloud.json").read_bytes()
    (tmp_path / "cloud.json").unlink()
    os.mkfifo(tmp_path / "cloud.json")  # reading it blocks until somebody writes
    running = Cloud(tmp_path, tmp_path / "log")
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(running.start)
        (tmp_path / "cloud.json").write_bytes(content)  # for the check before the service listens

        def is_alive() -> bool:
            with suppress(ConnectionError):
                return get(running.port, "/health").status == 200
            return False

        wait_until(is_alive)
        assert get(running.port, "/ready").refusal == (503, "loading")
        reply = send_request(running.port, build_post(model.make_upload(0)))
        assert reply.refusal == (503, "loading")
        assert int(reply.headers["retry-after"]) >= 1
        (tmp_path / "cloud.json").write_bytes(content)
        started.result()
    assert send_request(running.port, build_post(model.make_upload(0))).status == 200
    assert send_request(running.port, build_post(model.make_upload(0, "float16"))).refusal == (422, "finite")
    running.stop()


def sum_metric(page: bytes, name: str) -> float:
    return sum(float(line.split()[-1]) for line in page.decode().splitlines() if line.startswith(name))


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_metrics_sum_over_all_processes(twofold, models):
    model, requests = models["basis"], 0
    name = 'cdc_mmpg_replies_total{status="200"}'
    total_before = sum_metric(get(twofold.port, "/metrics").body, name)
    lines_before = len(twofold.read_log())

    def send_all(seeds: range) -> None:
        nonlocal requests
        for seed in seeds:
            upload = model.make_upload(seed)
            assert model.accepts(send_request(twofold.port, build_post(upload)).body, upload)
            requests += 1

    def have_both_answered() -> bool:
        send_all(range(10))
        return len({line["process"] for line in twofold.read_log()[lines_before:] if line["event"] == "layer"}) == 2

    wait_until(have_both_answered)
    for _ in range(10):  # whichever process answers
        assert sum_metric(get(twofold.port, "/metrics").body, name) == total_before + requests
    first_workers = list_workers(twofold)
    os.kill(first_workers[-1], signal.SIGKILL)
    wait_until(
        lambda: (
            not Path(f"/proc/{first_workers[-1]}").exists()
            or "Z" in Path(f"/proc/{first_workers[-1]}/stat").read_text()
        )
    )
    send_all(range(20))
    # The supervisor may have pinged the process just before the kill, and then waits WORKER_START_SECONDS.
    wait_until(
        lambda: len(list_workers(twofold)) > len(first_workers), "no new process", 2 * command.WORKER_START_SECONDS
    )
    assert list_workers(twofold)[-1] not in first_workers
    send_all(range(20))
    assert sum_metric(get(twofold.port, "/metrics").body, name) == total_before + requests


# Keys, certificates, and faults that prevent the start


def test_layers_need_a_valid_key_over_tls(secured, models):
    (running, certificate), model = secured, models["full"]
    upload = model.make_upload(0, "int8")
    context = ssl.create_default_context(cafile=str(certificate))

    def send_over_tls(request: bytes) -> Reply:
        with context.wrap_socket(connect(running.port), server_hostname=HOST) as connection:
            connection.sendall(request)
            reply = receive(connection)
        assert reply is not None
        return reply

    for header in (
        [],
        [b"Authorization: Bearer wrong-key-0815"],
        [b"Authorization: Bearer "],
        [b"Authorization: Bearer " + KEYS[0][:-1].encode()],
        [b"Authorization: Basic " + KEYS[0].encode()],
        [b"Authorization: " + KEYS[0].encode()],
        [b"Authorization: Bearer \xff\xfe\x80"],
        [b"X-Key: " + KEYS[0].encode()],
        [b"Authorization: Bearer " + KEYS[0].encode(), b"Authorization: Bearer " + KEYS[0].encode()],
    ):
        reply = send_over_tls(build_post(upload, *header))
        assert reply.refusal == (401, "key")
        assert reply.headers["www-authenticate"] == "bearer"
    assert send_over_tls(build_post(b"", length=1 << 30)).status == 401
    for scheme in (b"Bearer ", b"bearer ", b"Bearer  "):
        reply = send_over_tls(build_post(upload, b"Authorization: " + scheme + KEYS[0].encode()))
        assert model.accepts(reply.body, upload)
    assert send_over_tls(b"GET /health HTTP/1.1\r\nHost: cloud\r\n\r\n").status == 200
    log = running.log.read_text()
    assert not any(word in log for word in (*KEYS, "wrong-key-0815"))
    with connect(running.port) as plain:  # without TLS
        plain.sendall(build_post(upload))
        assert receive(plain) is None


def test_a_key_may_contain_non_ascii_letters(secured, models):
    (running, certificate), upload = secured, models["full"].make_upload(0)
    context = ssl.create_default_context(cafile=str(certificate))
    with context.wrap_socket(connect(running.port), server_hostname=HOST) as connection:
        connection.sendall(build_post(upload, b"Authorization: Bearer " + KEYS[1].encode()))
        assert receive(connection).status == 200


@pytest.fixture
def fail_to_start(monkeypatch, capsys):
    """Return a function that runs the command, which must fail before it listens: exit code and message."""

    def run(*arguments: object) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(command.uvicorn, "Config", lambda *_, **__: pytest.fail("it was started"))
            code = command.main([str(argument) for argument in arguments])
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return code, message

    return run


def test_an_absent_or_empty_key_file_is_refused(fail_to_start, model, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "empty", "binary", "."):
        code, message = fail_to_start(model.bundle, "--keys", tmp_path / name)
        assert code == 2
        assert str(tmp_path / name) in message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "cloud.example"])
def test_a_public_address_requires_keys(host, fail_to_start, model):
    code, message = fail_to_start(model.bundle, "--host", host)
    assert code == 2
    assert host in message
    assert "KEYS=" in message


@pytest.mark.parametrize(
    "options",
    [["--workers", "0"], ["--places", "0"], ["--certificate", "x"], ["--certificate", "x", "--certificate-key", "y"]],
)
def test_invalid_options_are_refused(options, fail_to_start, model):
    assert fail_to_start(model.bundle, *options)[0] == 2


def test_an_invalid_certificate_or_key_is_refused(fail_to_start, model, tmp_path):
    write_certificate(tmp_path)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    (tmp_path / "empty.pem").touch()
    (tmp_path / "binary.pem").write_bytes(bytes(range(256)))
    (tmp_path / "foreign.pem").write_bytes(FOREIGN_KEY)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted = private.private_bytes(*KEY_ENCODING[:2], serialization.BestAvailableEncryption(b"secret"))
    (tmp_path / "locked.pem").write_bytes(encrypted)
    pairs = [(certificate, certificate), (key, key), (key, certificate), (tmp_path, key)]
    pairs += [(certificate, tmp_path / name) for name in ("empty.pem", "binary.pem", "foreign.pem", "locked.pem")]
    pairs += [(tmp_path / name, key) for name in ("empty.pem", "binary.pem", "foreign.pem", "absent.pem")]
    for certificate_file, key_file in pairs:
        code, message = fail_to_start(model.bundle, "--certificate", certificate_file, "--certificate-key", key_file)
        assert code == 2
        assert message.startswith("ConfigError: ")
        assert "CERTIFICATE=" in message


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "-1"],
        ["--port", "65536"],
        ["--host", "no-such-host.invalid", "--keys", "keys"],
        ["--host", "a" * 64 + ".example", "--keys", "keys"],
        ["--host", "a..b", "--keys", "keys"],
        ["--host", "192.0.2.1", "--keys", "keys"],
        ["--host", "1:2", "--keys", "keys"],
    ],
)
def test_an_address_that_cannot_be_bound_is_refused(options, fail_to_start, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("key")
    code, message = fail_to_start(model.bundle, *options)
    assert code == 2
    assert options[1] in message
    assert "HOST= and PORT=" in message


@pytest.mark.parametrize("content", [b"good\nb\0ad", b"go\tod", "a\x85b".encode(), "a\u2028b".encode(), b"a\0b\0"])
def test_a_key_that_no_header_can_carry_is_refused(content, fail_to_start, model, tmp_path):
    (tmp_path / "keys").write_bytes(content)
    code, message = fail_to_start(model.bundle, "--keys", tmp_path / "keys")
    assert code == 2
    assert f"line {1 + content.count(10)}" in message
    assert "good" not in message


def test_keys_are_read_with_any_line_endings_and_without_a_byte_order_mark(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\ntwo words \r\n\r\n")
    keys = read_keys(str(tmp_path / "keys"))
    assert keys == [compute_digest(b"one"), compute_digest(b"two words")]
    assert find_key([b"Bearer two words"], keys) == keys[1]
    assert find_key([b"Bearer two"], keys) is None


def flip_bit(content: bytes) -> bytes:
    """Return a content with one bit in its middle flipped."""
    return patch_bytes(content, len(content) // 2, bytes([content[len(content) // 2] ^ 1]))


FOREIGN_KEY = ec.generate_private_key(ec.SECP256R1()).private_bytes(*KEY_ENCODING)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("generator.safetensors", None),
        ("cloud.json", None),
        ("signing_key.pem", None),
        ("generator.safetensors", flip_bit),
        ("generator.safetensors", lambda content: content[:-1]),
        ("signing_key.pem", lambda _: FOREIGN_KEY),
        ("signing_key.pem", lambda _: b""),
        ("cloud.json", lambda _: b"{"),
        ("cloud.json", lambda _: b"[]"),
        ("cloud.json", lambda content: content.replace(b'"encoder"', b'"decoder"')),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(name, damage, fail_to_start, model, tmp_path):
    for path in model.bundle.iterdir():
        content = path.read_bytes()
        if path.name != name:
            (tmp_path / path.name).write_bytes(content)
        elif damage is not None:
            (tmp_path / name).write_bytes(damage(content))
    code, message = fail_to_start(tmp_path)
    assert code == 4
    assert name in message


def test_a_bundle_with_wrong_settings_is_refused_or_equivalent(model, tmp_path, fail_to_start):
    for path in model.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bundle, content = read_cloud_bundle(tmp_path), (tmp_path / "cloud.json").read_bytes()
    settings, wrong_contents = json.loads(content), []
    for name in settings:
        values = [None, 7, 1.5, True, [], {}, "", "zz", "00", "ab" * 17, [[[]]], {"a": "b"}]
        wrong_contents += [json.dumps({**settings, name: value}).encode() for value in values]
    wrong_contents += [
        patch_bytes(content, bit // 8, bytes([content[bit // 8] ^ (1 << bit % 8)]))
        for bit in range(0, 8 * len(content), 5)
    ]
    wrong_contents += [b"", b"null", b"[" * 100_000, b"\xff\xfe", content.decode().encode("utf-16")]
    refused = 0
    for wrong_content in wrong_contents:
        (tmp_path / "cloud.json").write_bytes(wrong_content)
        try:
            loaded = read_cloud_bundle(tmp_path)
        except CheckpointError as error:
            refused += str(tmp_path) in str(error)
        else:
            assert loaded.versions.generator == bundle.versions.generator
            assert len(loaded.versions.encoder) == len(bundle.versions.encoder)
    assert refused > 0.5 * len(wrong_contents)
    code, message = fail_to_start(model.bundle / "cloud.json")  # a file in place of the folder
    assert code == 4
    assert message.startswith("CheckpointError: ")


def test_a_generator_with_non_finite_weights_is_refused(tmp_path, fail_to_start):
    broken = build_generator("low_rank")
    torch.nn.init.constant_(broken.adaptor.shared.bias, torch.nan)
    write_cloud_bundle(broken, bytes(16), "test/broken", tmp_path)
    code, message = fail_to_start(tmp_path)
    assert code == 4
    assert "generator.safetensors" in message


def test_without_torch_the_command_says_what_to_install():
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('cdc_mmpg.cloud', run_name='__main__')"
    completed = subprocess.run([sys.executable, "-c", code, "bundle"], capture_output=True, text=True, check=False)
    assert completed.returncode == 2
    assert completed.stderr.startswith("ConfigError: ")
    assert "torch" in completed.stderr
    assert len(completed.stderr.splitlines()) == 1


def build_overflowing_generator() -> Generator:
    """Return a generator whose full layers overflow float16, but not the other precisions."""
    overflowing = build_generator("low_rank")
    with torch.no_grad():
        overflowing.adaptor.shared.weight.mul_(1e6)
    return overflowing


def test_a_layer_that_overflows_its_precision_fails_only_its_own_request(tmp_path):
    write_cloud_bundle(build_overflowing_generator(), bytes(16), "test/large", tmp_path)
    served = load_model(tmp_path, "float32")

    async def generate_together() -> list[GeneratedLayer | BaseException]:
        batcher = Batcher(served)
        uploads = []
        for kind in ("int8", "float16", "float32", "float16", "low_rank"):
            layout = next(layout for layout in served.layouts if layout.kind == kind)
            content = encode_upload(np.full(FEATURE_DIM, 0.5, np.float32), layout, served.versions)
            uploads.append((content, decode_upload(content, served.layouts, served.versions)))
        layers = await asyncio.gather(*(batcher.generate(*upload) for upload in uploads), return_exceptions=True)
        await batcher.stop()
        return layers

    layers = asyncio.run(generate_together())
    assert [isinstance(layer, DataError) for layer in layers] == [False, True, False, True, False]
    assert {layer.batch for layer in layers if isinstance(layer, GeneratedLayer)} == {5}


def test_the_service_imports_no_training_library_and_fails_without_a_traceback(tmp_path):
    code = (
        "import sys; from cdc_mmpg.cloud.__main__ import main; code = main(sys.argv[1:]); "
        "print({'lightning', 'timm', 'transformers', 'torchmetrics', 'wandb', 'data_modules'} & set(sys.modules)); "
        "sys.exit(code)"
    )
    absent = tmp_path / "absent"
    completed = subprocess.run([sys.executable, "-c", code, str(absent)], capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout) == (4, "set()\n")
    assert completed.stderr.startswith(f"CheckpointError: {absent}")
    assert len(completed.stderr.splitlines()) == 1


# Logs and random requests


def test_the_log_records_every_request_but_no_feature_or_key(cloud, model):
    lines_before = len(cloud.read_log())
    value = np.float32(0.123456789)  # more digits than any time in the log has
    feature = np.full(FEATURE_DIM, value, np.float32)
    upload = model.encode_feature(feature)
    assert send_request(cloud.port, build_post(upload, b"Authorization: Bearer some-key-1234")).status == 200
    assert send_request(cloud.port, build_post_with_value(77.0625, model)).status == 422
    assert send_request(cloud.port, build_patched_post(ENCODER, OTHER, model)).status == 409
    refusals = {(422, "range"), (409, "encoder")}
    wait_until(
        lambda: refusals <= {(line.get("status"), line.get("reason")) for line in cloud.read_log()[lines_before:]}
    )
    layer_lines = [line for line in cloud.read_log()[lines_before:] if line["event"] == "layer"]
    assert [line["status"] for line in layer_lines] == [200]
    assert (layer_lines[0]["kind"], layer_lines[0]["bytes"]) == ("low_rank", model.layouts[-1].message_bytes)
    log = cloud.log.read_text()
    assert len(cloud.read_log()) == len(log.splitlines()), "not all of it is JSON"
    values = ["0.1234567", "77.0625", value.tobytes().hex(), repr(value.tobytes())[2:-1]]
    secrets = ["some-key", upload.hex()[:40], *values]
    assert not any(secret in log for secret in secrets)


def test_refusals_are_counted_and_leave_no_traceback(cloud, model):
    faults = [
        build_post(b"10\r\n0123456789abcdef\r\nzz\r\n", CHUNKED),
        build_post(b"zz\r\n", CHUNKED),
        b"\x16\x03\x01" + bytes(100),
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ]
    size, lines_before = cloud.log.stat().st_size, len(cloud.read_log())
    upgrades = b"Upgrade: websocket\r\nConnection: Upgrade"
    number, start = 40, time.monotonic()
    for seed in range(number):
        for fault in faults:
            assert send_request(cloud.port, fault).refusal == (400, "http")
        request = build_post(model.make_upload(seed), upgrades, path="/nowhere")
        assert send_request(cloud.port, request).refusal == (404, "http")
        with connect(cloud.port) as connection:
            connection.sendall(build_post(model.make_upload(seed))[:-100])

    def count_refusals(status: int, reason: str) -> int:
        lines = [line for line in cloud.read_log()[lines_before:] if line["event"] == "refused"]
        return sum(line["requests"] for line in lines if (line["status"], line["reason"]) == (status, reason))

    wait_until(lambda: count_refusals(404, "http") == number)
    wait_until(lambda: count_refusals(400, "http") == number * len(faults))
    wait_until(lambda: count_refusals(0, "left") == number)
    seconds = time.monotonic() - start
    added = cloud.log.read_bytes()[size:]
    assert b"Traceback" not in added
    assert len(added.splitlines()) <= 3 * (seconds / limits.LOG_SECONDS + 2)


ODD_PATHS = ["/", "/v1", "/v1/layers", "/%00", "/%ff", "//v1/layer", "/ready?x", "/metrics?", "*", "?", "http://",
             "http://cloud", "http://[::1/v1/layer", "https://a@b:x/v1/layer", "cloud:443", "/v1/layer?q=%zz",
             "/v1/layer;x", "/v1%2flayer", "/" + "a" * 9000]  # fmt: skip


def build_random_request(model: Model, seed: int) -> tuple[bytes, bytes]:
    """Return a random request, and the upload in it if that is sent unchanged."""
    rng = random.Random(seed)
    layout = rng.choice(model.layouts)
    upload = model.make_upload(seed % 40, layout.kind)
    if rng.random() < 0.5:
        upload = mutate_bytes(upload, rng)
    intact_upload, request = b"", build_post(upload)
    match rng.randrange(9):
        case 0:
            request = rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n"
        case 1:
            request = build_post(upload, length=rng.choice([0, 1, 835, 837, 1 << 40]))
        case 2:
            methods = [*b"GET HEAD PUT DELETE PATCH OPTIONS TRACE CONNECT post P\xd6ST".split(), b"A" * 99]
            request = request.replace(b"POST", rng.choice(methods), 1)
        case 3:
            request = build_post(upload, path=rng.choice(ODD_PATHS))
        case 4:
            request = mutate_bytes(request, rng) + b"\r\n\r\n"
        case 5:
            intact_upload, request = upload, build_post(encode_chunks(upload, rng.choice([1, 10, 800, 9000])), CHUNKED)
        case 6:
            unusual = [b"Content-Length: 836", b"Content-Length: 0", b"Host: other", b"Content-Type: a", b"Expect: x"]
            unusual += [b"Transfer-Encoding: chunked, chunked", b"Authorization: Bearer a", b"X-Forwarded-For: 1.2.3.4"]
            unusual += [
                b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
                b"Trailer: x",
                b"Connection: x",
                CHUNKED,
            ]
            request = build_post(upload, *rng.sample(unusual, 2))
        case 7:
            headers = [b"Content-Type: text/\xff", b"Cookie: " + b"a" * 9000, b"Expect: 100-continue", b"X:", CLOSE,
                       b"Upgrade: websocket\r\nConnection: Upgrade", b"Content-Encoding: gzip"]  # fmt: skip
            intact_upload, request = upload, build_post(upload, *rng.sample(headers, 2))
        case _:
            intact_upload = upload
    return request, intact_upload


FUZZED_REQUESTS = int(os.environ.get("CDC_MMPG_FUZZ", "3000"))  # 100,000 take some minutes


def test_random_requests_are_refused_or_answered_correctly(cloud, model):
    def send_many(seeds: range) -> list[int]:
        statuses, connection = [], None
        for seed in seeds:
            request, upload = build_random_request(model, seed)
            connection = connection or connect(cloud.port)
            connection.settimeout(0.2)  # it may wait for bytes that are never sent
            reply = None
            with suppress(TimeoutError, ConnectionError):
                connection.sendall(request)
                reply = receive(connection, request.startswith(b"HEAD "))
            if reply is None or "connection" in reply.headers or b"Content-Length" not in request or not upload:
                connection.close()
                connection = None
            if reply is None:
                continue
            statuses.append(reply.status)
            if reply.status != 200:
                assert reply.status < 500, reply
                assert not reply.body or reply.refusal
            elif reply.headers["content-type"] == "application/octet-stream":
                upload = upload or request[request.index(b"CDCM") :][:UPLOAD_BYTES]
                assert model.accepts(reply.body, upload)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = [
            status for part in pool.map(send_many, [range(n, FUZZED_REQUESTS, 8) for n in range(8)]) for status in part
        ]
    assert len(statuses) > 0.8 * FUZZED_REQUESTS
    assert statuses.count(200) > 0.15 * FUZZED_REQUESTS
    assert {400, 404, 405, 409, 413, 422} <= set(statuses)
    assert [line for line in cloud.read_log() if line["level"] == "error"] == []


def test_a_port_in_use_and_an_invalid_generator_file_are_refused(cloud, model, fail_to_start, tmp_path):
    for path in model.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    code, message = fail_to_start(tmp_path, "--port", str(cloud.port))
    assert code == 2
    assert "PORT=" in message
    settings = json.loads((tmp_path / "cloud.json").read_text())
    (tmp_path / "generator.safetensors").write_bytes(b"nothing")
    settings["generator"] = hashlib.sha256(b"nothing").hexdigest()[:32]
    del settings["digest"]
    (tmp_path / "cloud.json").write_text(json.dumps({**settings, "digest": hash_json(settings)}))
    code, message = fail_to_start(tmp_path)
    assert code == 4
    assert "generator.safetensors" in message
