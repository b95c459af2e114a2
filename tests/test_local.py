"""Local processes that the demo, benchmarks and tests start: failed starts are named, and no process is left behind."""

import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from cdc_mmpg.deployment.local import LocalProcess, LocalServer, read_page, suppress_stop_signals
from cdc_mmpg.errors import CDCError
from cdc_mmpg.program import hold_signals

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
)


def python_command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_server_that_exits_early_is_named_with_its_log(tmp_path):
    server = LocalServer("a server", python_command("import sys; sys.exit('no weights here')"), tmp_path / "log")
    with pytest.raises(CDCError, match=r"^a server did not start, exit code 1:\nno weights here$"):
        server.start()


def test_a_server_that_does_not_get_ready_is_ended(tmp_path):
    server = LocalServer("a server", python_command("import time; time.sleep(60)"), tmp_path / "log")
    with pytest.raises(CDCError, match=r"a server did not start, not ready after 0\.2 s"):
        server.start(0.2)
    assert server.process.returncode == -signal.SIGTERM


def test_a_process_that_does_not_end_is_killed(tmp_path):
    process = LocalProcess("a process", python_command(STUBBORN), tmp_path / "log")
    assert process.stop() == 0  # before it was started
    process.begin()
    end = time.monotonic() + 60
    while "begun" not in process.read_log_tail():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert process.stop(seconds=0.2) == -signal.SIGKILL
    assert process.stop() == -signal.SIGKILL  # a second stop does nothing


def test_a_process_gets_additional_environment_variables(tmp_path):
    code = "import os; print(os.environ['OWN'], 'PATH' in os.environ)"
    process = LocalProcess("a process", python_command(code), tmp_path / "log", environment={"OWN": "mine"})
    process.begin()
    assert process.process.wait(60) == 0
    assert process.read_log_tail() == "mine True"


def test_signals_are_handled_after_the_block_or_ignored():
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        with suppress_stop_signals():
            signal.raise_signal(signal.SIGTERM)
        assert arrived == []
        with hold_signals():
            signal.raise_signal(signal.SIGTERM)
            assert arrived == []
        assert arrived == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_page_is_read_without_the_environments_proxy(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/page" else 503)
            self.end_headers()
            self.wfile.write(b"text")

        def log_message(self, *_):
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert read_page(f"{url}/page", 10) == "text"
        assert read_page(f"{url}/other", 10) is None
        server.shutdown()
    assert read_page(url) is None
