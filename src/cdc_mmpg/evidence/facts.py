"""Facts: figures that say from where they were read and how, the texts and tables in which they stand.

The sources of a `Fact` are places in the runs' files, relative to `checkpoints/<dataset>`:
`<run>/seed<N>/results.json#/<JSON pointer>`, `<run>/seed<N>/predictions.test.csv#<case>`, a log's
`metrics.csv#<column>`, or a constant of the code, `cdc_mmpg.<module>#...`. `how` says what was made of them:

    value       what stands there                       mean, stdev     over the sources, each a seed's
    sum         of the sources                          least, most     of the sources
    count       how many sources there are              delay           milliseconds for so many bytes at `rate` MiB/s
    column      all that stands in a log's column       share           of the questions, those answered rightly
    difference  of the shares of `sources` and `minus`, paired by question, averaged over seeds; low and high are the
                ends of its 95 % interval, all questions of the test resampled (`metrics.accuracies`)
    right only here   questions that `sources` answers rightly and `minus` does not
    devices better    devices of which `sources` answers more questions rightly than `minus`

What else an entry holds narrows the questions (`group`, `device`) or changes the unit: `over` divides each source by
another, then `plus` adds, then `times` multiplies.
"""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any, NamedTuple

from cdc_mmpg.wire.messages import FRAMING_BYTES, HEADER

# What `wire` adds to an upload, where a layer has FRAMING_BYTES; what HTTP, TCP and IP add is measured by `make delay`.
HEADER_BYTES = HEADER.size
ANSWER_BYTES = 2  # the id of an answer, what the cloud sends back where it answers itself
FEATURE_BYTES = 768  # 192 float32: what is uploaded
NOTHING_BYTES = 0  # what a method without a cloud sends

BYTES_PER_MIB = 2**20


class Fact(NamedTuple):
    """A figure, how it is printed, and where it comes from."""

    value: float | str | list[float]
    shown: str
    how: str
    sources: tuple[str, ...]
    more: Mapping[str, Any] = {}

    @property
    def amount(self) -> float:
        """Value of a fact that is a number."""
        return float(self.value)  # type: ignore[arg-type]

    def entry(self) -> dict[str, Any]:
        """Return its entry in report.json."""
        return {
            "value": self.value, "shown": self.shown, "how": self.how, "sources": list(self.sources), **self.more,
        }  # fmt: skip


class CitedText(NamedTuple):
    """A text in which facts stand: of a table, or a sentence."""

    template: str  # with a {} for each fact
    facts: tuple[Fact, ...] = ()

    @property
    def text(self) -> str:
        """The text with its facts as they are printed."""
        return self.template.format(*(fact.shown for fact in self.facts))

    def __bool__(self) -> bool:
        return bool(self.template)


NO_TEXT = CitedText("")


class Table(NamedTuple):
    """A table as data, for every renderer: the first column is the rows' label."""

    name: str  # in report.json
    title: str
    header: list[str]
    rows: list[tuple[str, list[CitedText]]]
    notes: Sequence[CitedText] = ()

    def texts(self) -> list[list[str]]:
        """Return the rows as texts, without where they come from."""
        return [[label, *(cell.text for cell in cells)] for label, cells in self.rows]


def cite(template: str, *facts: Fact) -> CitedText:
    """Return `template` with each `{}` replaced by a fact."""
    return CitedText(template, facts)


def escape_braces(text: str) -> str:
    """Return a foreign text as part of a template: its braces hold no figures."""
    return text.replace("{", "{{").replace("}", "}}")


def join_texts(template: str, *parts: CitedText) -> CitedText:
    """Return `template` with each `{}` replaced by a text, whose facts it keeps."""
    return CitedText(
        template.format(*(part.template for part in parts)), tuple(fact for part in parts for fact in part.facts)
    )


def format_difference(value: float) -> str:
    """Return a difference with its sign; what rounds to zero has none."""
    return "0.0" if round(value, 1) == 0 else f"{value:+.1f}".replace("-", "−")


def cite_constant(value: float, name: str, module: str = "cdc_mmpg.evidence.facts") -> Fact:
    """Return a constant of a module (default: this one); numbers that are not whole with three significant digits."""
    return Fact(value, f"{value:,}" if isinstance(value, int) else f"{value:.3g}", "value", (f"{module}#{name}",))


def add_facts(*facts: Fact) -> Fact:
    """Return the sum of facts that are values."""
    value = sum(fact.amount for fact in facts)
    return Fact(value, f"{value:,.0f}", "sum", tuple(source for fact in facts for source in fact.sources))


def add_framing(payload: Fact, upload: bool = False) -> Fact:
    """Return bytes of a message with its header and, of a layer, its signature; 0 where nothing is sent."""
    name, added = ("HEADER_BYTES", HEADER_BYTES) if upload else ("FRAMING_BYTES", FRAMING_BYTES)
    return add_facts(payload, cite_constant(added, name)) if payload.value else payload


def compute_delay(payload: Fact, rate: int) -> Fact:
    """Return milliseconds for a payload at `rate` MiB/s, which the paper calls MB/s."""
    value = 1000 * payload.amount / (rate * BYTES_PER_MIB)
    digits = 2 if value >= 1 else 2 - floor(log10(value)) if value > 0 else 0  # three that count
    return Fact(value, f"{value:.{digits}f}", "delay", payload.sources, {"rate": rate})
