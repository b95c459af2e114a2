"""Renderers of tables and lists, as Markdown and in the terminal."""

from collections.abc import Sequence
from shutil import get_terminal_size

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from cdc_mmpg.evidence.facts import Table
from cdc_mmpg.program import escape_controls

FULL_WIDTH = 1000  # characters, more than any table needs: the methods take fewer than 210


def render_markdown(table: Table) -> str:
    """Render a table as Markdown."""
    alignment = ["---", *["---:"] * (len(table.header) - 1)]
    header, *rows = ([" ".join(text.replace("|", "&#124;").split("\n")) for text in row]
                     for row in (table.header, *table.texts()))  # fmt: skip
    lines = [header, alignment, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_bullets(lines: Sequence[str]) -> str:
    """Render lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def print_table(table: Table, below: str, title: str | None = None) -> None:
    """Print a table with a text below it; a table wider than the terminal is printed in blocks of columns.

    Each block begins with the row labels. The width is COLUMNS if it is set; output that is not a terminal is as wide
    as the table.
    """
    width = get_terminal_size((FULL_WIDTH, 24)).columns
    console = Console(width=FULL_WIDTH)
    blocks = _split_columns(console, table, width)
    with console.capture() as captured:
        for number, columns in enumerate(blocks):
            heading = title if number == 0 else None
            console.print(_make_grid(table, columns, heading, below if len(blocks) == 1 else None))
        if len(blocks) > 1:
            console.print(_escape_text(below), width=width)
    print(captured.get(), end="")  # not by rich, which exits with its own code on a closed pipe


def _split_columns(console: Console, table: Table, width: int) -> list[list[int]]:
    """Split the columns (without the labels) into groups that fit into `width` characters, at least one each."""
    groups: list[list[int]] = [[]]
    for column in range(1, len(table.header)):
        if groups[-1] and console.measure(_make_grid(table, [*groups[-1], column])).maximum > width:
            groups.append([])
        groups[-1].append(column)
    return groups


def _make_grid(table: Table, columns: Sequence[int], title: str | None = None, below: str | None = None) -> Grid:
    """Build a grid with the row labels and these columns of a table."""
    grid = Grid(
        collapse_padding=True, pad_edge=False, box=SIMPLE_HEAD, caption=below and _escape_text(below),
        caption_justify="left", title=title and _escape_text(title), title_justify="left",
    )  # fmt: skip
    for column in (0, *columns):
        grid.add_column(_escape_text(table.header[column]), justify="right" if column else "left", no_wrap=True)
    for row in table.texts():
        grid.add_row(*(_escape_text(row[column]) for column in (0, *columns)))
    return grid


def _escape_text(text: str) -> Text:
    """Convert to a text without markup, with control characters escaped."""
    return Text(escape_controls(text))
