"""Parts shared by all programs: exit codes, signals, logging to the terminal, and safe output."""

import codecs
import errno
import logging
import multiprocessing
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from cdc_mmpg.errors import CDCError, ConfigError, DataError
from cdc_mmpg.launchers import find_launch, requeue

# Errors that any write of a run can raise, and those that reading a file can raise, too.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)
ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
SPELL_OUT_HANDLER = "cdc_mmpg.spelled_out"  # name of the codec error handler `spell_out`
# ASCII for the symbols of tables and messages; dropping them would change the figures.
ASCII_SPELLINGS = {"±": "+-", "−": "-", "–": "-", "×": "x", "·": "-", "→": "->", "≤": "<=", "≥": ">=", "°": " degrees",
         "…": "...", "“": '"', "”": '"', "’": "'", "─": "-", "━": "-", "†": "*", "‡": "**", "§": "***"}  # fmt: skip
# SLURM sends it before the time limit (#SBATCH --signal=SIGUSR1@90); the job is then requeued.
REQUEUE_SIGNAL = signal.SIGUSR1


def run_to_exit_code(function: Callable[[], None]) -> int:
    """Run `function`; print a CDCError as one message on the standard error; return the exit code.

    Output is safe in any encoding. If the reader of standard output exits (`| head`), the program ends silently with
    141.
    """
    protect_output()
    os.environ["MPLBACKEND"] = "agg"  # figures are files, and a missing backend makes the import fail
    try:
        function()
    except Stopped as error:  # handled here because all progress bars have ended
        how = "run the same command again (training and decoding resume where they stopped)"
        if error.number == REQUEUE_SIGNAL:
            leads = find_launch().rank == 0 if error.leads is None else error.leads
            how = requeue() if leads else "the first process asks SLURM to start the job again"
        logging.getLogger("cdc_mmpg").warning("stopped by %s; %s", signal.Signals(error.number).name, how)
        return 128 + error.number
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        lost = find_lost_output() if isinstance(error, OSError) else None
        if lost:
            return end_without_output(lost)
        ours = _find_cause(error)
        if ours is None:
            raise
        print_error(f"{type(ours).__name__}: {ours}")
        for child in multiprocessing.active_children():  # one that hangs would be waited for
            child.kill()
        return ours.exit_code
    lost = find_lost_output()  # what was still buffered
    return end_without_output(lost) if lost else 0


def _find_cause(error: BaseException | None) -> CDCError | None:
    """Return the CDCError behind an exception, if any: the parser wraps exceptions of the classes that it builds."""
    while error is not None:
        if isinstance(error, CDCError):
            if not str(error).startswith("Caught "):
                return error
            # An error from a loader process has that process's traceback in its text.
            return type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2])
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader"):
            return DataError(
                f"a loader process hung or was killed: {error}; free memory, or use fewer loader processes "
                "(ARGS=--data.init_args.num_workers=1), and run the same command again"
            )
        if failure := _explain_machine(error):
            return failure
        error = error.__cause__ or error.__context__
    return None


def _explain_machine(error: BaseException) -> CDCError | None:
    """Return a CDCError for a failure of the machine (memory, disk, another process); None for other errors."""
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error):  # torch may not be installed
        reason = str(error).strip().partition("\n")[0].partition(" Of the allocated")[0]
        return ConfigError(
            f"the GPU is out of memory: {reason} Accumulate smaller batches (ARGS=--data.init_args.per_device=64), use "
            "PRECISION=bf16-mixed, or end other processes on the GPU"
        )
    if type(error).__name__ == "DistBackendError" or "Connection closed by peer" in str(error):
        return CDCError("another process of this run has ended: see its message")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return ConfigError(
            "the machine is out of memory: accumulate smaller batches (ARGS=--data.init_args.per_device=64), use fewer "
            "loader processes (ARGS=--data.init_args.num_workers=1), or end other programs"
        )
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return CDCError(
            f"{error.filename or 'a file'}: cannot be written ({error.strerror}): make room, or make the place "
            "writable, and run the same command again"
        )
    if isinstance(error, OSError) and error.errno in ACCESS_ERRORS:
        return CDCError(
            f"{error.filename or 'a file'}: cannot be opened or written ({error.strerror}): check its permissions, its "
            "disk and the limit of open files (ulimit -n), and run the same command again"
        )
    return None


class PlainFormatter(logging.Formatter):
    """Formatter that escapes control characters: messages contain names and text from outside."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's message with control characters escaped."""
        return escape_controls(super().format(record))


def log_to_terminal() -> None:
    """Log the project's messages and Lightning's warnings to the terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    for name in ("cdc_mmpg", "data_modules"):
        # Only the first of several processes logs. LOCAL_RANK without WORLD_SIZE does not belong to this command.
        is_other_rank = os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"
        logging.getLogger(name).setLevel(logging.ERROR if is_other_rank else logging.INFO)
    for name, level in (("lightning.pytorch", logging.WARNING), ("lightning.fabric", logging.WARNING),
                        ("huggingface_hub", logging.ERROR)):  # fmt: skip
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = False


# Handling of the signals that end a program: SIGTERM, SIGINT, SIGHUP of a closed terminal, SLURM's SIGUSR1


class Stopped(SystemExit):
    """End of a command by a signal, with exit code 128 + its number; `run_to_exit_code` prints how to go on.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.leads: bool | None = None  # whether this process is the run's first; None before the run has ranks


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle: SIGHUP unless it is ignored (nohup), SIGUSR1 only in a SLURM job."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [*numbers, REQUEUE_SIGNAL] if os.environ.get("SLURM_JOB_ID") else numbers


def drop_terminal(number: int) -> None:
    """Redirect standard output and error to /dev/null after SIGHUP, unless they are files: the terminal is gone."""
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore stop signals in a helper process: they reach the whole group, and the parent process handles them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, REQUEUE_SIGNAL):
        signal.signal(number, signal.SIG_IGN)


def exit_on_signals() -> None:
    """Install handlers that end the program with 128 + the signal's number and run its cleanup."""
    for number in stop_signals():
        signal.signal(number, _exit_on_signal)


@contextmanager
def hold_signals(for_helpers: bool = False) -> Iterator[None]:
    """Defer signals until the end of a block that starts processes: one stopped during its start prints a traceback.

    Args:
        for_helpers: whether the processes inherit a mask that blocks SIGINT and SIGHUP, which this process handles.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    held: list[int] = []
    if for_helpers:
        resource_tracker.ensure_running()  # else it starts with the first lock and unblocks the signals
    before = {number: signal.signal(number, lambda caught, _: held.append(caught)) for number in stop_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP) if for_helpers else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, known in before.items():
            signal.signal(number, known)
        for caught in held:
            signal.raise_signal(caught)


def _exit_on_signal(number: int, frame: object) -> None:
    drop_terminal(number)
    if number == REQUEUE_SIGNAL:  # srun terminates all tasks when one exits; that must not stop the requeue
        ignore_stop_signals()
    raise Stopped(number)


# Output: characters that a stream cannot encode are spelled out, and a reader that exits is no error


def spell_out(error: UnicodeError) -> tuple[str, int]:
    """Return an ASCII spelling of characters that an encoding lacks, and where to resume (see `codecs.register_error`).

    Raises:
        UnicodeError: the error is one of decoding.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII_SPELLINGS.get(letter) or _escape(letter) for letter in lacking), error.end


codecs.register_error(SPELL_OUT_HANDLER, spell_out)


def escape_controls(text: str) -> str:
    """Return a text with control characters escaped, except line feeds and tabs: names from outside may hold some."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def protect_output() -> None:
    """Make standard output and error accept any text, in any encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent on a closed stream and on a test's
            stream.reconfigure(errors=SPELL_OUT_HANDLER)


def print_error(text: str) -> None:
    """Print a message on the standard error; ignore a closed stream."""
    with suppress(OSError):
        print(escape_controls(text), file=sys.stderr, flush=True)


def find_lost_output() -> OSError | None:
    """Flush standard output; on failure redirect it to /dev/null and return the error, else None."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            _check_reader()  # a failed write of a long text leaves nothing to flush
    except OSError as error:
        with suppress(OSError, ValueError):  # a stream without a descriptor has nothing left to flush
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error
    return None


def _check_reader() -> None:
    """Raise BrokenPipeError if standard output is a pipe without a reader."""
    with suppress(ValueError, AttributeError):  # no descriptor, or a system without `poll`
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def end_without_output(error: OSError) -> int:
    """Return the exit code after a failure of standard output; print it, unless the reader exited (`| head`)."""
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    print_error(f"CDCError: standard output cannot be written ({error.strerror}): make room, or redirect it")
    return CDCError.exit_code
