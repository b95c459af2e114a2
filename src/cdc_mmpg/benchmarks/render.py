"""Helpers of the benchmarks: report type, tables, and memory of this process."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Report = dict[str, Any]


def make_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with left-aligned text columns and right-aligned number columns."""
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def read_memory(name: str) -> float | None:
    """Read a memory figure of this process (VmRSS, VmHWM) in MB; return None if the system provides none."""
    try:
        match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(match[1]) * 1024 / 1e6 if match else None
