"""Tables and lists as Markdown and in the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from cdc_mmpg.evidence.facts import Table
from cdc_mmpg.program import escape_controls


def render_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    alignment = ["---", *["---:"] * (len(table.header) - 1)]
    header, *rows = ([" ".join(text.replace("|", "&#124;").split("\n")) for text in row]
                     for row in (table.header, *table.texts()))  # fmt: skip
    lines = [header, alignment, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_bullets(lines: Sequence[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def print_table(table: Table, below: str, title: str | None = None) -> None:
    """Print a table with a text below it."""
    grid = Grid(
        collapse_padding=True, pad_edge=False, box=SIMPLE_HEAD, caption=_plain(below), caption_justify="left",
        title=title and _plain(title), title_justify="left",
    )  # fmt: skip
    for number, name in enumerate(table.header):
        grid.add_column(_plain(name), justify="right" if number else "left", no_wrap=True)
    for row in table.texts():
        grid.add_row(*map(_plain, row))
    console = Console(width=1000)  # as wide as its figures, below 200 columns; a narrower terminal wraps it
    with console.capture() as captured:
        console.print(grid)
    print(captured.get(), end="")  # rich has an exit code of its own for a reader that leaves


def _plain(text: str) -> Text:
    """Return a text in which neither brackets are markup nor foreign control characters are left."""
    return Text(escape_controls(text))
