"""What every program does alike: exit codes, signals, logging to the terminal, and output that no terminal refuses."""

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

# What a full disk, a quota or a read-only place says, and what else a system refuses, wherever in a run.
REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
                  errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE)  # fmt: skip
SPELLED_OUT = "cdc_mmpg.spelled_out"  # name of the error handler below
# ASCII for the signs of our tables and messages: without its sign a figure would be another one.
ASCII = {"±": "+-", "−": "-", "–": "-", "×": "x", "·": "-", "→": "->", "≤": "<=", "≥": ">=", "°": " degrees",
         "…": "...", "“": '"', "”": '"', "’": "'", "─": "-", "━": "-", "†": "*", "‡": "**", "§": "***"}  # fmt: skip
# What SLURM sends before the time limit (#SBATCH --signal=SIGUSR1@90): the job is to be started again.
REQUEUE = signal.SIGUSR1


def exit_code(function: Callable[[], None]) -> int:
    """Run a program that is `function` and return its exit code.

    A CDCError is one message on the standard error. Output is safe in any encoding, and a reader that leaves (`| head`)
    ends the program quietly, with 141.
    """
    protect_output()
    os.environ["MPLBACKEND"] = "agg"  # figures are files, and a backend that is not there stops every import of it
    try:
        function()
    except Stopped as error:  # last, when no progress bar draws any more
        how = "type the same command again to go on"
        if error.number == REQUEUE:
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
        ours = _cause(error)
        if ours is None:
            raise
        print_error(f"{type(ours).__name__}: {ours}")
        for child in multiprocessing.active_children():  # one that hangs would be waited for
            child.kill()
        return ours.exit_code
    lost = find_lost_output()  # what was still buffered
    return end_without_output(lost) if lost else 0


def _cause(error: BaseException | None) -> CDCError | None:
    """What of our own lies behind an error: the parser wraps what a class raises into errors of its own."""
    while error is not None:
        if isinstance(error, CDCError):
            if not str(error).startswith("Caught "):
                return error
            # A loader process hands its error over with its own traceback in the text.
            return type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2])
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader"):
            return DataError(f"a process that loads batches hung or was killed: {error}")
        if trouble := _explain_machine(error):
            return trouble
        error = error.__cause__ or error.__context__
    return None


def _explain_machine(error: BaseException) -> CDCError | None:
    """Return what the machine has run out of, refuses or has ended, as an error of ours; None of another error."""
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error):  # torch's, which need not be here
        reason = str(error).strip().partition("\n")[0].partition(" Of the allocated")[0]
        return ConfigError(
            f"the GPU's memory does not do: {reason} Take a smaller batch and as many more for a step "
            "(ARGS=--data.init_args.per_device=64), PRECISION=bf16-mixed, or end "
            "what else runs there"
        )
    if type(error).__name__ == "DistBackendError" or "Connection closed by peer" in str(error):
        return CDCError("another process of this run has ended: its own message says why")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return ConfigError(
            "the machine's memory does not do: take a smaller batch and as many more for a step "
            "(ARGS=--data.init_args.per_device=64), fewer loader processes "
            "(--data.init_args.num_workers=1), or end what else runs here"
        )
    if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
        return CDCError(
            f"{error.filename or 'a file'}: cannot be written ({error.strerror}): make room, or make the place "
            "writable, and type the same command again"
        )
    return None


class PlainFormatter(logging.Formatter):
    """Messages without control characters: they name files and words that others chose."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's message."""
        return escape_controls(super().format(record))


def log_to_terminal() -> None:
    """Our own messages, and of Lightning's the warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    for name in ("cdc_mmpg", "data_modules"):
        # Of several processes the first one speaks; a rank without a number of processes is not of this command.
        other = os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"
        logging.getLogger(name).setLevel(logging.ERROR if other else logging.INFO)
    for name, level in (("lightning.pytorch", logging.WARNING), ("lightning.fabric", logging.WARNING),
                        ("huggingface_hub", logging.ERROR)):  # fmt: skip
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = False


# Signals that end a program: SIGTERM, SIGINT, SIGHUP of a closed terminal, SLURM's SIGUSR1


class Stopped(SystemExit):
    """The end of a command by a signal, with exit code 128 + its number; `exit_code` says how to go on.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.leads: bool | None = None  # whether this process speaks for the run; None before the run knows


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle: SIGHUP unless it is ignored (nohup), SIGUSR1 in a job of SLURM alone."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [*numbers, REQUEUE] if os.environ.get("SLURM_JOB_ID") else numbers


def drop_terminal(number: int) -> None:
    """After SIGHUP send all further output that goes to no file to nowhere: the terminal is gone, and writing fails."""
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def ignore_stop_signals(worker: int = 0) -> None:
    """Leave stopping to the process that started this helper: Ctrl-C, a closed terminal and SLURM reach them all."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, REQUEUE):
        signal.signal(number, signal.SIG_IGN)


def leave_on_signals() -> None:
    """End with 128 + the signal's number, cleaning up."""
    for number in stop_signals():
        signal.signal(number, _leave)


@contextmanager
def hold_signals(for_helpers: bool = False) -> Iterator[None]:
    """Answer signals after the block, in which processes start: one that is stopped while it starts prints a traceback.

    Args:
        for_helpers: the processes never hear Ctrl-C or a closed terminal, which this process answers.
    """
    if threading.current_thread() is not threading.main_thread():  # others handle no signals
        yield
        return
    held: list[int] = []
    if for_helpers:
        resource_tracker.ensure_running()  # it starts with the first lock and lets signals through from then on
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


def _leave(number: int, frame: object) -> None:
    drop_terminal(number)
    if number == REQUEUE:  # srun ends all tasks when one has left: that does not stop the requeue
        ignore_stop_signals()
    raise Stopped(number)


# Standard output and error: what they cannot show is spelled out, and a reader that leaves is no fault


def spell_out(error: UnicodeError) -> tuple[str, int]:
    """Return an ASCII spelling of characters that an encoding lacks, and where to go on (see `codecs.register_error`).

    Raises:
        UnicodeError: something is decoded, not encoded.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII.get(letter) or _escape(letter) for letter in lacking), error.end


codecs.register_error(SPELLED_OUT, spell_out)


def escape_controls(text: str) -> str:
    """Return a text with its control characters, but line feeds and tabs, as escapes: foreign names may hold some."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def protect_output() -> None:
    """Let standard output and error take any text, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # neither a closed one nor a test's
            stream.reconfigure(errors=SPELLED_OUT)


def print_error(text: str) -> None:
    """Print a message on the standard error, if anybody reads it."""
    with suppress(OSError):
        print(escape_controls(text), file=sys.stderr, flush=True)


def find_lost_output() -> OSError | None:
    """Return why standard output takes no more, and send the rest nowhere; None where it is in order."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            _check_reader()  # a long text that failed is not flushed again
    except OSError as error:
        with suppress(OSError, ValueError):  # of a stream without a descriptor nothing is left to flush
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error
    return None


def _check_reader() -> None:
    """Raise BrokenPipeError where standard output is a pipe that nobody reads."""
    with suppress(ValueError, AttributeError):  # no descriptor; no `poll` on this system
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def end_without_output(error: OSError) -> int:
    """Return the exit code of a program whose standard output is lost: quietly where its reader left (`| head`)."""
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    print_error(f"CDCError: standard output cannot be written ({error.strerror}): make room, or send it elsewhere")
    return CDCError.exit_code
