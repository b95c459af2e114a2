"""Terminal output: encodings, closed pipes, full disks, control characters; signals while processes start."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_tables import write_run

from cdc_mmpg.errors import DataError
from cdc_mmpg.program import PlainFormatter, Stopped, escape_controls, exit_on_signals, hold_signals, run_to_exit_code

TABLE = [sys.executable, "-m", "cdc_mmpg", "table"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_table_prints_in_any_encoding(encoding, tmp_path):
    for seed, value in enumerate((0.2, 0.4)):
        write_run(tmp_path / "synthetic", "linear", seed, value)
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*TABLE, str(tmp_path / "synthetic")], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    sign = "+-" if encoding == "ascii" else "±"
    assert f"30.0 {sign} 14.1" in done.stdout.decode(encoding)
    assert "30.0 ± 14.1" in (tmp_path / "synthetic" / "table.md").read_text()


class BrokenOutput:
    """Standard output whose reader has closed the pipe, or that is the given device file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: str | None = None) -> None:
        if path is None:
            read_end, self.writing = os.pipe()
            os.close(read_end)
        else:
            self.writing = os.open(path, os.O_WRONLY)
        self.stream = os.fdopen(self.writing, "w")
        monkeypatch.setattr(sys, "stdout", self.stream)


@pytest.mark.parametrize("letters", [10, 1_000_000])
def test_closed_output_pipe_ends_the_program_quietly(letters, monkeypatch, capsys):
    BrokenOutput(monkeypatch)
    assert run_to_exit_code(lambda: print("x" * letters)) == 141
    print("into nothing", flush=True)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_to_a_full_disk_is_reported(monkeypatch, capsys):
    BrokenOutput(monkeypatch, "/dev/full")
    assert run_to_exit_code(lambda: print("x")) == 1
    assert "standard output cannot be written (No space left on device)" in capsys.readouterr().err


def test_broken_pipe_of_another_file_is_raised():
    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_to_exit_code(fail)


@pytest.mark.parametrize(
    ("number", "failure"),
    [
        (errno.ENOSPC, "cannot be written"), (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be opened or written"), (errno.EMFILE, "cannot be opened or written"),
    ],
)  # fmt: skip
def test_failed_access_to_any_file_is_reported_with_its_path(number, failure, capsys):
    def fail() -> None:
        raise OSError(number, os.strerror(number), "place/metrics.csv")

    assert run_to_exit_code(fail) == 1
    assert f"CDCError: place/metrics.csv: {failure} ({os.strerror(number)})" in capsys.readouterr().err


def test_control_characters_in_messages_are_escaped(capsys):
    def fail() -> None:
        raise DataError("clip \x1b[31mred\x07\u202e: unreadable\n  and \udcff")

    assert run_to_exit_code(fail) == 3
    assert capsys.readouterr().err == "DataError: clip \\x1b[31mred\\x07\\u202e: unreadable\n  and \\udcff\n"
    record = logging.LogRecord("cdc_mmpg", logging.INFO, "", 0, "clip %s", ("\x1b]0;title\x07",), None)
    assert PlainFormatter("%(levelname)s %(message)s").format(record) == "INFO clip \\x1b]0;title\\x07"
    assert escape_controls("± −1.8\tü\n") == "± −1.8\tü\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_held_signal_is_delivered_after_processes_are_started(number, handlers):
    exit_on_signals()
    children: list[subprocess.Popen] = []

    def start_child() -> None:
        with hold_signals(for_helpers=True):
            os.kill(os.getpid(), number)
            children.append(subprocess.Popen(["sleep", "60"]))

    with pytest.raises(Stopped) as stopped:
        start_child()
    assert stopped.value.number == number
    (child,) = children
    child.send_signal(signal.SIGINT)  # ignored: the parent handles Ctrl-C
    time.sleep(0.1)
    assert child.poll() is None
    child.terminate()
    assert child.wait() == -signal.SIGTERM
    with pytest.raises(Stopped):
        signal.raise_signal(number)


def test_sigint_stays_blocked_while_multiprocessing_starts_its_tracker():
    """The first lock of a process starts multiprocessing's resource tracker, which unblocks signals."""
    code = (
        "import multiprocessing, signal\nfrom cdc_mmpg.program import hold_signals\n"
        "with hold_signals(for_helpers=True):\n    multiprocessing.get_context('spawn').RLock()\n"
        "    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
        "print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
