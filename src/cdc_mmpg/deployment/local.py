"""Local server processes: context managers that start them, wait until they are ready, and always stop them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

from cdc_mmpg.errors import CDCError
from cdc_mmpg.program import hold_signals

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0  # maximum time until a server is ready
STOP_SECONDS = 10.0  # time between the stop signal and SIGKILL
POLL_SECONDS = 0.05  # interval of checks whether a server is ready
LOG_TAIL_CHARACTERS = 2000  # length of the log excerpt in an error
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LocalProcess:
    """A process from `begin` to `stop`; its output is appended to a log.

    Args:
        name: name of the process in errors.
        command: command line of the process.
        log: path of the log file.
        environment: environment variables in addition to those of this process.
        piped: whether stdin and stdout are pipes; the log then contains only stderr.
        own_session: whether to start a new session, so that the terminal's signals do not reach the process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        piped: bool = False,
        own_session: bool = False,
    ) -> None:
        self.name, self.command, self.log = name, list(command), log
        self.process: subprocess.Popen[Any] | None = None
        self._environment, self._piped, self._own_session = dict(environment or {}), piped, own_session

    def begin(self) -> None:
        """Start the process without waiting until it is ready."""
        with self.log.open("ab") as file, hold_signals():
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE if self._piped else None,
                stdout=subprocess.PIPE if self._piped else file,
                stderr=file,
                text=self._piped,
                env={**os.environ, **self._environment},
                start_new_session=self._own_session,
            )

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal if the process is running."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """Stop the process, killing it after `seconds`, and return its exit code; 0 if it was never started."""
        if self.process is None:
            return 0
        with suppress_stop_signals():
            self.send_signal(number)
            try:
                code = self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                code = self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        return code

    def read_log_tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:].strip()


class LocalServer(LocalProcess):
    """A process that serves HTTP and reports readiness at /ready; as a context manager, it is ready in its block.

    Args:
        name: see `LocalProcess`.
        command: see `LocalProcess`; the option --port is appended.
        log: see `LocalProcess`.
        port: port of the server; 0 chooses a free one.
        environment: see `LocalProcess`.
        own_session: see `LocalProcess`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        port: int = 0,
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        self.port = port or find_free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        super().__init__(
            name, [*command, "--port", str(self.port)], log, environment=environment, own_session=own_session
        )

    def start(self, seconds: float = START_SECONDS) -> Self:
        """Start the server and wait until it is ready.

        Raises:
            CDCError: the server is not ready in time; with the end of its log.
        """
        try:
            self.begin()
            self.wait_until_ready(seconds=seconds)
        except BaseException:
            self.stop()
            raise
        return self

    def wait_until_ready(self, is_ready: Callable[[], bool] | None = None, seconds: float = START_SECONDS) -> None:
        """Wait until the server is ready.

        Args:
            is_ready: check to use instead of /ready, for a server that is not reachable from this process.
            seconds: maximum wait.

        Raises:
            CDCError: the server ended, or is not ready in time; with the end of its log.
        """
        assert self.process is not None
        end = time.monotonic() + seconds
        while not (is_ready() if is_ready else read_page(f"{self.url}/ready") is not None):
            if (code := self.process.poll()) is not None or time.monotonic() > end:
                reason = f"not ready after {seconds:g} s" if code is None else f"exit code {code}"
                raise CDCError(f"{self.name} did not start, {reason}:\n{self.read_log_tail()}")
            time.sleep(POLL_SECONDS)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class LocalService(LocalServer):
    """The cloud service (`python -m cdc_mmpg.cloud`) with a bundle.

    Args:
        bundle: cloud/ folder of an export.
        log: see `LocalProcess`.
        options: command line options of the service.
        name: see `LocalProcess`.
        port: see `LocalServer`.
        prefix: words before the command, such as `ip netns exec <name>`.
        environment: see `LocalProcess`.
        own_session: see `LocalProcess`.
    """

    def __init__(
        self,
        bundle: Path,
        log: Path,
        *options: str,
        name: str = "the service",
        port: int = 0,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        command = [*prefix, sys.executable, "-m", "cdc_mmpg.cloud", str(bundle.absolute()), *options]
        super().__init__(name, command, log, port=port, environment=environment, own_session=own_session)


def find_free_port() -> int:
    """Return a free port of this machine."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])


def read_page(url: str, seconds: float = 1.0) -> str | None:
    """Return the body of a GET without a proxy; None if the server does not answer or replies with an error."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, HTTPException, OSError):
        return None


@contextmanager
def suppress_stop_signals() -> Iterator[None]:
    """Ignore stop signals during a block that cleans up."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
