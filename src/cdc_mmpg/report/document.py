"""The page as data: sections of blocks, which the template renders as HTML, and all figures of the page by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cdc_mmpg.evidence.facts import CitedText, Fact, Table
from cdc_mmpg.report.plots import Chart, LegendEntry


class Piece(NamedTuple):
    """A part of a text: either words or a figure."""

    text: str = ""
    fact: Fact | None = None


class MarkedText(NamedTuple):
    """A text whose figures the page records: the main part, and an interval in small print."""

    main: list[Piece]
    interval: list[Piece]


# Blocks of a section. `kind` names the template macro that renders a block as HTML.


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: ClassVar = "heading"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a note has a smaller font."""

    text: MarkedText
    is_note: bool = False
    kind: ClassVar = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: list[MarkedText]
    kind: ClassVar = "bullets"


class Card(NamedTuple):
    """One large figure with its name and a detail."""

    name: str
    figure: MarkedText
    detail: MarkedText


@dataclass(frozen=True)
class Cards:
    """The key figures of the page."""

    cards: list[Card]
    kind: ClassVar = "cards"


@dataclass(frozen=True)
class TableBlock:
    """A table; with a summary it is collapsed until a reader opens it."""

    title: str
    header: list[str]
    rows: list[tuple[str, list[MarkedText]]]
    notes: list[MarkedText]
    summary: str = ""
    kind: ClassVar = "table"


@dataclass(frozen=True)
class ChartBlock:
    """A chart with its legend and caption."""

    svg: Markup
    legend: Sequence[LegendEntry]
    caption: str
    kind: ClassVar = "chart"


@dataclass(frozen=True)
class CodeBlock:
    """Shell commands."""

    lines: Sequence[str]
    kind: ClassVar = "code"


class Section(NamedTuple):
    """A section of the page."""

    name: str
    title: str
    blocks: list[Any]


class Page:
    """Builder of the page: its sections so far, and its figures by name."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}  # content of report.json
        self.sections: list[Section] = []

    def begin(self, name: str, title: str) -> None:
        """Begin a section."""
        self.sections.append(Section(name, title, []))

    def add(self, block: Any) -> None:
        """Add a block to the current section."""
        self.sections[-1].blocks.append(block)

    def keep(self, name: str, fact: Fact) -> Fact:
        """Record a figure of the page under `name`, numbered if another figure has that name; return the figure."""
        entry, free_name, number = fact.to_entry(), name, 1
        while self.entries.get(free_name, entry) != entry:
            number += 1
            free_name = f"{name} ({number})"
        self.entries[free_name] = entry
        return fact

    def keep_all(self, name: str, text: CitedText) -> None:
        """Record the figures of a text that a chart shows, numbered from 0."""
        for number, fact in enumerate(text.facts):
            self.keep(f"{name}/{number}", fact)

    def mark(self, name: str, text: CitedText, splits_interval: bool = False) -> MarkedText:
        """Record the figures of a text and return it in pieces, optionally with the bracketed interval separate."""
        names = iter(f"{name}/{number}" if len(text.facts) > 1 else name for number in range(len(text.facts)))
        facts = iter(text.facts)
        marked = MarkedText([], [])
        pieces = marked.main
        for words, field, _, _ in Formatter().parse(text.template):
            before, bracket, after = words.partition("[") if splits_interval else (words, "", "")
            pieces.append(Piece(before))
            if bracket and pieces is marked.main:
                pieces = marked.interval
            pieces.append(Piece(bracket + after))
            if field is not None:
                pieces.append(Piece(fact=self.keep(next(names), next(facts))))
        return marked

    def add_paragraph(self, text: str, is_note: bool = False) -> None:
        """Add a paragraph without figures."""
        self.add(Paragraph(MarkedText([Piece(text)], []), is_note))

    def add_sentences(self, name: str, sentences: Sequence[CitedText], otherwise: str) -> None:
        """Add sentences as a list, or the paragraph `otherwise` if there are none."""
        if sentences:
            self.add(Bullets([self.mark(f"{name}/{number}", text) for number, text in enumerate(sentences)]))
        else:
            self.add_paragraph(otherwise)

    def add_table(self, table: Table, summary: str = "") -> None:
        """Add a table; with a summary it is collapsed until a reader opens it."""
        rows = []
        for label, cells in table.rows:
            columns = zip(table.header[1:], cells, strict=True)
            rows.append((label, [self.mark(f"{table.name}/{label}/{name}", cell, True) for name, cell in columns]))
        notes = [self.mark(f"{table.name}/note {number}", note) for number, note in enumerate(table.notes)]
        self.add(TableBlock(table.title, table.header, rows, notes, summary))

    def add_chart(self, chart: Chart, caption: str) -> None:
        """Add a chart with its caption."""
        self.add(ChartBlock(Markup(chart.svg), chart.legend, caption))

    def render(self, title: str, lead: str) -> str:
        """Render the page as HTML."""
        environment = Environment(
            loader=PackageLoader("cdc_mmpg.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            keep_trailing_newline=True, undefined=StrictUndefined,
        )  # fmt: skip
        template = environment.get_template("report.html.j2")
        return template.render(title=title, lead=lead, sections=self.sections).lstrip()
