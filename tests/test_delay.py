"""Measured time delay: computed figures, shaped links, and cleanup of processes and namespaces."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cdc_mmpg.benchmarks import delay, links
from cdc_mmpg.benchmarks.delay_cells import ANSWER_STAGES, FAR_DELAY_SECONDS, DelayCase, divide_by_rate, summarise_cell
from cdc_mmpg.benchmarks.delay_client import read_server_timing
from cdc_mmpg.benchmarks.links import Line, LinkCounts, Loopback, Namespaces
from cdc_mmpg.errors import CDCError
from cdc_mmpg.wire.messages import FRAMING_BYTES, UPLOAD_BYTES
from conftest import write_clip

TINY = (DelayCase("tiny", 300, native="low_rank", number=4, kinds=("float32", "low_rank")),)
PAYLOAD = 4 * 97 * 300
RATE = 5  # MiB/s


@pytest.mark.parametrize(
    ("count_bytes", "rate", "milliseconds"),
    [
        (582_388, 5, 111.08),
        (388_388, 5, 74.08),
        (597_908, 5, 114.04),
        (582_388, 100, 5.554),
        (768, 5, 0.146),
        (768, 100, 0.0073),
    ],
)
def test_paper_divides_bytes_by_mib_a_second(count_bytes, rate, milliseconds):
    assert divide_by_rate(count_bytes, rate) == pytest.approx(milliseconds, rel=5e-3 if count_bytes == 768 else 1e-4)


def test_cases_have_the_bytes_of_the_paper():
    sizes = {(case.outputs, kind): case.layout(kind).payload_bytes for case in delay.DELAY_CASES for kind in case.kinds}
    assert sizes == {
        (1501, "float32"): 582_388,
        (1501, "float16"): 291_194,
        (1501, "int8"): 148_599,
        (1001, "float32"): 388_388,
        (1541, "float32"): 597_908,
        (1, "float32"): 772,
        (1501, "low_rank"): 6_408,
        (1501, "basis"): 10,
    }


def test_cell_separates_transfer_from_compute():
    replies = [{"whole": whole, "compute": compute, "verify": 1.0} for whole, compute in ((50, 10), (62, 20), (200, 3))]
    cell = summarise_cell(
        delay.DELAY_CASES[0], "float32", 15, replies, LinkCounts(3 * 10_000, 3 * 610_000, 600, 1300, 0)
    )
    assert cell["transfer_ms"] == 42  # the median of differences, not the difference of medians
    assert (cell["whole_p50_ms"], cell["compute_ms"]) == (62, 10)
    assert cell["whole_p99_ms"] > 195
    assert (cell["link_up_bytes"], cell["link_down_bytes"]) == (10_000, 610_000)
    assert cell["floor_ms"] == pytest.approx(620_000 / (15 * 1024 * 1024) * 1000)
    assert cell["transfer_by_floor"] == pytest.approx(42 / cell["floor_ms"])
    assert cell["message_bytes"] == 582_388 + 132


def test_server_timing_is_read():
    assert read_server_timing("generate;dur=4.250, wait;dur=0.031") == {"generate": 4.25, "wait": 0.031}
    assert read_server_timing("cache") == {}


def test_line_sends_one_after_another():
    line = Line(1000, 0.5)
    assert line.schedule_arrival(100, 10.0) == pytest.approx(10.6)
    assert line.schedule_arrival(100, 10.0) == pytest.approx(10.7)  # queued behind the first
    assert line.schedule_arrival(100, 20.0) == pytest.approx(20.6)  # an idle line saves nothing up
    assert line.passed_bytes == 300


@pytest.mark.parametrize("size", [1, 300_001])
def test_proxy_delivers_all_bytes_no_sooner_than_the_link(size):
    rate, delay_seconds = 2_000_000, 0.05
    message = os.urandom(size)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                content = b"".join(iter(lambda: connection.recv(65_536), b""))
                connection.sendall(content)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        with links.run_proxy(server.getsockname()[1], rate, delay_seconds) as (port, up, down):
            start = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(message)
                client.shutdown(socket.SHUT_WR)
                content = b"".join(iter(lambda: client.recv(65_536), b""))
            seconds = time.perf_counter() - start
        thread.join(5)
    assert content == message
    assert seconds >= 2 * (size / rate + delay_seconds)  # the echo starts once everything has arrived
    assert up.passed_bytes == down.passed_bytes == size


@pytest.mark.parametrize(
    ("folder", "options"),
    [("none/msvd", []), ("file", []), ("msvd", ["--requests", "0"]), ("msvd", ["--congestion", "carrier-pigeon"])],
)
def test_impossible_measurements_are_refused_at_once(folder, options, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert delay.main([str(tmp_path / folder), *options]) == 2
    assert "ConfigError" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_missing_network_tools_select_the_proxy_and_log_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with ExitStack() as stack:
        network, reason = delay.choose_network(stack, proxy=False)
        assert network.kind == "proxy"
        assert "program ip not found" in reason
    assert "program ip not found" in caplog.text


def test_service_that_does_not_come_up_shows_its_log(monkeypatch):
    failing = ["sh", "-c", "echo no weights here >&2; exit 4"]
    monkeypatch.setattr(Loopback, "command_prefix", lambda self, side: failing if side == "server" else [])
    with pytest.raises(CDCError, match=r"of tiny did not start, exit code 4:\nno weights here"):
        delay.measure_delay(TINY, [RATE], 1, Loopback())


@pytest.mark.slow
def test_measurement_over_the_proxy_writes_json_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(delay, "DELAY_CASES", TINY)
    monkeypatch.setattr(delay, "LINK_RATES", (RATE,))
    monkeypatch.setattr(delay, "IDLE_PAUSE_SECONDS", 0.01)
    assert delay.main([str(tmp_path / "msvd"), "--proxy", "--requests", "2"]) == 0
    result = json.loads((tmp_path / "msvd" / "delay.json").read_text())
    assert (result["link"], result["weights"]) == ("proxy", "random")
    float32_cell, low_rank_cell = result["cells"]
    assert (float32_cell["kind"], low_rank_cell["kind"]) == ("float32", "low_rank")
    assert float32_cell["payload_bytes"] == PAYLOAD
    for cell in result["cells"]:
        assert len(cell["requests"]) == 2
        assert cell["link_up_bytes"] > UPLOAD_BYTES
        assert 0 < cell["link_down_bytes"] - cell["payload_bytes"] - FRAMING_BYTES < 500  # HTTP's headers
        assert all(reply["whole"] - reply["compute"] >= cell["floor_ms"] for reply in cell["requests"])
    far_cells = result["delay"]["cells"]
    assert [cell["connection"] for cell in far_cells] == ["each", "idle", "kept"]
    assert all(cell["transfer_ms"] >= 2000 * FAR_DELAY_SECONDS for cell in far_cells)
    page = (tmp_path / "msvd" / "delay.md").read_text()
    assert "| tiny, 300 | float32 | 5 | 116,400 |" in page
    assert "TCP's not" in page
    assert "does not" not in capsys.readouterr().err


def find_namespace_problem() -> str:
    """Return why namespaces cannot be created; empty if they can."""
    try:
        with Namespaces():
            return ""
    except CDCError as error:
        return str(error)


def list_delay_namespaces() -> list[str]:
    """Return the network namespaces of all delay measurements."""
    return [name for name in os.listdir("/run/netns") if name.startswith("cdc-delay-")]


WATCHED_PROGRAM = """
import json, shutil, sys
from cdc_mmpg.benchmarks import delay
from cdc_mmpg.wire.messages import Versions
bundle, generator, public_key, folder = sys.argv[1:]
measure_cell, cells = delay.measure_cell, []

def measure_and_report(client, service, kind, link, rate, requests, connection="kept"):
    if len(cells) == 6:
        print(json.dumps(cells), flush=True)
        requests = 1_000_000
    cells.append(measure_cell(client, service, kind, link, rate, requests, connection))
    return cells[-1]

def copy_bundle(cases, folder):  # writing one would import torch
    shutil.copytree(bundle, folder / "0")
    return [(Versions(delay.ENCODER_DIGEST, bytes.fromhex(generator)), bytes.fromhex(public_key))]

delay.DELAY_CASES = (delay.DelayCase("tiny", 300, native="low_rank", number=4, kinds=("float32", "low_rank")),)
delay.LINK_RATES, delay.measure_cell, delay.write_random_bundles = (5, 100), measure_and_report, copy_bundle
sys.exit(delay.main([folder, "--requests", "2"]))
"""


def list_children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_stopped_measurement_over_namespaces_leaves_nothing(tmp_path):
    if problem := find_namespace_problem():
        pytest.skip(problem)
    [(versions, public_key)] = delay.write_random_bundles(TINY, tmp_path)
    arguments = [str(tmp_path / "0"), versions.generator.hex(), public_key.hex(), str(tmp_path / "msvd")]
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED_PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        time.sleep(0.2)
        children = list_children(process.pid)
        namespaces = [name for name in list_delay_namespaces() if str(process.pid) in name]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    *cells, new, _ = json.loads(line or "[]") or pytest.fail(errors)
    for cell in cells:
        assert cell["dropped"] == 0
        assert cell["link_up_bytes"] > UPLOAD_BYTES
        assert cell["link_down_bytes"] > cell["payload_bytes"] + FRAMING_BYTES
    slow, _, fast, _ = cells
    assert min(slow["link_packets"], fast["link_packets"]) > PAYLOAD / links.FRAME_BYTES  # of one frame at most
    minimum_ms = divide_by_rate(PAYLOAD - 2 * links.FRAME_BYTES, RATE)  # the bucket's content passes at once
    assert all(reply["whole"] - reply["compute"] >= minimum_ms for reply in slow["requests"])
    assert new["transfer_ms"] >= 4 * 2000 * FAR_DELAY_SECONDS  # a handshake; 14 KB, 29 KB and then the rest

    assert len(children) == len(namespaces) == 2  # one for the service, one for the client
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not any(str(process.pid) in name for name in list_delay_namespaces())
    assert not list((tmp_path / "msvd").iterdir())


@pytest.mark.slow
def test_answers_of_exported_runs_are_measured_by_stage(tmp_path, deployed):
    run = tmp_path / "synthetic" / "cdc_mmpg_session" / "seed0"
    shutil.copytree(deployed / "session", run / "deployment")
    (run / "deployment" / "export.json").write_text("{}")
    assert delay.find_exported_devices(tmp_path / "synthetic") == []  # no test results, so no question to ask
    (run / "predictions.test.csv").write_text(
        "clip,device,group,type,question,answer\nfirst,d,unseen,,what is it?,red\n"
    )
    clip = write_clip(tmp_path / "synthetic" / "data" / "clips" / "YouTubeClips" / "first.mp4", codec="libx264")
    bundles = delay.find_exported_devices(tmp_path / "synthetic")
    assert [(exported.name, exported.video, exported.question) for exported in bundles] == [
        (f"cdc_mmpg_session/{name}", clip, "what is it?") for name in ("device", "device-int8")
    ]
    with delay.start_services([], Loopback(), tmp_path) as (client, _):
        (answer,) = delay.measure_answers(client, Loopback(), bundles[:1], 2, tmp_path)
    assert set(answer["stages_ms"]) == set(ANSWER_STAGES)
    assert all(value > 0 for value in answer["stages_ms"].values())
    assert len(answer["requests"]) == 2
