"""Cells that several tables share: the paper's figures, differences to fine-tuning, numbers of seeds."""

from cdc_mmpg.catalogue import BASELINE
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, ZERO_BYTES, CitedText, Fact, cite, cite_constant
from cdc_mmpg.evidence.pairing import Gain, Side
from cdc_mmpg.evidence.paper import Erratum
from cdc_mmpg.evidence.runs import Run

GAIN_HEADER = "vs fine-tuning"
NO_BYTES = cite_constant(ZERO_BYTES, "ZERO_BYTES")
MEDIAN_HEADERS = {"VR": "VR median", "TR": "TR median"}  # headers of median ranks, by direction
FOOTNOTE_SIGNS = "†‡§¶"  # of footnotes, in this order


class PaperQuotes:
    """Figures of the paper quoted in a table, with a footnote for each error of the paper among them.

    Args:
        evidence: evidence of the dataset.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.errata: list[Erratum] = []  # in the order of their signs

    def cite(self, *keys: str) -> CitedText:
        """Return a figure of the paper with its footnote signs; empty if the paper has no such figure."""
        fact = self.evidence.cite_paper(*keys)
        if fact is None:
            return NO_TEXT
        errata = self.evidence.find_errata(*keys)
        self.errata += [erratum for erratum in errata if erratum not in self.errata]
        signs = "".join(FOOTNOTE_SIGNS[self.errata.index(erratum)] for erratum in errata)
        return cite(f"{{}} {signs}".rstrip(), fact)

    def write_notes(self) -> list[CitedText]:
        """Return the footnotes to all figures cited so far."""
        return [
            cite(
                f"{sign} {erratum.text}.",
                *(cite_constant(value, name, Erratum.__module__) for name, value in erratum.figures.items()),
            )
            for sign, erratum in zip(FOOTNOTE_SIGNS, self.errata, strict=False)
        ]


def compare_with_fine_tuning(evidence: Evidence, sides: list[Side]) -> list[Gain | None]:
    """Return the difference of each side to fine-tuning; None for fine-tuning itself."""
    gains = evidence.compare_all([(side, Side(BASELINE)) for side in sides])
    return [None if side.name == BASELINE else gain for side, gain in zip(sides, gains, strict=True)]


def cite_recall(evidence: Evidence, side: Side, kind: str) -> CitedText:
    """Return a recall; for one seed without the interval, because six intervals would double the table's width."""
    several = len(evidence.find_runs(*side)) > 1
    return evidence.cite_accuracy(side, kind=kind, interval=several)


def count_seeds(runs: list[Run]) -> CitedText:
    """Return a cell with the number of seeds."""
    return cite("{}", Fact(len(runs), str(len(runs)), "count", tuple(run.locate("seed") for run in runs)))


def cite_result(evidence: Evidence, run: Run, *keys: str) -> CitedText:
    """Return a value of a run's results as a cell; empty if it is missing."""
    return cite_or_empty(evidence.cite_value(run, *keys))


def cite_or_empty(fact: Fact | None) -> CitedText:
    """Return a fact as a cell; empty for None."""
    return cite("{}", fact) if fact else NO_TEXT
