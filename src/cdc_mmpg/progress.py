"""Progress of long steps: a bar on a terminal; elsewhere, as in the log of a batch job, a line a minute."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0

T = TypeVar("T")


class Pace:
    """Pace of a long step, which says when a line about it is due and how long the rest takes."""

    def __init__(self) -> None:
        self.begun = self.last_line = time.monotonic()

    def is_line_due(self) -> bool:
        """Return whether the last line is a minute old; if so, the next one is due a minute from now."""
        due = (now := time.monotonic()) - self.last_line >= SECONDS_BETWEEN_LINES
        self.last_line = now if due else self.last_line
        return due

    def describe_rest(self, done: float) -> str:
        """Return an estimate of the remaining time as the end of a sentence; `done` is the share of the work, 0 to 1.

        The text is empty where nothing is left or nothing is known.
        """
        seconds = (time.monotonic() - self.begun) * (1 / done - 1) if 0 < done < 1 else 0.0
        return f", about {describe_seconds(seconds)} left" if seconds else ""


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how many are done: as a bar on a terminal, else in a log line a minute.

    Args:
        items: items to yield.
        description: what is done with them, in words such as "decoding clips".
        total: their number, if `items` does not know it.
    """
    if has_terminal():
        from rich.progress import track as draw_bar  # noqa: PLC0415  a device has no rich

        yield from draw_bar(items, description, total)
        return
    number = len(items) if total is None and isinstance(items, Sized) else total or 0
    pace = Pace()
    for done, item in enumerate(items, 1):
        yield item
        if pace.is_line_due():
            rest = pace.describe_rest(done / number if number else 0)
            logger.info("%s: %s%s%s", description, f"{done:,}", f" of {number:,}" if number else "", rest)


def has_terminal() -> bool:
    """Return whether there is a terminal to draw a bar on."""
    return sys.stderr is not None and sys.stderr.isatty()


def describe_seconds(seconds: float) -> str:
    """Return a duration with a suitable unit: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
