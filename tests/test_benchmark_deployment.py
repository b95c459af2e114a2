"""The deployment benchmark: what it measures, that it leaves no process running, and the replies that end it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cdc_mmpg.benchmarks import deployment, device, load, service
from cdc_mmpg.benchmarks.deployment import main
from cdc_mmpg.benchmarks.load import ExpectedLayer, measure_load
from cdc_mmpg.errors import CDCError
from cdc_mmpg.wire.messages import Layout, Versions


@pytest.mark.slow
def test_everything_is_measured_and_no_process_is_left_running(deployed, tmp_path, monkeypatch, capsys):
    bundles = shutil.copytree(deployed / "sample", tmp_path / "sample")
    started = []

    class RecordedPopen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    measure_peak = device.measure_peak_megabytes
    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)
    monkeypatch.setattr(deployment, "SERVED_KINDS", ("low_rank",))
    monkeypatch.setattr(service, "CONCURRENT_CLIENTS", (3,))
    monkeypatch.setattr(load, "VERIFY_EVERY", 2)
    monkeypatch.setattr(service, "VERIFY_EVERY", 2)
    monkeypatch.setattr(service, "SLOW_CLIENTS", 10)
    monkeypatch.setattr(service, "OVERLOAD_FACTOR", 1)
    monkeypatch.setattr(
        device,
        "measure_peak_megabytes",
        lambda *arguments: measure_peak(*arguments) if arguments[1] == "int8" else None,
    )
    assert main(["--bundles", str(bundles), "--seconds", "0.1"]) == 0
    assert len([process for process in started if "--port" in process.args]) == 2
    assert all(process.returncode is not None for process in started)

    report = json.loads((bundles / deployment.BENCHMARK_REPORT).read_text())
    assert {"machine", "service", "device", "swap", "bytes", "generator", "commit", "versions"} <= set(report)
    assert set(report["service"]["low_rank"]["concurrency"]) == {"3"}
    for cell in report["service"]["low_rank"]["concurrency"].values():
        assert set(cell) == {"service", "plain", "ratio"}
        assert all(cell[name]["replies"] > 0 for name in ("service", "plain"))
        assert cell["service"]["mean_batch"] >= 1
        assert cell["plain"]["mean_batch"] is None
    hostile = report["service"]["low_rank"]["hostile"]
    assert list(hostile) == ["good clients alone", "beside 10 slow bodies and 10 slow headers", "256 clients at once"]
    assert all(values["served"] > 0 and values["lost"] == 0 for values in hostile.values())
    assert [values["served_share"] for values in hostile.values()][:2] == [1, 1]
    assert all(set(timings) == {"float32", "int8", "torch"} for timings in report["device"]["threads"].values())
    assert set(report["swap"]["kinds"]) == {"float32", "float16", "int8", "low_rank", "basis"}
    assert report["bytes"]["device"]["encoder.onnx"] == (bundles / "device" / "encoder.onnx").stat().st_size
    printed = capsys.readouterr().out
    assert all(
        heading in printed
        for heading in ("service / plain", "hostile clients", "torch, eager", "swap", "sizes", "generator")
    )


@pytest.mark.slow
def test_a_signal_also_ends_the_servers(deployed):
    command = [sys.executable, "-m", "cdc_mmpg", "benchmark_deployment", "--bundles", str(deployed / "sample")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list_running_processes(process.pid)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert not list_running_processes(process.pid)
    finally:
        if process.poll() is None or list_running_processes(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def list_running_processes(group: int) -> list[int]:
    """Return the ids of the running processes of a process group."""
    running = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            running.append(int(path.name))
    return running


LAYOUT = Layout("float32", 3, 4)


@pytest.mark.parametrize(
    ("status", "size", "message"),
    [(503, 20, "refused"), (200, 20, "20 bytes"), (200, 9_000, "longer"), (200, LAYOUT.message_bytes, "magic")],
)
def test_a_wrong_reply_ends_the_measurement(status, size, message):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(bytes(size))

        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    expected = ExpectedLayer(LAYOUT, Versions(bytes(16), bytes(16)), Ed25519PrivateKey.generate().public_key())
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(CDCError, match=message):
            measure_load(server.server_address[1], [bytes(836)], expected, 2, 0.1)
        server.shutdown()


def test_absent_bundles_are_refused(tmp_path, capsys):
    assert main(["--bundles", str(tmp_path / "absent")]) == 4
    assert "CheckpointError" in capsys.readouterr().err
