"""The service in units, without a process or a socket; `test_cloud.py` runs the real one."""

import asyncio
import hashlib
import json
import logging
import runpy
import socket
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from test_wire import FEATURE

from cdc_mmpg.cloud import __main__ as command
from cdc_mmpg.cloud import app, limits, model
from cdc_mmpg.cloud.__main__ import choose_family, is_local_only, main
from cdc_mmpg.cloud.app import (
    BODY_SECONDS,
    OCTET_STREAM,
    UPLOAD_KEY,
    AdmittedUpload,
    BackpressuredResponse,
    ClientLeft,
    Gate,
    Refused,
    Service,
    Settings,
    check_length,
    make_refusal,
    read_body,
)
from cdc_mmpg.cloud.batcher import Batcher, GeneratedLayer
from cdc_mmpg.cloud.keys import find_key, read_keys
from cdc_mmpg.cloud.logs import JSONFormatter
from cdc_mmpg.cloud.model import (
    ServedModel,
    describe_model,
    generate_layer,
    generate_layers,
    load_model,
    read_cloud_bundle,
)
from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.wire.messages import LAYER_PATH, decode_layer, decode_upload, encode_upload
from deployments import build_cloud_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    build_cloud_bundle(folder, "low_rank")
    return folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> ServedModel:
    return load_model(bundle)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 0),
        ([(b"content-length", b"836")], 0),
        ([(b"host", b"here"), (b"content-length", b"836")], 0),
        ([(b"transfer-encoding", b"chunked")], 0),
        ([(b"content-length", b"835")], 400),
        ([(b"content-length", b"0")], 400),
        ([(b"content-length", b"837")], 413),
        ([(b"content-length", b"1000000000")], 413),
        ([(b"content-length", b"836"), (b"transfer-encoding", b"chunked")], 400),
    ],
)
def test_a_wrong_declared_length_is_refused(headers, status):
    if not status:
        check_length(headers)
        return
    with pytest.raises(Refused) as refused:
        check_length(headers)
    assert (refused.value.status, refused.value.error) == (status, "http" if len(headers) == 2 else "body")


def make_receive(*pieces: bytes, ends: bool = True) -> Any:
    """Return an ASGI `receive` that hands over pieces of a body; one without an end is followed by a disconnect."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if ends:
        messages[-1]["more_body"] = False
    else:
        messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    return receive


def test_a_body_is_read_to_its_end_and_no_further(monkeypatch):
    body = bytes(range(256)) * 3 + bytes(68)
    assert asyncio.run(read_body(make_receive(body))) == body
    assert asyncio.run(read_body(make_receive(body[:1], b"", body[1:700], body[700:]))) == body
    assert asyncio.run(read_body(make_receive(b""))) == b""
    with pytest.raises(ClientLeft):
        asyncio.run(read_body(make_receive(body, ends=False)))
    for pieces in ((body + b"!",), (body, b"!"), (bytes(900), bytes(900))):
        with pytest.raises(Refused, match="more than the 836 bytes") as refused:
            asyncio.run(read_body(make_receive(*pieces)))
        assert (refused.value.status, refused.value.error) == (413, "body")
    assert BODY_SECONDS == 5
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)

    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(Refused, match=r"[123] of 836 bytes arrived in 0\.05 s") as refused:
        asyncio.run(read_body(drip))
    assert (refused.value.status, refused.value.error) == (408, "body")


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()[:16]


def test_keys_are_read_from_a_file_and_found_in_headers(tmp_path):
    path = tmp_path / "keys"
    assert read_keys("") == []
    path.write_bytes("\ufeffone\r\n\r\n  two words \nthreé".encode())
    keys = read_keys(str(path))
    assert keys == [hash_key("one"), hash_key("two words"), hash_key("threé")]
    for key in ("one", "two words", "threé"):
        for header in (f"Bearer {key}", f"bearer   {key} ", f"BEARER {key}"):
            assert find_key([header.encode()], keys) == hash_key(key)
    for headers in ([], [b"one"], [b"Basic one"], [b"Bearer"], [b"Bearer on"], [b"Bearer one2"], [b"Bearer one"] * 2):
        assert find_key(headers, keys) is None
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="the file contains no key"):
        read_keys(str(path))
    path.write_text("good\nb\x07d\n")
    with pytest.raises(ConfigError, match="line 2: unprintable character"):
        read_keys(str(path))
    with pytest.raises(ConfigError, match="cannot read keys"):
        read_keys(str(tmp_path / "absent"))


def test_loopback_addresses_are_recognized():
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_local_only(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""):
        assert not is_local_only(host)
    assert (choose_family("::1"), choose_family("127.0.0.1")) == (socket.AF_INET6, socket.AF_INET)


def test_refusals_carry_the_headers_of_their_status():
    for status, status_headers in ((503, {"retry-after": "1"}), (401, {"www-authenticate": "Bearer"}), (400, {})):
        refusal = make_refusal(status, "why", "a sentence")
        assert refusal.status_code == status
        assert json.loads(refusal.body) == {"error": "why", "detail": "a sentence"}
        headers = {name: value for name, value in refusal.headers.items() if not name.startswith("content-")}
        assert headers == {"connection": "close", **status_headers}


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 200_000])
def test_a_reply_is_sent_in_pieces(size):
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    body = np.random.default_rng(0).bytes(size)
    asyncio.run(BackpressuredResponse(body, 200, {"X-Own": "1"}, OCTET_STREAM)({}, None, send))
    assert (sent[0]["type"], sent[0]["status"]) == ("http.response.start", 200)
    headers = dict(sent[0]["headers"])
    assert (headers[b"content-length"], headers[b"x-own"]) == (str(size).encode(), b"1")
    assert headers[b"content-type"] == b"application/octet-stream"
    assert b"".join(message["body"] for message in sent[1:]) == body
    assert all(len(message["body"]) <= 65_536 and message["more_body"] for message in sent[1:-1])
    assert len(sent) == 2 + -(-size // 65_536)
    assert not sent[-1].get("more_body")
    assert sent[-1]["body"] == b""


def test_log_lines_are_json():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("cdc_mmpg.cloud", logging.WARNING, "", 0, "it %s", ("is",), sys.exc_info())
    record.created, record.fields = 86_400.125, {"bytes": 3}
    line = json.loads(JSONFormatter().format(record))
    assert line.pop("error").endswith("ValueError: why")
    assert line == {"time": "1970-01-02T00:00:00.125+00:00", "level": "warning", "event": "it is",
                    "process": record.process, "bytes": 3}  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [("--workers", "0"), ("--workers", "-1"), ("--places", "0")])
def test_at_least_one_worker_and_one_place_are_required(option, value, bundle, capsys, monkeypatch):
    assert main([str(bundle), option, value]) == 2
    assert "workers and places must be at least 1" in capsys.readouterr().err
    monkeypatch.setattr(command, "check_certificate", lambda *_: (_ for _ in ()).throw(ConfigError("so far")))
    assert main([str(bundle), option, "1"]) == 2
    assert "so far" in capsys.readouterr().err
    assert main([str(bundle), "--host", "10.9.9.9"]) == 2
    assert "without keys everyone has access" in capsys.readouterr().err


def test_a_loaded_bundle_has_the_settings_of_its_export(bundle, served):
    settings = json.loads((bundle / "cloud.json").read_text())
    assert (served.versions.encoder.hex(), served.versions.generator.hex()) == (
        settings["encoder"],
        settings["generator"],
    )
    assert describe_model(served) == {
        "model": settings["name"], "encoder": settings["encoder"], "generator": settings["generator"],
        "weights": settings["weights"], "kinds": ["float32", "float16", "int8", "low_rank"],
    }  # fmt: skip
    assert load_model(bundle, "bfloat16").weights == "bfloat16"
    assert not served.generator.training
    with pytest.raises(CheckpointError, match=r"cloud\.json: not a valid file of a cloud bundle"):
        read_cloud_bundle(bundle.parent)


def make_upload(served: ServedModel, feature: np.ndarray, kind: str) -> tuple[bytes, Any]:
    layout = next(layout for layout in served.layouts if layout.kind == kind)
    content = encode_upload(feature.astype(np.float32), layout, served.versions)
    return content, decode_upload(content, served.layouts, served.versions)


def test_batched_requests_each_get_their_own_layer(served):
    features = [FEATURE, -FEATURE, FEATURE[::-1].copy(), np.full(192, 1e-13)]
    requests = [make_upload(served, feature, kind) for feature, kind in
               zip(features, ("float32", "low_rank", "int8", "float32"), strict=True)]  # fmt: skip
    layers = generate_layers(served, requests)
    for (content, upload), layer, feature in zip(requests, layers, features, strict=True):
        cleaned = torch.from_numpy(np.where(np.abs(feature) < 1e-12, 0, feature).astype(np.float32))[None]
        with torch.no_grad():
            expected = served.generator.matrices(served.generator(cleaned), upload.layout.kind)
        received = decode_layer(layer, content, upload.layout, served.versions, served.key.public_key())
        for matrix, expected_matrix in zip(received, expected, strict=True):
            np.testing.assert_allclose(
                matrix, expected_matrix[0].numpy(), atol=1e-2 * max(1e-6, expected_matrix.abs().max().item())
            )
    from_tiny, from_zeros = (
        generate_layer(served, *requests[3]),
        generate_layer(served, *make_upload(served, 0 * FEATURE, "float32")),
    )
    assert from_tiny[132:] == from_zeros[132:]  # tiny numbers count as zeros


def test_a_layer_that_cannot_be_encoded_fails_only_its_own_request(served, monkeypatch):
    requests = [
        make_upload(served, sign * FEATURE, kind) for sign, kind in ((1, "float32"), (-1, "float16"), (1, "low_rank"))
    ]
    encode = model.encode_layer

    def encode_or_fail(matrices: Any, content: bytes, *rest: Any) -> bytes:
        if content == requests[1][0]:
            raise DataError("too large")
        return encode(matrices, content, *rest)

    monkeypatch.setattr(model, "encode_layer", encode_or_fail)
    layers = generate_layers(served, requests)
    assert [isinstance(layer, bytes) for layer in layers] == [True, False, True]
    with pytest.raises(DataError, match="too large"):
        generate_layer(served, *requests[1])


def test_the_batcher_batches_queued_requests_and_drops_cancelled_ones(served):
    async def run() -> None:
        batcher = Batcher(served)
        requests = [make_upload(served, FEATURE * number / 40, "low_rank") for number in range(1, 41)]
        cancelled = asyncio.create_task(batcher.generate(*requests[0]))
        tasks = [asyncio.create_task(batcher.generate(*request)) for request in requests]
        await asyncio.sleep(0)
        cancelled.cancel()
        layers = await asyncio.gather(*tasks)
        for (content, upload), layer in zip(requests, layers, strict=True):
            decode_layer(layer.content, content, upload.layout, served.versions, served.key.public_key())
            assert 0 < layer.generating < 60
            assert 0 <= layer.waiting < 60
        assert sum(1 / layer.batch for layer in layers) == pytest.approx(len({layer.batch for layer in layers}), abs=1)
        assert max(layer.batch for layer in layers) == 31  # one of the first 32 was cancelled; the other nine follow
        assert sorted({layer.batch for layer in layers}) == [9, 31]
        await batcher.stop()

    asyncio.run(run())


class FakeBatcher:
    """Batcher stub that returns a given layer or fails with a given exception."""

    def __init__(self, served: ServedModel, result: GeneratedLayer | Exception) -> None:
        self.served, self.result = served, result

    async def generate(self, content: bytes, upload: Any) -> GeneratedLayer:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def build_service(
    served: ServedModel | None, keys: str = "", result: GeneratedLayer | Exception | None = None
) -> Service:
    service = Service(Settings("", keys, 3, "", 0))
    if served is not None:
        service.batcher = FakeBatcher(served, result or GeneratedLayer(b"layer", 0.25, 0.125, 5))
    return service


def test_a_layer_is_counted_logged_and_timed(served, caplog):
    async def run() -> None:
        service = build_service(served)
        content, upload = make_upload(served, FEATURE, "low_rank")
        start = perf_counter() - 2
        scope = {"type": "http", UPLOAD_KEY: AdmittedUpload(content, upload, start)}
        with caplog.at_level("INFO", "cdc_mmpg.cloud"):
            reply = await service.answer_upload(Request(scope))
        assert (reply.status_code, reply.body) == (200, b"layer")
        assert reply.headers["server-timing"] == "generate;dur=250.000, wait;dur=125.000"
        fields = caplog.records[-1].fields
        assert 2000 <= fields.pop("milliseconds") < 60_000
        assert fields == {"status": 200, "kind": "low_rank", "bytes": 5, "batch": 5}
        page = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
                for line in service.metrics.render().decode().splitlines() if not line.startswith("#")}  # fmt: skip
        assert page['cdc_mmpg_replies_total{status="200"}'] == 1
        assert page['cdc_mmpg_layer_bytes_total{kind="low_rank"}'] == 5
        assert 2 <= page["cdc_mmpg_seconds_sum"] < 60
        assert page["cdc_mmpg_generating_seconds_sum"] == 0.25
        buckets = {name: value for name, value in page.items() if name.startswith("cdc_mmpg_batch_bucket")}
        assert buckets == {f'cdc_mmpg_batch_bucket{{le="{limit}"}}': float(index >= 3) for index, limit in
                           enumerate(("1.0", "2.0", "4.0", "8.0", "16.0", "32.0", "+Inf"))}  # fmt: skip
        service.batcher.result = DataError("too large for float16")
        reply = await service.answer_upload(Request(scope))
        assert (reply.status_code, json.loads(reply.body)["error"]) == (422, "finite")
        assert json.loads(reply.body)["detail"] == "too large for float16: request a float32 layer"
        service.batcher.result = DataError("not finite")
        scope[UPLOAD_KEY] = AdmittedUpload(*make_upload(served, FEATURE, "float32"), start)
        assert json.loads((await service.answer_upload(Request(scope))).body)["detail"] == "not finite"

    asyncio.run(run())


def send_through_gate(
    service: Service,
    *headers: tuple[bytes, bytes],
    path: str = LAYER_PATH,
    method: str = "POST",
    body: bytes = b"",
    ends: bool = True,
    fails: bool = False,
) -> tuple[int, str, dict[str, Any]]:
    """Send a request through the gate; return status, reason or text, and the scope that the endpoint saw."""
    seen: list[dict[str, Any]] = []
    sent: list[dict[str, Any]] = []

    async def api(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append(scope | {"held": dict(service.door.places._held)})
        assert service.door.places.free == (2 if UPLOAD_KEY in scope else 3)
        if fails:
            raise RuntimeError("inside")
        await PlainTextResponse("inside")(scope, receive, send)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "path": path, "method": method, "client": ("10.0.0.7", 1), "headers": list(headers)}
        await Gate(service, api)(scope, make_receive(body, ends=ends), send)  # type: ignore[arg-type]

    if fails:
        with pytest.raises(RuntimeError):
            asyncio.run(run())
    else:
        asyncio.run(run())
    assert service.door.places.free == 3  # the place was released
    if not sent:
        return 0, "", seen[0] if seen else {}
    text = sent[1]["body"].decode()
    return sent[0]["status"], text if text == "inside" else json.loads(text)["error"], seen[0] if seen else {}


def test_only_uploads_take_a_place_and_only_valid_ones_pass_the_gate(served, tmp_path):
    service, (content, upload) = build_service(served), make_upload(served, FEATURE, "int8")
    status, text, scope = send_through_gate(service, body=content)
    assert (status, text) == (200, "inside")
    assert scope[UPLOAD_KEY][0] == content
    assert scope[UPLOAD_KEY][1].layout == upload.layout
    assert 0 <= perf_counter() - scope[UPLOAD_KEY][2] < 60
    assert send_through_gate(service, body=content, fails=True)[0] == 0
    status, text, scope = send_through_gate(service, body=content, path=f"HTTPS://some.host:99{LAYER_PATH}")
    assert (status, text, scope["path"]) == (200, "inside", LAYER_PATH)
    for other in ({"path": "/health", "method": "GET"}, {"method": "GET"}, {"path": f"{LAYER_PATH}/"}):
        status, text, scope = send_through_gate(service, **other)
        assert (status, text) == (200, "inside")
        assert UPLOAD_KEY not in scope
    assert send_through_gate(service, body=content[:-1])[:2] == (400, "length")
    assert send_through_gate(service, body=content[:68] + b"\xff" * 768)[:2] == (422, "range")
    assert send_through_gate(service, body=content[:8] + bytes(16) + content[24:])[:2] == (409, "encoder")
    assert send_through_gate(service, body=content[:24] + bytes(16) + content[40:])[:2] == (409, "generator")
    assert send_through_gate(service, body=b"GARB" + content[4:])[:2] == (400, "magic")
    assert send_through_gate(service, (b"content-length", b"9"), body=content)[:2] == (400, "body")
    assert send_through_gate(service, body=content, ends=False) == (0, "", {})
    assert send_through_gate(build_service(None), body=content)[:2] == (503, "loading")
    path = tmp_path / "keys"
    path.write_text("secret\n")
    guarded = build_service(served, str(path))
    assert send_through_gate(guarded, body=content)[:2] == (401, "key")
    assert send_through_gate(guarded, (b"authorization", b"Bearer wrong"), body=content)[:2] == (401, "key")
    assert send_through_gate(guarded, (b"x-other", b"1"), (b"authorization", b"Bearer secret"), body=content)[:2] == (
        200,
        "inside",
    )
    scope = send_through_gate(guarded, (b"authorization", b"Bearer secret"), body=content)[2]
    assert scope["held"] == {"10.0.0.7": 1, hash_key("secret"): 1}  # under the client's address and its key


def test_a_client_beyond_its_share_is_refused_with_a_retry_time(served):
    service, (content, _) = build_service(served), make_upload(served, FEATURE, "int8")
    for _ in range(2):
        service.door.places.take("10.0.0.7")  # of three places; a third one would leave none for others

    async def fail_if_called(*_: Any) -> None:
        raise AssertionError

    sent = []

    async def run() -> None:
        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "path": LAYER_PATH, "method": "POST", "client": ("10.0.0.7", 1), "headers": []}
        await Gate(service, fail_if_called)(scope, make_receive(content), send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == str(limits.RETRY_SECONDS).encode()
    assert service.door.places.free == 1


def test_importing_the_service_without_its_libraries_names_them(monkeypatch):
    for name in ("__main__", "model"):  # so that they are imported again
        monkeypatch.delitem(sys.modules, f"cdc_mmpg.cloud.{name}")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        runpy.run_module("cdc_mmpg.cloud", run_name="imported")


def test_readiness_health_and_metrics_are_reported(served):
    async def run() -> None:
        for service, status in ((build_service(served), 200), (build_service(None), 503)):
            ready = await service.report_ready(Request({"type": "http"}))
            assert ready.status_code == status
            health = await service.report_health(Request({"type": "http"}))
            assert json.loads(health.body) == {"status": "alive"}
            page = await service.report_metrics(Request({"type": "http"}))
            assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert json.loads(ready.body)["error"] == "loading"

    asyncio.run(run())
