"""The service as a real process on a real socket: right layers, faults refused, overload, kills, keys and TLS."""

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
from test_wire import ENCODER, GENERATOR, KIND, MAGIC, MESSAGE, OTHER, SHAPE, VERSION, mutated, patched

from cdc_mmpg.cloud import __main__ as command
from cdc_mmpg.cloud import limits
from cdc_mmpg.cloud.batcher import Batcher, GeneratedLayer
from cdc_mmpg.cloud.keys import find_key, read_keys
from cdc_mmpg.cloud.model import load_model, read_cloud_bundle
from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.files import json_digest
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.wire.messages import (
    HEADER,
    LAYER_PATH,
    UPLOAD_BYTES,
    Layout,
    Versions,
    decode_layer,
    decode_upload,
    digest,
    encode_upload,
)
from cdc_mmpg.wire.payloads import INT8_MAX, decode_matrices, encode_matrices
from deployments import Cloud, Kind, cloud_bundle, generator

LARGE = 501  # outputs, so that a layer is more than the socket takes at once
PLACES = 4
HOST = "127.0.0.1"
SECONDS = 20  # in which what should happen has happened
CHUNKED = b"Transfer-Encoding: chunked"
CLOSE = b"Connection: close"
BYTES = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


class Model(NamedTuple):
    """What a bundle answers, computed here."""

    bundle: Path
    generator: Generator
    versions: Versions
    key: object
    rounding: float = 0  # of weights in bfloat16

    @property
    def layouts(self) -> list[Layout]:
        return self.generator.layouts()

    def upload(self, seed: int, kind: str = "") -> bytes:
        """One of a random feature."""
        return self.upload_of(np.random.default_rng(seed).uniform(-1, 1, FEATURE_DIM), kind)

    def upload_of(self, feature: np.ndarray, kind: str = "") -> bytes:
        layout = next(layout for layout in self.layouts if layout.kind == (kind or self.generator.native))
        return encode_upload(feature.astype(np.float32), layout, self.versions)

    def answers(self, body: bytes, upload: bytes, of: bytes = b"") -> bool:
        """Whether a reply's body is the layer for an upload, but for what rounding may do (or that for another)."""
        layout = decode_upload(upload, self.layouts, self.versions).layout
        feature = decode_upload(of or upload, self.layouts, self.versions).feature.copy()
        feature[np.abs(feature) < 1e-12] = 0
        with torch.inference_mode():
            made = self.generator.matrices(self.generator(torch.from_numpy(feature)[None]), layout.kind)
        own = decode_matrices(
            encode_matrices([part[0].numpy() for part in made], layout.precision), layout.shapes, layout.precision
        )
        got = decode_layer(body, upload, layout, self.versions, self.key)
        step = self.rounding + {"float32": 1e-5, "float16": 2.0**-10, "int8": 1.02 / INT8_MAX}[layout.precision]
        return all(
            (np.abs(a - b) <= step * np.abs(b).max(axis=1, keepdims=True)).all() for a, b in zip(got, own, strict=True)
        )


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and reason of what has no other form."""
        assert self.headers["content-type"] == "application/json"
        told = json.loads(self.body)
        assert set(told) == {"error", "detail"}
        assert all(isinstance(value, str) and value for value in told.values())
        return self.status, told["error"]


def post(content: bytes, *headers: bytes, length: int | None = None, path: str = LAYER_PATH) -> bytes:
    """A request as bytes."""
    if CHUNKED not in headers:
        headers = (*headers, b"Content-Length: %d" % (len(content) if length is None else length))
    return b"\r\n".join([b"POST %s HTTP/1.1" % path.encode(), b"Host: cloud", *headers, b"", content])


def chunks(content: bytes, size: int) -> bytes:
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def parsed(data: bytes, bodiless: bool = False) -> Reply | None:
    """Return the first whole reply, if it is there; that to HEAD has no body."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split()[1])
    if status == 100:
        return parsed(body)
    headers = dict(line.lower().split(": ", 1) for line in lines)
    length = 0 if bodiless else int(headers["content-length"])
    return Reply(status, headers, body[:length]) if len(body) >= length else None


def receive(connection: socket.socket, bodiless: bool = False) -> Reply | None:
    """A reply; None where the other side closed before its first byte. Half a reply is an error."""
    data = b""
    while (reply := parsed(data, bodiless)) is None:
        try:
            came = connection.recv(1 << 16)
        except ConnectionError:
            came = b""
        if not came:
            assert not data, f"cut after {len(data)} bytes: {data[:200]!r}"
            return None
        data += came
    return reply


def connect(port: int, source: str = HOST) -> socket.socket:
    return socket.create_connection((HOST, port), SECONDS, (source, 0))


def slow_line(port: int, source: str = HOST) -> socket.socket:
    """Return a connection that takes little at a time, as over radio."""
    connection = socket.socket()
    connection.settimeout(SECONDS)
    connection.bind((source, 0))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.connect((HOST, port))
    return connection


def reset(connection: socket.socket) -> None:
    """Leave without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def ask(port: int, request: bytes, source: str = HOST) -> Reply:
    """Return the reply to one request on a connection of its own."""
    with connect(port, source) as connection:
        connection.sendall(request)
        reply = receive(connection)
    assert reply is not None
    return reply


def get(port: int, path: str) -> Reply:
    return ask(port, b"GET %s HTTP/1.1\r\nHost: cloud\r\n\r\n" % path.encode())


def at_once(port: int, requests: Sequence[bytes]) -> list[Reply | None]:
    """Each on a connection of its own, all of them open before the first asks."""

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Reply | None:
        data = b""
        with suppress(ConnectionError):
            writer.write(request)
            while parsed(data) is None and (came := await reader.read(1 << 16)):
                data += came
        writer.close()
        assert not data or parsed(data) is not None, f"cut after {len(data)} bytes"
        return parsed(data)

    async def talk() -> list[Reply | None]:
        opened = await asyncio.gather(*(asyncio.open_connection(HOST, port) for _ in requests))
        return await asyncio.gather(
            *(exchange(*streams, request) for streams, request in zip(opened, requests, strict=True))
        )

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    return asyncio.run(talk())


def until(condition, what: str = "", seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")  # Linux
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text()).group(1)) if status.exists() else 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A bundle of each kind."""

    def made(kind: Kind, outputs: int) -> Model:
        folder = tmp_path_factory.mktemp(kind)
        versions = cloud_bundle(folder, kind, outputs)
        key = serialization.load_pem_private_key((folder / "signing_key.pem").read_bytes(), None).public_key()
        return Model(folder, Generator.load(folder / "generator.safetensors"), versions, key)

    return {"low_rank": made("low_rank", 17), "full": made("full", LARGE), "basis": made("basis", 17)}


@pytest.fixture(scope="module")
def rounded(models: dict[str, Model]) -> Model:
    """The large one with its weights in bfloat16."""
    model = models["full"]._replace(
        generator=Generator.load(models["full"].bundle / "generator.safetensors"), rounding=2.0**-7
    )
    model.generator.round_weights()
    return model


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["low_rank"]


class Services:
    """Services that start side by side, when the first of them is needed."""

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
    """What the tests ask, as processes."""
    folder = tmp_path_factory.mktemp("services")
    (folder / "keys").write_text("\n" + "\n".join(KEYS) + " \n\n", encoding="utf-8")
    write_certificate(folder)
    https = {"keys": "keys", "certificate": "certificate.pem", "certificate-key": "key.pem"}
    running = Services(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "certificate.pem"))  # for the waiting until they are ready
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
    """The one that most tests ask."""
    return services["cloud"]


@pytest.fixture(scope="module")
def narrow(services: Services) -> Cloud:
    """One with few places, large layers, and weights in bfloat16."""
    return services["narrow"]


@pytest.fixture(scope="module")
def twofold(services: Services) -> Cloud:
    """One of two processes."""
    running = services["twofold"]
    until(lambda: len(workers(running)) >= 2, "one process alone", 60)
    return running


@pytest.fixture(scope="module")
def secured(services: Services) -> tuple[Cloud, Path]:
    """One with keys and a certificate, and that certificate."""
    return services["secured"], services.folder / "certificate.pem"


def write_certificate(folder: Path) -> None:
    """One that signed itself, and its key."""
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
    (folder / "key.pem").write_bytes(private.private_bytes(*BYTES))


def workers(running: Cloud) -> list[int]:
    """The processes that ever were ready."""
    return [int(str(line["process"])) for line in running.lines() if line["event"] == "ready"]


# What is answered


def test_the_service_says_where_it_is_reached(cloud):
    (ready,) = (line for line in cloud.lines() if line["event"] == "ready")
    assert ready["address"] == f"http://{HOST}:{cloud.port}"


@pytest.mark.parametrize(
    ("kind", "running", "offered", "weights"),
    [
        ("low_rank", "cloud", ["float32", "float16", "int8", "low_rank"], "float32"),
        ("full", "narrow", ["float32", "float16", "int8"], "bfloat16"),
        ("basis", "twofold", ["float32", "float16", "int8", "basis"], "float32"),
    ],
)
def test_a_layer_is_what_the_generator_makes_of_the_upload(kind, running, offered, weights, models, rounded, request):
    model, port = rounded if kind == "full" else models[kind], request.getfixturevalue(running).port
    ready = json.loads(get(port, "/ready").body)
    assert (ready["model"], ready["kinds"], ready["weights"]) == (f"test/{kind}", offered, weights)
    assert (ready["encoder"], ready["generator"]) == tuple(version.hex() for version in model.versions)
    for layout in model.layouts:
        upload, other = model.upload(1, layout.kind), model.upload(2, layout.kind)
        reply = ask(port, post(upload))
        assert (reply.status, reply.headers["content-type"]) == (200, "application/octet-stream")
        assert len(reply.body) == layout.message_bytes
        assert model.answers(reply.body, upload)
        assert not model.answers(reply.body, upload, of=other)


def test_the_same_upload_gets_the_same_layer(cloud, model):
    for layout in model.layouts:
        upload = model.upload(3, layout.kind)
        first, second = (ask(cloud.port, post(upload)).body for _ in range(2))
        assert first == second


def test_a_layer_does_not_depend_on_what_it_is_answered_with(cloud, model):
    alone = model.upload(0)
    uploads = [alone] + [model.upload(seed, model.layouts[seed % 4].kind) for seed in range(1, 160)]
    before = ask(cloud.port, post(alone)).body
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(partial(ask, cloud.port), [post(upload) for upload in uploads]))
    assert all(model.answers(reply.body, upload) for reply, upload in zip(replies, uploads, strict=True))
    batches = [line["batch"] for line in cloud.lines() if line.get("status") == 200]
    assert max(batches) > 1, "nothing was answered together"
    assert model.answers(before, alone)


@pytest.mark.parametrize("size", [1, 7, 835, 836])
def test_an_upload_may_come_in_chunks(size, cloud, model):
    upload = model.upload(4)
    reply = ask(cloud.port, post(chunks(upload, size), CHUNKED))
    assert reply.status == 200
    assert model.answers(reply.body, upload)


def test_a_connection_serves_many_requests_one_after_another_or_all_at_once(cloud, model):
    uploads = [model.upload(seed) for seed in range(8)]
    with connect(cloud.port) as connection:
        for upload in uploads:
            connection.sendall(post(upload))
            assert model.answers(receive(connection).body, upload)
        connection.sendall(b"".join(map(post, uploads)))
        data, length = b"", model.layouts[-1].message_bytes
        for upload in uploads:
            while parsed(data) is None:
                data += connection.recv(1 << 16)
            body = parsed(data).body
            assert len(body) == length
            assert model.answers(body, upload)
            data = data[data.index(b"\r\n\r\n") + 4 + length :]
    assert not data


@pytest.mark.parametrize("value", [0, 1, -1, 0.5, 1e-45, 1e-40, 1e-38, 1e-12, -1e-30])
@pytest.mark.parametrize(("kind", "running"), [("low_rank", "cloud"), ("full", "narrow"), ("basis", "twofold")])
def test_features_of_one_value_and_of_next_to_nothing_are_answered(kind, running, value, models, rounded, request):
    model, port = rounded if kind == "full" else models[kind], request.getfixturevalue(running).port
    uploads = [model.upload_of(np.full(FEATURE_DIM, value), layout.kind) for layout in model.layouts]
    for upload in uploads:
        reply = ask(port, post(upload))
        assert reply.status == 200
        assert model.answers(reply.body, upload)


def test_health_and_metrics_are_served(cloud):
    assert (get(cloud.port, "/health").status, get(cloud.port, "/health").body) == (200, b'{"status":"alive"}')
    page = get(cloud.port, "/metrics")
    assert page.status == 200
    assert b"cdc_mmpg_seconds_bucket" in page.body


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_head_is_answered_as_get_without_a_body(path, cloud):
    with connect(cloud.port) as connection:
        connection.sendall(b"HEAD %s HTTP/1.1\r\nHost: cloud\r\nConnection: close\r\n\r\n" % path.encode())
        head, whole = receive(connection, bodiless=True), get(cloud.port, path)
        assert connection.recv(1) == b""
    assert head.status == 200
    assert head.headers["content-type"] == whole.headers["content-type"]
    if path != "/metrics":  # which counts on
        assert head.headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW", "CONNECT"])
@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", LAYER_PATH])
def test_another_method_is_told_which_are_allowed(path, method, cloud):
    reply = ask(cloud.port, f"{method} {path} HTTP/1.1\r\nHost: cloud\r\n\r\n".encode())
    assert reply.refusal == (405, "http")
    allowed = {"post"} if path == LAYER_PATH else {"get", "head"}
    assert set(reply.headers["allow"].split(", ")) == allowed


def test_an_absolute_target_is_understood(cloud, model):
    upload = model.upload(5)
    reply = ask(cloud.port, post(upload, path=f"http://cloud.example:80{LAYER_PATH}"))
    assert model.answers(reply.body, upload)
    assert get(cloud.port, "http://cloud/health").status == 200


# What is refused


def changed(place: int, new: bytes, model: Model) -> bytes:
    return post(patched(model.upload(0), place, new))


def with_value(value: float, model: Model) -> bytes:
    return changed(HEADER.size + 400, np.array(value, "<f4").tobytes(), model)


@pytest.mark.parametrize(
    ("made", "status", "reason"),
    [
        (lambda model: post(b""), 400, "body"),
        (lambda model: post(model.upload(0)[:-1]), 400, "body"),
        (lambda model: post(model.upload(0) + b"\0"), 413, "body"),
        (lambda model: post(model.upload(0)[HEADER.size :]), 400, "body"),
        (lambda model: post(bytes(100_000)), 413, "body"),
        (lambda model: post(chunks(model.upload(0)[:-1], 100), CHUNKED), 400, "length"),
        (lambda model: post(chunks(model.upload(0) + b"\0", 100), CHUNKED), 413, "body"),
        (lambda model: post(chunks(b"", 100), CHUNKED), 400, "length"),
        (lambda model: b"POST /v1/layer HTTP/1.1\r\nHost: cloud\r\n\r\n", 400, "length"),
        (lambda model: post(b'{"feature": [0.5, 0.25]}', b"Content-Type: application/json"), 400, "body"),
        (lambda model: post(b'{"feature": ['.ljust(UPLOAD_BYTES - 2, b"0") + b"]}"), 400, "magic"),
        (lambda model: post(np.zeros(209, np.float32).tobytes()), 400, "magic"),
        (partial(changed, MAGIC, b"CDCN"), 400, "magic"),
        (partial(changed, VERSION, b"\x02"), 400, "version"),
        (partial(changed, MESSAGE, b"\x01"), 400, "message"),
        (partial(changed, KIND, b"\x04"), 400, "kind"),  # basis, which this generator has not
        (partial(changed, KIND, b"\xff"), 400, "kind"),
        (partial(changed, SHAPE, b"\xff\xff\xff\x7f"), 400, "shape"),
        (partial(changed, ENCODER, OTHER), 409, "encoder"),
        (partial(changed, GENERATOR, OTHER), 409, "generator"),
        (partial(with_value, np.nan), 422, "range"),
        (partial(with_value, np.inf), 422, "range"),
        (partial(with_value, -np.inf), 422, "range"),
        (partial(with_value, 1.5), 422, "range"),
        (lambda model: post(model.upload(0), path="/v2/layer"), 404, "http"),
        (lambda model: post(model.upload(0), path="/docs"), 404, "http"),
        (lambda model: post(model.upload(0), path="/v1/layer/../../etc/passwd"), 404, "http"),
        (lambda model: post(model.upload(0), path="/health"), 405, "http"),
        (lambda model: b"GET /v1/layer HTTP/1.1\r\nHost: cloud\r\n\r\n", 405, "http"),
        (lambda model: post(model.upload(0)).replace(b"POST", b"BREW"), 405, "http"),
        (lambda model: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, "http"),
        (lambda model: random.Random(0).randbytes(2000) + b"\r\n\r\n", 400, "http"),
        (lambda model: post(model.upload(0), b"Content-Length: 12"), 400, "http"),
        (lambda model: post(model.upload(0)).replace(b"Length: 836", b"Length: -1"), 400, "http"),
        (lambda model: post(b"zz\r\n", CHUNKED), 400, "http"),
        (lambda model: post(model.upload(0), b"Transfer-Encoding: gzip"), 400, "http"),
        (lambda model: post(chunks(model.upload(0), 99), CHUNKED, b"Content-Length: 836"), 400, "http"),
        (lambda model: b"GET /health HTTP/1.1\r\nHost: cloud\r\nX: " + b"a" * 200_000, 400, "http"),
    ],
)
def test_a_fault_is_refused_with_its_reason(made, status, reason, cloud, model):
    assert ask(cloud.port, made(model)).refusal == (status, reason)


@pytest.mark.parametrize("path", ["/v1/layer/", "/health/"])
def test_a_path_with_a_slash_too_many_is_unknown(path, cloud):
    assert get(cloud.port, path).refusal == (404, "http")


def test_a_gigabyte_that_is_declared_is_refused_before_it_comes(cloud):
    before = resident_bytes(cloud.process.pid)
    with connect(cloud.port) as connection:
        connection.sendall(post(b"", length=1 << 30))
        assert receive(connection).refusal == (413, "body")
        assert connection.recv(1) == b""
    assert resident_bytes(cloud.process.pid) - before < 50e6


@pytest.mark.parametrize("path", [LAYER_PATH, "/nowhere"])
def test_a_gigabyte_that_is_sent_all_the_same_is_not_kept(path, cloud):
    before, sent, chunk = resident_bytes(cloud.process.pid), 0, bytes(1 << 20)
    with connect(cloud.port) as connection, suppress(ConnectionError):
        connection.sendall(post(b"", length=1 << 30, path=path))
        while sent < 1 << 30:
            connection.sendall(chunk)
            sent += len(chunk)
    assert sent < 100e6
    assert resident_bytes(cloud.process.pid) - before < 50e6


def test_chunks_without_end_are_cut(cloud):
    before = resident_bytes(cloud.process.pid)
    with connect(cloud.port) as connection:
        connection.sendall(post(b"", CHUNKED))
        connection.settimeout(0.02)
        reply = None
        for _ in range(100):
            connection.sendall(b"40\r\n" + bytes(64) + b"\r\n")
            with suppress(TimeoutError):
                reply = receive(connection)
                break
        assert reply is not None
        assert reply.refusal == (413, "body")
        connection.settimeout(SECONDS)
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
    assert resident_bytes(cloud.process.pid) - before < 50e6


def test_slow_clients_are_closed_but_not_who_reads_slowly_or_comes_again_later(cloud, secured, narrow, model, rounded):
    request, large = post(model.upload(0)), rounded.upload(0)
    kept, reader = connect(cloud.port), slow_line(narrow.port)
    kept.sendall(request)
    assert receive(kept).status == 200
    reader.sendall(post(large))
    later = time.monotonic() + limits.HEADER_SECONDS + 0.5
    slow = {name: connect(cloud.port) for name in ("silent", "headers", "body", "next headers")}
    slow["handshake"] = connect(secured[0].port)
    slow["headers"].sendall(request[:25])
    slow["body"].sendall(request[:-400])
    slow["next headers"].sendall(request)
    assert receive(slow["next headers"]).status == 200
    slow["next headers"].sendall(request[:25])
    slow["handshake"].sendall(b"\x16\x03\x01")
    closed: dict[str, Reply | None] = {}
    end, number = time.monotonic() + SECONDS, 0
    while len(closed) < len(slow):
        assert time.monotonic() < end, f"still open: {set(slow) - set(closed)}"
        upload = model.upload(number := number + 1)
        assert model.answers(ask(cloud.port, post(upload)).body, upload)  # others, meanwhile
        for name, piece in (("headers", b"X: y\r\n"), ("next headers", b"X: y\r\n"), ("body", b"\0")):
            with suppress(OSError):  # it is the whole that counts
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
    time.sleep(max(0, later - time.monotonic()))
    with kept, reader:
        kept.sendall(request)
        assert receive(kept).status == 200
        assert rounded.answers(receive(reader).body, large)


# Many at once


def test_a_thousand_connections_at_once(cloud, model):
    uploads = [model.upload(seed % 50) for seed in range(1000)]
    replies = at_once(cloud.port, [post(upload) for upload in uploads])
    assert {reply.status for reply in replies} <= {200, 503}
    assert sum(reply.status == 200 for reply in replies) >= 128  # half of the places, for one address
    for reply, upload in zip(replies, uploads, strict=True):
        if reply.status == 200:
            assert model.answers(reply.body, upload)
        else:
            assert reply.refusal == (503, "full")


OTHERS = [f"127.0.0.{number}" for number in range(2, 2 + PLACES)]  # addresses of this machine, as of other hosts


@contextmanager
def all_places_taken(running: Cloud, upload: bytes) -> Iterator[list[socket.socket]]:
    """Take them by clients of several addresses that do not read their layers."""
    request, taken = post(upload), []

    def take() -> bool:
        """Whoever left last may still be inside: then one of ours is refused."""
        while taken:
            taken.pop().close()
        for source in OTHERS:
            taken.append(slow_line(running.port, source))
            taken[-1].sendall(request)
        until(lambda: ask(running.port, request).status == 503, "more places than there were")
        firsts = [connection.recv(12, socket.MSG_PEEK) for connection in taken]
        return set(firsts) == {b"HTTP/1.1 200"}

    until(take, "fewer places than there were")
    yield taken
    for connection in taken:
        connection.close()


def check_places(running: Cloud, model: Model) -> None:
    """There are as many as before."""
    upload = model.upload(0)
    with all_places_taken(running, upload) as taken:
        for connection in taken:
            assert model.answers(receive(connection).body, upload)


def test_beyond_the_places_requests_are_told_to_come_again(narrow, rounded):
    upload = rounded.upload(0)
    request = post(upload)
    with all_places_taken(narrow, upload) as taken:
        for one in (request, request[:-1]):  # refused before or after it is parsed
            with connect(narrow.port) as connection:
                connection.sendall(one)
                time.sleep(0.1)
                connection.sendall(request[len(one) :])
                reply = receive(connection)
                assert reply.refusal == (503, "full")
                assert int(reply.headers["retry-after"]) >= 1
                assert connection.recv(1) == b""
        assert get(narrow.port, "/health").status == get(narrow.port, "/ready").status == 200
        assert receive(taken[0]).status == 200
        until(lambda: ask(narrow.port, request).status == 200)


def test_slow_bodies_and_headers_take_no_place(narrow, rounded):
    request, slow = post(rounded.upload(0, "int8")), []
    for number in range(10 * PLACES):
        for part in (request[:-1], request[:40]):
            slow.append(connect(narrow.port, OTHERS[number % PLACES]))
            slow[-1].sendall(part)
    time.sleep(0.2)
    statuses = {ask(narrow.port, request).status for _ in range(10)}
    for connection in slow:
        connection.close()
    assert statuses == {200}


def test_one_address_cannot_take_all_places(narrow, rounded):
    request, other = post(rounded.upload(0)), post(rounded.upload(1, "int8"))
    until(lambda: ask(narrow.port, request).status == 200)
    readers = [slow_line(narrow.port, OTHERS[0]) for _ in range(2 * PLACES)]
    for connection in readers:
        connection.sendall(request)
    firsts = [connection.recv(12, socket.MSG_PEEK) for connection in readers]
    statuses = {ask(narrow.port, other).status for _ in range(10)}
    for connection in readers:
        connection.close()
    assert statuses == {200}
    assert firsts.count(b"HTTP/1.1 200") == PLACES // 2
    assert firsts.count(b"HTTP/1.1 503") == len(readers) - PLACES // 2


def test_one_key_cannot_take_all_places(secured, models):
    (running, certificate), model = secured, models["full"]
    context = ssl.create_default_context(cafile=str(certificate))

    def post_over_tls(source: str, key: str, kind: str) -> socket.socket:
        connection = context.wrap_socket(slow_line(running.port, source), server_hostname=HOST)
        connection.sendall(post(model.upload(0, kind), b"Authorization: Bearer " + key.encode()))
        return connection

    readers = [post_over_tls(source, KEYS[0], "float32") for source in OTHERS]
    firsts = [connection.recv(12) for connection in readers]
    statuses = set()
    for _ in range(5):
        with post_over_tls(OTHERS[0], KEYS[1], "int8") as connection:
            statuses.add(receive(connection).status)
    for connection in readers:
        connection.close()
    assert statuses == {200}
    assert firsts.count(b"HTTP/1.1 200") == PLACES // 2


class Waiting:
    """A listener in this process whose connections are accepted by hand."""

    def __init__(self, places: int, connections: int) -> None:
        self.metric = Counter("replies", "by status", ["status"], registry=CollectorRegistry())
        self.door = limits.Door(places, connections, self.metric)
        self.listener = limits.Listener(socket.create_server((HOST, 0)), self.door)
        self.listener.listen()
        self.listener.settimeout(0.2)
        self.port = self.listener.getsockname()[1]

    def accept(self) -> socket.socket | None:
        """Return the next connection that is let in, if one is."""
        try:
            return self.listener.accept()[0]
        except (TimeoutError, BlockingIOError):
            return None


def test_one_address_cannot_take_all_connections_and_gives_them_back():
    async def run() -> None:
        waiting = Waiting(places=1, connections=8)
        with waiting.listener:
            clients = [connect(waiting.port, OTHERS[0]) for _ in range(8)]
            inside = [waiting.accept() for _ in range(5)]
            assert [connection is not None for connection in inside] == [True] * 4 + [False]
            for client in clients[4:]:
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            with connect(waiting.port, OTHERS[1]), waiting.accept() as other:
                assert other is not None
            for connection in inside[:4]:
                connection.close()
                connection.close()  # gives back once
            assert waiting.door.connections.free == 8
            for client in clients:
                client.close()

    asyncio.run(run())


def test_a_whole_upload_without_room_is_refused_at_the_door_and_nothing_else_is():
    async def run() -> None:
        waiting = Waiting(places=1, connections=100)
        whole = post(bytes(UPLOAD_BYTES))
        with waiting.listener:
            with connect(waiting.port) as client:  # while there is room
                client.sendall(whole)
                assert waiting.accept() is not None
            assert waiting.door.places.take("somebody else")
            with connect(waiting.port) as client:
                client.sendall(whole)
                assert waiting.accept() is None
                assert receive(client).refusal == (503, "full")
                assert client.recv(1) == b""  # and no reset
            for request in (whole[:-1], whole[:30], b"", b"GET /health HTTP/1.1\r\nHost: cloud\r\n\r\n".ljust(2000)):
                with connect(waiting.port) as client:
                    client.sendall(request)
                    with waiting.accept() as connection:
                        assert connection.recv(4000, socket.MSG_DONTWAIT) == request if request else True

    asyncio.run(run())


def test_places_are_shared_by_need():
    places = limits.Shares(12)
    assert sum(places.take("a") for _ in range(12)) == 6
    assert sum(places.take("b") for _ in range(12)) == 3
    assert sum(places.take("c") for _ in range(12)) == 2
    assert not places.take("a", "d")  # either name counts
    assert places.take("d")
    assert places.free == 0
    places.give_back("a")
    assert places.take("e")
    assert limits.Shares(1).take("alone")


def test_networks_of_addresses():
    assert limits.name_network("127.0.0.1") != limits.name_network("127.0.0.2")
    assert limits.name_network("2001:db8::1") == limits.name_network("2001:db8::2:3")
    assert limits.name_network("2001:db8::1") != limits.name_network("2001:db8:0:1::1")
    assert limits.name_network("::ffff:10.0.0.1") != limits.name_network("::ffff:10.0.0.2")
    assert limits.name_network("fe80::1%eth0") == limits.name_network("fe80::2%eth0")


def test_of_fifty_times_too_many_those_that_come_in_are_answered(narrow, rounded):
    uploads = [rounded.upload(seed, "float16") for seed in range(50 * PLACES)]
    replies = at_once(narrow.port, [post(upload) for upload in uploads])
    assert {reply.status for reply in replies} == {200, 503}
    for reply, upload in zip(replies, uploads, strict=True):
        if reply.status == 200:
            assert rounded.answers(reply.body, upload)
        else:
            assert reply.refusal == (503, "full")
            assert int(reply.headers["retry-after"]) >= 1
    check_places(narrow, rounded)


def test_no_place_is_lost_with_a_client_that_leaves(narrow, rounded):
    request = post(rounded.upload(0))
    for leave in (reset, socket.socket.close):
        for part in (request[:40], request[:-UPLOAD_BYTES], request[:-300], request):
            for number in range(2 * PLACES):
                connection = connect(narrow.port)
                connection.sendall(part)
                time.sleep(0.002 * number)
                leave(connection)
        for _ in range(2 * PLACES):  # in the middle of a reply
            connection = slow_line(narrow.port)
            connection.sendall(request)
            connection.recv(100)
            leave(connection)
    check_places(narrow, rounded)


def test_a_client_that_leaves_is_no_error_of_the_service(narrow, rounded):
    connection = connect(narrow.port)
    connection.sendall(post(rounded.upload(0))[:-300])
    time.sleep(0.2)
    reset(connection)
    time.sleep(0.2)
    assert [line["event"] for line in narrow.lines() if line["level"] == "error"] == []


# Kills


class Load:
    """Eight clients that ask until they are told to stop."""

    def __init__(self, port: int, rounded: Model) -> None:
        self.port, self.model, self.answered, self.refused = port, rounded, 0, 0
        self.wrong: list[BaseException] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(8)]

    def _run(self, seed: int) -> None:
        upload = self.model.upload(seed, "int8")
        while not self._stopped.is_set():
            try:
                with connect(self.port) as connection:
                    connection.sendall(post(upload))
                    reply = receive(connection)
            except ConnectionError:
                reply = None
            except AssertionError as error:  # cut
                self.wrong.append(error)
                return
            if reply is None:
                self.refused += 1
                time.sleep(0.02)
            elif reply.status != 200 or not self.model.answers(reply.body, upload):
                self.wrong.append(AssertionError(f"{reply.status}, or another layer"))
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


def test_killed_it_comes_back_and_told_to_stop_it_finishes_what_it_began(models, tmp_path):
    model = models["full"]
    upload = model.upload(0)
    running = Cloud(model.bundle, tmp_path / "log", "--weights=float32").start()
    with Load(running.port, model) as load:
        until(lambda: load.answered > 20)
        assert running.stop(signal.SIGKILL) == -signal.SIGKILL
        load.wrong.clear()  # a reply may be cut
    running.start()
    assert model.answers(ask(running.port, post(upload)).body, upload)
    with Load(running.port, model) as load, connect(running.port) as late, connect(running.port) as idle:
        until(lambda: load.answered > 20)
        late.sendall(post(upload)[:-300])
        time.sleep(0.2)
        running.process.send_signal(signal.SIGTERM)
        until(lambda: load.refused > 8, "it still takes connections")
        time.sleep(0.5)
        assert idle.recv(1) == b""
        late.sendall(upload[-300:])
        assert model.answers(receive(late).body, upload)
        assert running.process.wait(SECONDS) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert load.wrong == []
    assert running.lines()[-1]["event"] == "stopped"


def test_while_the_weights_are_read_it_is_alive_and_not_ready(tmp_path):
    versions = write_cloud_bundle(overflowing(), bytes(16), "test/large", tmp_path).versions
    model = Model(tmp_path, Generator.load(tmp_path / "generator.safetensors"), versions, None)
    content = (tmp_path / "cloud.json").read_bytes()
    (tmp_path / "cloud.json").unlink()
    os.mkfifo(tmp_path / "cloud.json")  # which is read when somebody writes
    running = Cloud(tmp_path, tmp_path / "log")
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(running.start)
        (tmp_path / "cloud.json").write_bytes(content)  # for the check before

        def alive() -> bool:
            with suppress(ConnectionError):
                return get(running.port, "/health").status == 200
            return False

        until(alive)
        assert get(running.port, "/ready").refusal == (503, "loading")
        reply = ask(running.port, post(model.upload(0)))
        assert reply.refusal == (503, "loading")
        assert int(reply.headers["retry-after"]) >= 1
        (tmp_path / "cloud.json").write_bytes(content)
        started.result()
    assert ask(running.port, post(model.upload(0))).status == 200
    assert ask(running.port, post(model.upload(0, "float16"))).refusal == (422, "finite")
    running.stop()


def total(page: bytes, name: str) -> float:
    return sum(float(line.split()[-1]) for line in page.decode().splitlines() if line.startswith(name))


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_all_count_together(twofold, models):
    model, asked = models["basis"], 0
    name = 'cdc_mmpg_replies_total{status="200"}'
    before = total(get(twofold.port, "/metrics").body, name)
    log = len(twofold.lines())

    def ask_all(seeds: range) -> None:
        nonlocal asked
        for seed in seeds:
            upload = model.upload(seed)
            assert model.answers(ask(twofold.port, post(upload)).body, upload)
            asked += 1

    def both_answered() -> bool:
        ask_all(range(10))
        return len({line["process"] for line in twofold.lines()[log:] if line["event"] == "layer"}) == 2

    until(both_answered)
    for _ in range(10):  # whichever answers
        assert total(get(twofold.port, "/metrics").body, name) == before + asked
    first = workers(twofold)
    os.kill(first[-1], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{first[-1]}").exists() or "Z" in Path(f"/proc/{first[-1]}/stat").read_text())
    ask_all(range(20))
    # The supervisor may have asked the process just before it was lost, and then waits WORKER_START_SECONDS.
    until(lambda: len(workers(twofold)) > len(first), "no new process", 2 * command.WORKER_START_SECONDS)
    assert workers(twofold)[-1] not in first
    ask_all(range(20))
    assert total(get(twofold.port, "/metrics").body, name) == before + asked


# Keys, certificates, and what is not started at all


def test_keys_and_certificates(secured, models):
    (running, certificate), model = secured, models["full"]
    upload = model.upload(0, "int8")
    context = ssl.create_default_context(cafile=str(certificate))

    def over_tls(request: bytes) -> Reply:
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
        reply = over_tls(post(upload, *header))
        assert reply.refusal == (401, "key")
        assert reply.headers["www-authenticate"] == "bearer"
    assert over_tls(post(b"", length=1 << 30)).status == 401
    for scheme in (b"Bearer ", b"bearer ", b"Bearer  "):
        reply = over_tls(post(upload, b"Authorization: " + scheme + KEYS[0].encode()))
        assert model.answers(reply.body, upload)
    assert over_tls(b"GET /health HTTP/1.1\r\nHost: cloud\r\n\r\n").status == 200
    log = running.log.read_text()
    assert not any(word in log for word in (*KEYS, "wrong-key-0815"))
    with connect(running.port) as plain:  # no https
        plain.sendall(post(upload))
        assert receive(plain) is None


def test_a_key_may_hold_any_letter(secured, models):
    (running, certificate), upload = secured, models["full"].upload(0)
    context = ssl.create_default_context(cafile=str(certificate))
    with context.wrap_socket(connect(running.port), server_hostname=HOST) as connection:
        connection.sendall(post(upload, b"Authorization: Bearer " + KEYS[1].encode()))
        assert receive(connection).status == 200


@pytest.fixture
def not_started(monkeypatch, capsys):
    """What the command says, with which exit code, before it listens."""

    def run(*arguments: object) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(command.uvicorn, "Config", lambda *_, **__: pytest.fail("it was started"))
            code = command.main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return run


def test_an_absent_or_empty_file_of_keys_is_refused(not_started, model, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "empty", "binary", "."):
        code, said = not_started(model.bundle, "--keys", tmp_path / name)
        assert code == 2
        assert str(tmp_path / name) in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "cloud.example"])
def test_other_machines_need_keys(host, not_started, model):
    code, said = not_started(model.bundle, "--host", host)
    assert code == 2
    assert host in said
    assert "KEYS=" in said


@pytest.mark.parametrize(
    "options",
    [["--workers", "0"], ["--places", "0"], ["--certificate", "x"], ["--certificate", "x", "--certificate-key", "y"]],
)
def test_options_that_do_not_go_together_are_refused(options, not_started, model):
    assert not_started(model.bundle, *options)[0] == 2


def test_files_that_are_no_certificate_and_its_key_are_refused(not_started, model, tmp_path):
    write_certificate(tmp_path)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    (tmp_path / "empty.pem").touch()
    (tmp_path / "binary.pem").write_bytes(bytes(range(256)))
    (tmp_path / "foreign.pem").write_bytes(FOREIGN)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = private.private_bytes(*BYTES[:2], serialization.BestAvailableEncryption(b"secret"))
    (tmp_path / "locked.pem").write_bytes(locked)
    pairs = [(certificate, certificate), (key, key), (key, certificate), (tmp_path, key)]
    pairs += [(certificate, tmp_path / name) for name in ("empty.pem", "binary.pem", "foreign.pem", "locked.pem")]
    pairs += [(tmp_path / name, key) for name in ("empty.pem", "binary.pem", "foreign.pem", "absent.pem")]
    for one, other in pairs:
        code, said = not_started(model.bundle, "--certificate", one, "--certificate-key", other)
        assert code == 2
        assert said.startswith("ConfigError: ")
        assert "CERTIFICATE=" in said


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
def test_an_address_that_cannot_be_had_is_refused(options, not_started, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("key")
    code, said = not_started(model.bundle, *options)
    assert code == 2
    assert options[1] in said
    assert "HOST= and PORT=" in said


@pytest.mark.parametrize("content", [b"good\nb\0ad", b"go\tod", "a\x85b".encode(), "a\u2028b".encode(), b"a\0b\0"])
def test_a_key_that_no_header_can_carry_is_refused(content, not_started, model, tmp_path):
    (tmp_path / "keys").write_bytes(content)
    code, said = not_started(model.bundle, "--keys", tmp_path / "keys")
    assert code == 2
    assert f"line {1 + content.count(10)}" in said
    assert "good" not in said


def test_keys_are_read_with_any_line_ends_and_without_the_mark_of_an_editor(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\ntwo words \r\n\r\n")
    keys = read_keys(str(tmp_path / "keys"))
    assert keys == [digest(b"one"), digest(b"two words")]
    assert find_key([b"Bearer two words"], keys) == keys[1]
    assert find_key([b"Bearer two"], keys) is None


def flipped(content: bytes) -> bytes:
    return patched(content, len(content) // 2, bytes([content[len(content) // 2] ^ 1]))


FOREIGN = ec.generate_private_key(ec.SECP256R1()).private_bytes(*BYTES)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("generator.safetensors", None),
        ("cloud.json", None),
        ("signing_key.pem", None),
        ("generator.safetensors", flipped),
        ("generator.safetensors", lambda content: content[:-1]),
        ("signing_key.pem", lambda _: FOREIGN),
        ("signing_key.pem", lambda _: b""),
        ("cloud.json", lambda _: b"{"),
        ("cloud.json", lambda _: b"[]"),
        ("cloud.json", lambda content: content.replace(b'"encoder"', b'"decoder"')),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(name, damage, not_started, model, tmp_path):
    for path in model.bundle.iterdir():
        content = path.read_bytes()
        if path.name != name:
            (tmp_path / path.name).write_bytes(content)
        elif damage is not None:
            (tmp_path / name).write_bytes(damage(content))
    code, said = not_started(tmp_path)
    assert code == 4
    assert name in said


def test_a_bundle_with_any_wrong_part_is_refused_or_the_same(model, tmp_path, not_started):
    for path in model.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bundle, content = read_cloud_bundle(tmp_path), (tmp_path / "cloud.json").read_bytes()
    settings, wrong = json.loads(content), []
    for name in settings:
        others = [None, 7, 1.5, True, [], {}, "", "zz", "00", "ab" * 17, [[[]]], {"a": "b"}]
        wrong += [json.dumps({**settings, name: other}).encode() for other in others]
    wrong += [
        patched(content, bit // 8, bytes([content[bit // 8] ^ (1 << bit % 8)])) for bit in range(0, 8 * len(content), 5)
    ]
    wrong += [b"", b"null", b"[" * 100_000, b"\xff\xfe", content.decode().encode("utf-16")]
    refused = 0
    for one in wrong:
        (tmp_path / "cloud.json").write_bytes(one)
        try:
            read = read_cloud_bundle(tmp_path)
        except CheckpointError as error:
            refused += str(tmp_path) in str(error)
        else:
            assert read.versions.generator == bundle.versions.generator
            assert len(read.versions.encoder) == len(bundle.versions.encoder)
    assert refused > 0.5 * len(wrong)
    code, said = not_started(model.bundle / "cloud.json")  # a file in place of the folder
    assert code == 4
    assert said.startswith("CheckpointError: ")


def test_a_generator_whose_numbers_are_not_finite_is_refused(tmp_path, not_started):
    made = generator("low_rank")
    torch.nn.init.constant_(made.adaptor.shared.bias, torch.nan)
    write_cloud_bundle(made, bytes(16), "test/broken", tmp_path)
    code, said = not_started(tmp_path)
    assert code == 4
    assert "generator.safetensors" in said


def test_without_torch_the_command_says_what_to_install():
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('cdc_mmpg.cloud', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "bundle"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: ")
    assert "torch" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def overflowing() -> Generator:
    """Return a generator whose whole layers are too large for float16, and not for the other precisions."""
    made = generator("low_rank")
    with torch.no_grad():
        made.adaptor.shared.weight.mul_(1e6)
    return made


def test_a_layer_that_its_precision_cannot_hold_is_the_fault_of_its_own_request(tmp_path):
    write_cloud_bundle(overflowing(), bytes(16), "test/large", tmp_path)
    served = load_model(tmp_path, "float32")

    async def ask_together() -> list[GeneratedLayer | BaseException]:
        batcher = Batcher(served)
        uploads = []
        for kind in ("int8", "float16", "float32", "float16", "low_rank"):
            layout = next(layout for layout in served.layouts if layout.kind == kind)
            content = encode_upload(np.full(FEATURE_DIM, 0.5, np.float32), layout, served.versions)
            uploads.append((content, decode_upload(content, served.layouts, served.versions)))
        made = await asyncio.gather(*(batcher.generate(*upload) for upload in uploads), return_exceptions=True)
        await batcher.stop()
        return made

    made = asyncio.run(ask_together())
    assert [isinstance(one, DataError) for one in made] == [False, True, False, True, False]
    assert {one.batch for one in made if isinstance(one, GeneratedLayer)} == {5}


def test_the_service_imports_nothing_of_training_and_refuses_without_a_traceback(tmp_path):
    code = (
        "import sys; from cdc_mmpg.cloud.__main__ import main; code = main(sys.argv[1:]); "
        "print({'lightning', 'timm', 'transformers', 'torchmetrics', 'wandb', 'data_modules'} & set(sys.modules)); "
        "sys.exit(code)"
    )
    absent = tmp_path / "absent"
    done = subprocess.run([sys.executable, "-c", code, str(absent)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "set()\n")
    assert done.stderr.startswith(f"CheckpointError: {absent}")
    assert len(done.stderr.splitlines()) == 1


# What is logged, and what chance finds


def test_the_log_tells_of_every_request_and_of_no_feature(cloud, model):
    before = len(cloud.lines())
    value = np.float32(0.123456789)  # more digits than any time in the log has
    feature = np.full(FEATURE_DIM, value, np.float32)
    upload = model.upload_of(feature)
    assert ask(cloud.port, post(upload, b"Authorization: Bearer some-key-1234")).status == 200
    assert ask(cloud.port, with_value(77.0625, model)).status == 422
    assert ask(cloud.port, changed(ENCODER, OTHER, model)).status == 409
    refusals = {(422, "range"), (409, "encoder")}
    until(lambda: refusals <= {(line.get("status"), line.get("reason")) for line in cloud.lines()[before:]})
    found = [line for line in cloud.lines()[before:] if line["event"] == "layer"]
    assert [line["status"] for line in found] == [200]
    assert (found[0]["kind"], found[0]["bytes"]) == ("low_rank", model.layouts[-1].message_bytes)
    log = cloud.log.read_text()
    assert len(cloud.lines()) == len(log.splitlines()), "not all of it is JSON"
    values = ["0.1234567", "77.0625", value.tobytes().hex(), repr(value.tobytes())[2:-1]]
    secrets = ["some-key", upload.hex()[:40], *values]
    assert not any(secret in log for secret in secrets)


def test_refusals_are_counted_and_leave_no_traceback(cloud, model):
    faults = [
        post(b"10\r\n0123456789abcdef\r\nzz\r\n", CHUNKED),
        post(b"zz\r\n", CHUNKED),
        b"\x16\x03\x01" + bytes(100),
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ]
    size, before = cloud.log.stat().st_size, len(cloud.lines())
    upgrades = b"Upgrade: websocket\r\nConnection: Upgrade"
    number, start = 40, time.monotonic()
    for seed in range(number):
        for fault in faults:
            assert ask(cloud.port, fault).refusal == (400, "http")
        assert ask(cloud.port, post(model.upload(seed), upgrades, path="/nowhere")).refusal == (404, "http")
        with connect(cloud.port) as connection:
            connection.sendall(post(model.upload(seed))[:-100])

    def counted(status: int, reason: str) -> int:
        lines = [line for line in cloud.lines()[before:] if line["event"] == "refused"]
        return sum(line["requests"] for line in lines if (line["status"], line["reason"]) == (status, reason))

    until(lambda: counted(404, "http") == number)
    until(lambda: counted(400, "http") == number * len(faults))
    until(lambda: counted(0, "left") == number)
    seconds = time.monotonic() - start
    added = cloud.log.read_bytes()[size:]
    assert b"Traceback" not in added
    assert len(added.splitlines()) <= 3 * (seconds / limits.LOG_SECONDS + 2)


ODD_PATHS = ["/", "/v1", "/v1/layers", "/%00", "/%ff", "//v1/layer", "/ready?x", "/metrics?", "*", "?", "http://",
             "http://cloud", "http://[::1/v1/layer", "https://a@b:x/v1/layer", "cloud:443", "/v1/layer?q=%zz",
             "/v1/layer;x", "/v1%2flayer", "/" + "a" * 9000]  # fmt: skip


def odd_request(model: Model, seed: int) -> tuple[bytes, bytes]:
    """A request of chance, and the upload in it if that is whole, as it came."""
    chance = random.Random(seed)
    layout = chance.choice(model.layouts)
    upload = model.upload(seed % 40, layout.kind)
    if chance.random() < 0.5:
        upload = mutated(upload, chance)
    whole, request = b"", post(upload)
    match chance.randrange(9):
        case 0:
            request = chance.randbytes(chance.randrange(1, 300)) + b"\r\n\r\n"
        case 1:
            request = post(upload, length=chance.choice([0, 1, 835, 837, 1 << 40]))
        case 2:
            methods = [*b"GET HEAD PUT DELETE PATCH OPTIONS TRACE CONNECT post P\xd6ST".split(), b"A" * 99]
            request = request.replace(b"POST", chance.choice(methods), 1)
        case 3:
            request = post(upload, path=chance.choice(ODD_PATHS))
        case 4:
            request = mutated(request, chance) + b"\r\n\r\n"
        case 5:
            whole, request = upload, post(chunks(upload, chance.choice([1, 10, 800, 9000])), CHUNKED)
        case 6:
            doubled = [b"Content-Length: 836", b"Content-Length: 0", b"Host: other", b"Content-Type: a", b"Expect: x"]
            doubled += [b"Transfer-Encoding: chunked, chunked", b"Authorization: Bearer a", b"X-Forwarded-For: 1.2.3.4"]
            doubled += [
                b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
                b"Trailer: x",
                b"Connection: x",
                CHUNKED,
            ]
            request = post(upload, *chance.sample(doubled, 2))
        case 7:
            headers = [b"Content-Type: text/\xff", b"Cookie: " + b"a" * 9000, b"Expect: 100-continue", b"X:", CLOSE,
                       b"Upgrade: websocket\r\nConnection: Upgrade", b"Content-Encoding: gzip"]  # fmt: skip
            whole, request = upload, post(upload, *chance.sample(headers, 2))
        case _:
            whole = upload
    return request, whole


FUZZED = int(os.environ.get("CDC_MMPG_FUZZ", "3000"))  # requests; 100,000 take some minutes


def test_requests_of_chance_are_refused_or_answered_rightly(cloud, model):
    def ask_many(seeds: range) -> list[int]:
        statuses, connection = [], None
        for seed in seeds:
            request, upload = odd_request(model, seed)
            connection = connection or connect(cloud.port)
            connection.settimeout(0.2)  # what it waits for is not sent
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
                assert model.answers(reply.body, upload)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = [one for many in pool.map(ask_many, [range(n, FUZZED, 8) for n in range(8)]) for one in many]
    assert len(statuses) > 0.8 * FUZZED
    assert statuses.count(200) > 0.15 * FUZZED
    assert {400, 404, 405, 409, 413, 422} <= set(statuses)
    assert [line for line in cloud.lines() if line["level"] == "error"] == []


def test_a_port_that_is_taken_is_refused_and_so_is_what_is_no_generator(cloud, model, not_started, tmp_path):
    for path in model.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    code, said = not_started(tmp_path, "--port", str(cloud.port))
    assert code == 2
    assert "PORT=" in said
    settings = json.loads((tmp_path / "cloud.json").read_text())
    (tmp_path / "generator.safetensors").write_bytes(b"nothing")
    settings["generator"] = hashlib.sha256(b"nothing").hexdigest()[:32]
    del settings["digest"]
    (tmp_path / "cloud.json").write_text(json.dumps({**settings, "digest": json_digest(settings)}))
    code, said = not_started(tmp_path)
    assert code == 4
    assert "generator.safetensors" in said
