"""Servers of ours as processes of their own on this machine: started, waited for, and ended whatever ends the block."""

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
START_SECONDS = 60.0  # that a server may take to be ready
STOP_SECONDS = 10.0  # between asking a process to end and killing it
POLL_SECONDS = 0.05  # between two questions whether a server is ready
LOG_TAIL_CHARACTERS = 2000  # of a log, in an error
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LocalProcess:
    """A process from `begin` to `stop`; what it writes is appended to a log.

    Args:
        name: of the process, in errors.
        command: that begins it.
        log: the file.
        environment: variables that it has beside those of this process.
        piped: talk to it through pipes at its standard input and output; the log has its standard error alone.
        own_session: keep the terminal's signals away from it.
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
        """Start the process and wait for nothing."""
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

    def ask_to_end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal, if the process runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """End the process, by force where it takes longer than `seconds`, and return its exit code; 0 of none."""
        if self.process is None:
            return 0
        with suppress_stop_signals():
            self.ask_to_end(number)
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

    def log_tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:].strip()


class LocalServer(LocalProcess):
    """A process that serves HTTP and says at /ready when it can; ready in its block.

    Args:
        name: see `LocalProcess`.
        command: see `LocalProcess`; its port is added.
        log: see `LocalProcess`.
        port: 0 takes a free one.
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
            CDCError: it does not get ready in time; with the end of its log.
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
            is_ready: asks it, from elsewhere than here.
            seconds: that it has.

        Raises:
            CDCError: it ended, or is not ready in time; with the end of its log.
        """
        assert self.process is not None
        end = time.monotonic() + seconds
        while not (is_ready() if is_ready else read_page(f"{self.url}/ready") is not None):
            if (code := self.process.poll()) is not None or time.monotonic() > end:
                reason = f"not ready after {seconds:g} s" if code is None else f"exit code {code}"
                raise CDCError(f"{self.name} did not come up, {reason}:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class LocalService(LocalServer):
    """`python -m cdc_mmpg.cloud` with a bundle.

    Args:
        bundle: the cloud/ folder of an export.
        log: see `LocalProcess`.
        options: of the command line.
        name: see `LocalProcess`.
        port: see `LocalServer`.
        prefix: what the command begins with, as to run it elsewhere.
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
    """Return a port of this machine that nobody listens on."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])


def read_page(url: str, seconds: float = 1.0) -> str | None:
    """Return what a server replies to a GET, without a proxy; None where it refuses, or does not answer (yet)."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, HTTPException, OSError):
        return None


@contextmanager
def suppress_stop_signals() -> Iterator[None]:
    """Let no signal end a block that cleans up."""
    if threading.current_thread() is not threading.main_thread():  # others handle no signals
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
