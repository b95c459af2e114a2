"""The page's files, and requests from other origins, as the real service serves them."""

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from browsers import require_libraries

from cdc_mmpg.cloud.__main__ import main
from cdc_mmpg.cloud.pages import Page
from cdc_mmpg.deployment.checks import Case, run_in_wasm
from cdc_mmpg.device import page as device_page
from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.wire.messages import LAYER_PATH, SIGNATURE_BYTES, UPLOAD_BYTES, encode_upload
from deployments import Cloud, open_device

LAB = "https://lab.example"


@pytest.fixture(scope="module")
def service(deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Service with the page, whose layers pages of `LAB` may request."""
    require_libraries()
    export = deployed / "session"
    options = ("--web", str(export), "--origin", LAB, "--origin", "http://[::1]:8080")
    with Cloud(export / "cloud", tmp_path_factory.mktemp("log") / "log", *options) as cloud:
        yield cloud


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/device.js", "text/javascript; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
        ("/vendor/ort.mjs", "text/javascript; charset=utf-8"),
        ("/vendor/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("/device/bundle.json", "application/json"),
        ("/device-int8/encoder.onnx", "application/octet-stream"),
        ("/device/shared.bin", "application/octet-stream"),
    ],
)
def test_files_are_typed_isolated_and_cached(service, path, kind):
    reply = httpx2.get(service.url + path)
    assert (reply.status_code, reply.headers["content-type"]) == (200, kind)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'" in policy
    assert "unsafe-inline" not in policy
    assert reply.headers["cross-origin-embedder-policy"] == "require-corp"
    assert httpx2.head(service.url + path).headers["etag"] == reply.headers["etag"]
    again = httpx2.get(service.url + path, headers={"If-None-Match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_libraries_are_sent_compressed_to_those_who_can_read_it(service):
    url = f"{service.url}/vendor/ort-wasm-simd-threaded.wasm"
    with httpx2.stream("GET", url, headers={"Accept-Encoding": "gzip"}) as reply:
        compressed = b"".join(reply.iter_raw())
    plain = httpx2.get(url, headers={"Accept-Encoding": "identity"})
    assert gzip.decompress(compressed) == plain.content
    assert len(compressed) < 0.3 * len(plain.content)
    assert "Accept-Encoding" in plain.headers["vary"]


@pytest.mark.parametrize(
    "path",
    [
        "/cloud/signing_key.pem",
        "/device/../cloud/signing_key.pem",
        "/device/%2e%2e/cloud/signing_key.pem",
        "/..%2fcloud%2fsigning_key.pem",
        "//etc/passwd",
        "/package.json",
        "/check.mjs",
        "/node_modules/typescript/package.json",
        "/device/",
        "/demo/session.json",  # this export has no demo
        "/index.html/",
        "/vendor/ort.d.mts",
    ],
)
def test_nothing_else_is_served(service, path):
    reply = httpx2.get(f"{service.url}{path}")
    assert (reply.status_code, reply.json()["error"]) == (404, "http")


def test_the_endpoints_of_the_service_stay(service, deployed, tmp_path):
    assert httpx2.get(f"{service.url}/ready").json()["status"] == "ready"
    assert "cdc_mmpg_replies" in httpx2.get(f"{service.url}/metrics").text
    assert httpx2.post(f"{service.url}/").status_code == 405
    with Cloud(deployed / "session" / "cloud", tmp_path / "log") as plain:
        assert httpx2.get(plain.url).status_code == 404  # no page unless it is asked for
        assert "access-control-allow-origin" not in httpx2.get(f"{plain.url}/ready", headers={"Origin": LAB}).headers


def test_only_listed_origins_may_request_layers(service, deployed):
    url, wanted = f"{service.url}{LAYER_PATH}", {"Access-Control-Request-Method": "POST"}
    wanted["Access-Control-Request-Headers"] = "authorization,content-type"
    allowed = httpx2.options(url, headers={"Origin": LAB, **wanted})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, LAB)
    refused = httpx2.options(url, headers={"Origin": "https://evil.example", **wanted})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    upload = make_upload(deployed)
    reply = httpx2.post(url, content=upload, headers={"Origin": LAB})
    assert reply.headers["access-control-allow-origin"] == LAB
    assert "Server-Timing" in reply.headers["access-control-expose-headers"]
    assert len(reply.content) > SIGNATURE_BYTES
    for content in (b"", bytes(UPLOAD_BYTES)):  # a refusal is readable, too
        assert httpx2.post(url, content=content, headers={"Origin": LAB}).headers["access-control-allow-origin"] == LAB
    assert "access-control-allow-origin" not in httpx2.post(url, content=upload).headers


def make_upload(deployed: Path) -> bytes:
    """Return an upload of the tiny session model."""
    model = open_device(deployed, None).model
    return encode_upload(np.zeros(192, np.float32), model.layout, model.versions)


@pytest.mark.parametrize("origin", ["*", "lab.example", "https://lab.example/", "https://Lab.example", "null"])
def test_wrong_origins_are_refused(deployed, capsys, origin):
    assert main([str(deployed / "session" / "cloud"), "--origin", origin]) == 2
    assert f"--origin={origin}: write https://<host>" in capsys.readouterr().err


def test_a_missing_bundle_and_missing_libraries_are_named(deployed, tmp_path, monkeypatch, capsys):
    require_libraries()
    shutil.copytree(deployed / "session" / "cloud", tmp_path / "cloud")
    with pytest.raises(CheckpointError, match="device: no device bundle: run make export"):
        Page(tmp_path)
    assert main([str(tmp_path / "cloud"), "--web", str(tmp_path)]) == 4
    monkeypatch.setattr("cdc_mmpg.cloud.pages.are_installed", lambda: False)
    with pytest.raises(ConfigError, match="run make web"):
        Page(deployed / "session")
    monkeypatch.setattr(device_page, "are_installed", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert device_page.main([]) == 2
    assert "install Node.js 20 or newer" in capsys.readouterr().err
    assert device_page.main(["--optional"]) == 0


def make_case(model: DeviceModel, frames: np.ndarray, texts: list[list[int]], layer: np.ndarray) -> Case:
    """Return a question with what the native runtime computes for it."""
    features = model.encode(frames, texts)
    return Case(frames, texts, layer, features, int(model.compute_scores(features, layer).argmax()))


@pytest.mark.slow
def test_an_export_is_tried_as_a_browser_runs_it(deployed, tmp_path):
    require_libraries()
    generator = np.random.default_rng(0)
    for kind, texts in (("session", [[2, 5, 7, 3]]), ("choice", [[2, 5, 3], [2, 6, 3], [2, 7, 8, 3]])):
        for name in ("device", "device-int8"):
            model = DeviceModel(deployed / kind / name, threads=1)
            layers = [model.shared + generator.normal(size=model.shared.shape).astype(np.float32) for _ in range(3)]
            frames = generator.integers(256, size=(8, 3, 32, 32, 3), dtype=np.uint8)
            cases = [make_case(model, frames[i], texts, layers[i % 3]) for i in range(8)]
            result = run_in_wasm(deployed / kind / name, cases)
            assert result is not None
            assert (result["questions"], result["equal_answers"]) == (8, 8)
            assert result["largest_difference"] < (1e-4 if name == "device" else 0.1)
    bundle = Path(shutil.copytree(deployed / "session" / "device", tmp_path / "device"))
    (bundle / "head.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="browsers cannot run its graphs"):
        run_in_wasm(bundle, cases[:1])


@pytest.mark.slow
def test_features_that_differ_in_a_browser_fail_the_export(deployed, tmp_path):
    require_libraries()
    model = DeviceModel(deployed / "session" / "device", threads=1)
    bundle = Path(shutil.copytree(deployed / "session" / "device-int8", tmp_path / "device"))
    frames = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(CheckpointError, match="in wasm the features differ by"):
        run_in_wasm(bundle, [make_case(model, frames, [[2, 5, 7, 3]], model.shared)])
