"""What the benchmarks' parts have in common: a report of figures, and a table of it."""

from collections.abc import Sequence
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
