"""Accuracy against the number of anchors: curves of sessions, lines of other methods; for the page and as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.catalogue import BASELINE, CONCATENATED, SESSION, choose_color
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import CitedText
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import Run
from cdc_mmpg.report.canvas import (
    HEAD,
    INK,
    MUTED,
    SMALL,
    TEXT,
    EndLabel,
    encode_png,
    label_ends,
    open_canvas,
    style_axes,
)
from cdc_mmpg.report.plots import Series, draw_curves, make_point

ANCHORS_LABEL = "n, number of anchors (other clips of the device)"

# Reference lines: method, condition (None: the run's first), label, color.
REFERENCES = (
    (BASELINE, None, "Fine-tuning", choose_color(BASELINE)),
    ("cdc_mmpg", None, "CDC-MMPG per sample", choose_color("cdc_mmpg")),
    (SESSION, "shuffled_n16", "another device's 16 anchors", "#8250df"),
    (CONCATENATED, None, "concatenated", choose_color(CONCATENATED)),
    ("session_oracle", None, "oracle: the true cast", choose_color("session_oracle")),
)
# Curves of the session: type of questions, label, color.
CURVES = (("all", "session, all questions", choose_color(SESSION)), ("color", "session, color questions", "#cf3f2e"))


class AnchorCurve(NamedTuple):
    """Accuracies by number of anchors; a reference method has one accuracy, with None for the number."""

    label: str
    color: str
    accuracies: Sequence[tuple[int | None, CitedText]]

    def to_series(self, counts: Sequence[int]) -> Series:
        """Convert to points, each at the position of its number in `counts`."""
        points = []
        for count, accuracy in self.accuracies:
            title = f"{self.label}: {accuracy.text} %" if count is None else (
                f"{self.label}, {count} anchors: {accuracy.text} %"
            )  # fmt: skip
            points.append(make_point(0 if count is None else counts.index(count), accuracy, title))
        return Series(self.label, self.color, points, dashed=self.accuracies[0][0] is None)


def find_anchor_counts(evidence: Evidence) -> list[int]:
    """Return the numbers of anchors that sessions were tested with, sorted."""
    cases = (case for run in evidence.find_runs(SESSION) for case in run.results["accuracy"])
    return sorted({int(case[1:]) for case in cases if case[:1] == "n" and case[1:].isdecimal()})


def collect_anchor_curves(evidence: Evidence) -> list[AnchorCurve]:
    """Return the curves of sessions, then the lines of the reference methods."""
    curves = []
    for kind, label, color in CURVES:
        accuracies = [
            (count, accuracy)
            for count in find_anchor_counts(evidence)
            if (accuracy := evidence.cite_accuracy(Side(SESSION, f"n{count}"), kind=kind))
        ]
        if accuracies:
            curves.append(AnchorCurve(label, color, accuracies))
    for name, condition, label, color in REFERENCES:
        if accuracy := evidence.cite_accuracy(Side(name, condition)):
            curves.append(AnchorCurve(label, color, [(None, accuracy)]))
    return curves


def draw_anchors(folder: Path) -> bytes:
    """Draw accuracy on unseen devices against the number of anchors, as PNG.

    Raises:
        ConfigError: no finished run has these accuracies.
    """
    evidence = Evidence(folder)
    counts = find_anchor_counts(evidence)
    series = [curve.to_series(counts) for curve in collect_anchor_curves(evidence)]
    references = [line for line in series if line.dashed]
    if evidence.group != "unseen" or len(references) == len(series):
        raise ConfigError(
            f"{folder / SESSION}: no finished run with accuracies on unseen devices for n anchors; train one first "
            "(make train)"
        )
    with open_canvas(1000, 540) as figure:
        axes = figure.add_axes((0.075, 0.12, 0.615, 0.735))
        axes.set_xlim(-0.2, max(len(counts) - 1, 0.2))
        draw_curves(axes, series)
        ends = [
            EndLabel(line.points[-1].y, f"{line.points[-1].y:.1f}  {line.label}", line.color,
                     "normal" if line.dashed else "bold")
            for line in series
        ]  # fmt: skip
        label_ends(axes, ends, SMALL, gap=21)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        style_axes(axes, ANCHORS_LABEL, "accuracy, %", TEXT, SMALL)
        caption = _write_caption(evidence.find_runs(SESSION), bool(references))
        figure.text(0.02, 0.945, "Accuracy on unseen devices", fontsize=HEAD, weight="bold", color=INK, va="center")
        figure.text(0.02, 0.897, caption, fontsize=SMALL, color=MUTED, va="center")
        return encode_png(figure)


def _write_caption(runs: Sequence[Run], has_references: bool) -> str:
    """Return the number of test questions and the meaning of the bands."""
    cells = [run.find("accuracy", "n0", "unseen", "all") or {} for run in runs]
    counts = dict.fromkeys(f"{cell['questions']:,}" for cell in cells if "questions" in cell)
    parts = [f"{' / '.join(counts)} test questions"] if counts else []
    parts.append(
        "band: 95 % interval, one seed" if len(cells) == 1 else f"band: ± standard deviation, {len(cells)} seeds"
    )
    return " · ".join([*parts, *(["dashed: all questions"] if has_references else [])])
