"""Facts: figures that record their sources and how they were computed, and the texts and tables that quote them.

The sources of a `Fact` are places in the runs' files, relative to `checkpoints/<dataset>`:
`<run>/seed<N>/results.json#/<JSON pointer>`, `<run>/seed<N>/predictions.test.csv#<case>`, a log's
`metrics.csv#<column>`, or a constant of the code, `cdc_mmpg.<module>#...`. `how` names the computation:

    value       the stored value                        mean, stdev     over the sources, one per seed
    sum         sum of the sources                      least, most     smallest and largest of the sources
    count       number of sources                       delay           milliseconds for the bytes at `rate` MiB/s
    column      all values of a log's column            share           share of questions answered correctly
    difference  share of `sources` minus share of `minus`, paired by question, averaged over seeds; low and high are the
                ends of its 95 % interval, with all questions of the test resampled (`metrics.compute_accuracies`)
    right only here   number of questions that `sources` answers correctly and `minus` does not
    devices better    number of devices of which `sources` answers more questions correctly than `minus`

Other keys of an entry narrow the questions (`group`, `device`) or change the unit: each source is divided by its `over`
source, then `plus` is added, then the sum is multiplied by `times`.
"""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any, NamedTuple

from cdc_mmpg.wire.messages import FRAMING_BYTES, HEADER

# Bytes that `wire` adds to an upload (to a layer: FRAMING_BYTES). `make delay` measures what HTTP, TCP and IP add.
HEADER_BYTES = HEADER.size
ANSWER_BYTES = 2  # id of an answer, which the cloud sends in split inference
FEATURE_BYTES = 768  # 192 float32 values: the uploaded feature
CLIP_BYTES = 36_864  # three frames of 64 x 64 pixels, uncompressed: a clip of the synthetic dataset
ZERO_BYTES = 0  # traffic of a method without a cloud

BYTES_PER_MIB = 2**20


class Fact(NamedTuple):
    """A figure, its printed form, and its sources."""

    value: float | str | list[float]
    shown: str
    how: str
    sources: tuple[str, ...]
    more: Mapping[str, Any] = {}

    @property
    def amount(self) -> float:
        """Value of a numeric fact."""
        return float(self.value)  # type: ignore[arg-type]

    def to_entry(self) -> dict[str, Any]:
        """Return the entry of this fact in report.json."""
        return {
            "value": self.value, "shown": self.shown, "how": self.how, "sources": list(self.sources), **self.more,
        }  # fmt: skip


class CitedText(NamedTuple):
    """A text that quotes facts: a table cell or a sentence."""

    template: str  # with a {} for each fact
    facts: tuple[Fact, ...] = ()

    @property
    def text(self) -> str:
        """Text with all facts in their printed form."""
        return self.template.format(*(fact.shown for fact in self.facts))

    def __bool__(self) -> bool:
        return bool(self.template)


NO_TEXT = CitedText("")


class Table(NamedTuple):
    """A table as data, for every renderer; the first column holds the row labels."""

    name: str  # prefix of its figures in report.json
    title: str
    header: list[str]
    rows: list[tuple[str, list[CitedText]]]
    notes: Sequence[CitedText] = ()

    def texts(self) -> list[list[str]]:
        """Return the rows as plain texts, without sources."""
        return [[label, *(cell.text for cell in cells)] for label, cells in self.rows]


def cite(template: str, *facts: Fact) -> CitedText:
    """Return `template` with each `{}` replaced by a fact."""
    return CitedText(template, facts)


def escape_braces(text: str) -> str:
    """Escape the braces of external text, so that it can be part of a template."""
    return text.replace("{", "{{").replace("}", "}}")


def join_texts(template: str, *parts: CitedText) -> CitedText:
    """Return `template` with each `{}` replaced by a text; the facts of all texts are kept."""
    return CitedText(
        template.format(*(part.template for part in parts)), tuple(fact for part in parts for fact in part.facts)
    )


def format_difference(value: float) -> str:
    """Format a difference with its sign; a difference that rounds to zero has no sign."""
    return "0.0" if round(value, 1) == 0 else f"{value:+.1f}".replace("-", "−")


def cite_constant(value: float, name: str, module: str = "cdc_mmpg.evidence.facts") -> Fact:
    """Return a constant of a module (default: this one) as a fact; floats are printed with three significant digits."""
    return Fact(value, f"{value:,}" if isinstance(value, int) else f"{value:.3g}", "value", (f"{module}#{name}",))


def add_facts(*facts: Fact) -> Fact:
    """Return the sum of facts that are single values."""
    value = sum(fact.amount for fact in facts)
    return Fact(value, f"{value:,.0f}", "sum", tuple(source for fact in facts for source in fact.sources))


def add_framing(payload: Fact, upload: bool = False) -> Fact:
    """Return the bytes of a message with its header and, for a layer, its signature; 0 if nothing is sent."""
    name, added = ("HEADER_BYTES", HEADER_BYTES) if upload else ("FRAMING_BYTES", FRAMING_BYTES)
    return add_facts(payload, cite_constant(added, name)) if payload.value else payload


def compute_delay(payload: Fact, rate: int) -> Fact:
    """Return the milliseconds that a payload takes at `rate` MiB/s, which the paper calls MB/s."""
    value = 1000 * payload.amount / (rate * BYTES_PER_MIB)
    digits = 2 if value >= 1 else 2 - floor(log10(value)) if value > 0 else 0  # three significant digits
    return Fact(value, f"{value:.{digits}f}", "delay", payload.sources, {"rate": rate})
