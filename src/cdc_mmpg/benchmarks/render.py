"""What the benchmarks' parts have in common: a report of figures, a table of it, and what a process takes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Report = dict[str, Any]


def make_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with columns of words, then of numbers."""
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def read_memory(name: str) -> float | None:
    """Return a figure of this process's memory (VmRSS, VmHWM) in MB; None where the system tells none."""
    try:
        found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None
