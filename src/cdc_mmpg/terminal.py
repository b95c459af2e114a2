"""Standard output and error: what cannot be shown there is spelled out, and a reader that leaves is no fault."""

import codecs
import errno
import os
import select
import signal
import sys
from contextlib import suppress

from cdc_mmpg.errors import CDCError

SPELLED_OUT = "cdc_mmpg.spelled_out"  # name of the error handler below
# ASCII for the signs of our tables and messages: without its sign a figure would be another one.
ASCII = {"±": "+-", "−": "-", "–": "-", "×": "x", "·": "-", "→": "->", "≤": "<=", "≥": ">=", "°": " degrees",
         "…": "...", "“": '"', "”": '"', "’": "'", "─": "-", "━": "-", "†": "*", "‡": "**", "§": "***"}  # fmt: skip


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
