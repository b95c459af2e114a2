"""The report: all that a dataset's runs show, as one page that opens from a disk, and where every figure comes from.

`cdc-mmpg report checkpoints/<dataset> [--data <dataset root>]` writes `report.html` and `report.json` there. The page
fetches nothing. report.json has every figure on the page under a name: its value, as it is printed, how it was made
and of what (see `evidence`).
"""

import argparse
import csv
import os
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import BytesIO
from math import isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cdc_mmpg.catalogue import BASELINE, FRAMES, NAMES, PER_SAMPLE, SESSION, SESSIONS, color_of, with_frames
from cdc_mmpg.errors import DataError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, Table, cite
from cdc_mmpg.evidence.findings import (
    compare_unless_guessing,
    find_equal_payloads,
    list_claims,
    list_control_findings,
    list_payloads,
)
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import ALL_GROUPS, PREDICTIONS, Run
from cdc_mmpg.evidence.selection import load_comparable
from cdc_mmpg.files import atomic_write
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.program import escape_controls, exit_code, log_to_terminal
from cdc_mmpg.report.caption import shorten_commit
from cdc_mmpg.report.figures import LINES, REFERENCES
from cdc_mmpg.report.missing import find_missing, format_command
from cdc_mmpg.report.paper_tables import find_frame_seeds
from cdc_mmpg.report.plots import Point, Series, bars, lines, pairs, scatter, stacked
from cdc_mmpg.report.tables import build_all_tables
from cdc_mmpg.results import write_json

GOOD, BAD = "#0b5cad", "#cf3f2e"

CLIPS = (".mp4", ".avi", ".gif", ".webm", ".mkv", ".mov")
EXAMPLES = 4  # of each kind
STRIP = 3  # frames of a clip that are shown
SIDE = 88  # pixels of a frame

STYLE = """
:root{--ink:#1f2328;--muted:#59636e;--line:#d1d9e0;--blue:#0b5cad;--soft:#f6f8fa}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:#fff;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px}
h2{font-size:1.3rem;margin:52px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:28px 0 4px}
p{margin:8px 0;max-width:74ch}
.lead{color:var(--muted);margin-bottom:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin:22px 0}
.card{border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:1.75rem;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{display:block;color:var(--muted);font-size:.88rem}
.card .range{color:var(--ink)}
ul.findings{padding-left:20px;max-width:80ch}
ul.findings li{margin:7px 0}
nav{font-size:.92rem}
nav a{margin-right:14px;white-space:nowrap}
a{color:var(--blue)}
.scroll{overflow-x:auto;margin:10px 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
small{color:var(--muted);font-size:.88em}
caption{text-align:left;font-weight:600;padding:0 0 8px;font-size:.95rem}
th,td{padding:5px 7px;text-align:right;white-space:nowrap;border-bottom:1px solid #eaeef2}
thead th{color:var(--muted);font-weight:600;border-bottom:1px solid var(--line);vertical-align:bottom}
tbody th,thead th:first-child{text-align:left;font-weight:500;position:sticky;left:0;background:#fff}
tbody th.control{color:var(--muted);padding-left:18px;font-weight:400}
tbody tr:hover td,tbody tr:hover th{background:var(--soft)}
.note,figcaption{color:var(--muted);font-size:.86rem;max-width:84ch;margin:4px 0 0}
figure{margin:22px 0}
svg{display:block;width:100%;min-width:600px;max-width:900px;height:auto;font-family:inherit}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:16px;margin:12px 0}
.clip{border:1px solid var(--line);border-radius:10px;padding:12px;font-size:.9rem}
.clip img{width:100%;display:block;border-radius:6px;margin-bottom:8px;image-rendering:auto}
.clip p{margin:2px 0}
.right{color:#1a6b32;font-weight:600}.wrong{color:#b3261e;font-weight:600}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:10px 12px;overflow-x:auto;
 font-size:.82rem;line-height:1.5}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.86em}
details{margin:8px 0}summary{cursor:pointer;color:var(--blue)}
@media(max-width:600px){main{padding:20px 14px 40px}h1{font-size:1.5rem}body{font-size:15px}}
@media print{h2{break-after:avoid}figure,.card,.clip{break-inside:avoid}.scroll{overflow:visible}}
"""


class Page:
    """What the page holds so far, and the figures in it by name."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.sections: list[tuple[str, str, list[str]]] = []

    def section(self, name: str, title: str) -> None:
        """Begin one."""
        self.sections.append((name, title, []))

    def add(self, *parts: str) -> None:
        """To the section that was begun last."""
        self.sections[-1][2].extend(parts)

    def keep(self, name: str, fact: Fact) -> Fact:
        """A figure of the page, under a name of its own."""
        entry, free, number = fact.entry(), name, 1
        while self.entries.get(free, entry) != entry:
            number += 1
            free = f"{name} ({number})"
        self.entries[free] = entry
        return fact

    def html(self, name: str, text: CitedText, small: bool = False) -> str:
        """A text, its figures marked and kept; an interval may be smaller."""
        many = len(text.facts) > 1
        shown = []
        for number, fact in enumerate(text.facts):
            self.keep(f"{name}/{number}" if many else name, fact)
            value = f' value="{escape(str(fact.value))}"' if isinstance(fact.value, (int, float)) else ""
            shown.append(f"<data{value}>{escape(fact.shown)}</data>")
        marked = escape(text.template).format(*shown)
        return (
            f"{marked[: marked.index('[')]}<small>{marked[marked.index('[') :]}</small>"
            if small and "[" in marked
            else marked
        )

    def table(self, table: Table) -> None:
        """With headers of rows and columns."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
        rows = []
        for label, cells in table.rows:
            kind = ' class="control"' if label.startswith("·") else ""
            row = [f'<th scope="row"{kind}>{escape(label)}</th>']
            for name, each in zip(table.header[1:], cells, strict=True):
                row.append(f"<td>{self.html(f'{table.name}/{label}/{name}', each, small=True)}</td>")
            rows.append(f"<tr>{''.join(row)}</tr>")
        self.add(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}"><table>'
            f"<caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
        for number, note in enumerate(table.notes):
            self.add(f'<p class="note">{self.html(f"{table.name}/note {number}", note)}</p>')

    def plot(self, svg: str, below: str) -> None:
        """With what it shows."""
        self.add(f'<figure><div class="scroll">{svg}</div><figcaption>{escape(below)}</figcaption></figure>')

    def whole(self, title: str, lead: str) -> str:
        """The document."""
        links = "".join(f'<a href="#{name}">{escape(text)}</a> ' for name, text, _ in self.sections)
        body = "".join(
            f'<section id="{name}"><h2>{escape(text)}</h2>{"".join(parts)}</section>'
            for name, text, parts in self.sections
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
            f'<h1>{escape(title)}</h1><p class="lead">{lead}</p><nav aria-label="Sections">{links}</nav>\n'
            f"{body}</main></body></html>\n"
        )


# The sections.


def adapted(evidence: Evidence) -> Side | None:
    """What stands for adaptation: the session where there is one, else the method of the paper or the nearest."""
    names = (*SESSIONS, "cdc_mmpg", "cdc_mmpg_frozen", "hyper_fan_in", "hyper")
    return next((Side(name) for name in names if evidence.find_runs(name)), None)


def static(evidence: Evidence) -> Side | None:
    """What does not adapt."""
    return next((Side(name) for name in (BASELINE, "linear") if evidence.find_runs(name)), None)


def _claims(page: Page, evidence: Evidence) -> None:
    """The few figures that a reader takes away, and every sentence."""
    page.section("findings", "What the figures say")
    session, baseline = Side(SESSION), Side(BASELINE)
    gain = compare_unless_guessing(evidence, session, baseline)
    if gain:
        seeds = evidence.compare_by_seed(session, baseline)
        more = {
            **gain.value.more, "low": gain.low.value, "high": gain.high.value,
            "seeds": {str(seed): fact.value for seed, fact in seeds.items()},
        }  # fmt: skip
        page.keep("session_gain_points", gain.value._replace(more=more))
        page.keep("session_gain_points/low", gain.low)
        page.keep("session_gain_points/high", gain.high)
        for seed, fact in seeds.items():
            page.keep(f"session_gain_points/seed{seed}", fact)
    found = find_equal_payloads(evidence)
    if found:
        least, best = found
        more = {
            "label": least.label, "accuracy": least.accuracy.value,
            "best": {"label": best.label, "bytes": best.bytes.value, "accuracy": best.accuracy.value},
        }  # fmt: skip
        page.keep("bytes_at_equal_accuracy", least.bytes._replace(more=more))
        page.keep("bytes_at_equal_accuracy/accuracy", least.accuracy)
        page.keep("bytes_at_equal_accuracy/best/bytes", best.bytes)
        page.keep("bytes_at_equal_accuracy/best/accuracy", best.accuracy)
    cards = [
        (name, cite("{}", each.value), cite("points, 95 % interval {} to {}", each.low, each.high))
        for name, each in (
            ("A session of 16 clips over fine-tuning", gain),
            ("One sample over fine-tuning", compare_unless_guessing(evidence, Side("cdc_mmpg"), baseline)),
        )
        if each
    ]
    if found:
        cards.append(("Enough for a session's head", cite("{} B", found[0].bytes),
                      cite("{} % right, the best head {} %", found[0].accuracy, found[1].accuracy)))  # fmt: skip
    best_so_far = evidence.cite_accuracy(static(evidence) or session)
    if best_so_far:
        name = NAMES[(static(evidence) or session).name]
        cards.append(
            (f"{name}, {_where(evidence)}", cite("{} %", best_so_far.facts[0]), CitedText("of the questions right"))
        )
    page.add('<div class="cards">')
    for name, large, small in cards:
        page.add(f'<div class="card"><span>{escape(name)}</span><b>{page.html(f"cards/{name}", large)}</b>'
                 f"<span>{page.html(f'cards/{name}/more', small)}</span></div>")  # fmt: skip
    page.add("</div>")
    _sentences(page, "findings", list_claims(evidence), "No two runs can be compared yet.")


def _sentences(page: Page, name: str, sentences: Sequence[CitedText], none: str) -> None:
    items = "".join(f"<li>{page.html(f'{name}/{number}', each)}</li>" for number, each in enumerate(sentences))
    page.add(f'<ul class="findings">{items}</ul>' if items else f"<p>{escape(none)}</p>")


def _controls(page: Page, evidence: Evidence) -> None:
    """Whether the adaptive methods use what they adapt to."""
    page.section("controls", "Controls: is the adaptation used?")
    page.add("<p>Own answers against those with a head that was made for somebody else, in points, paired.</p>")
    _sentences(page, "controls", list_control_findings(evidence), "No adaptive method was run.")


def _where(evidence: Evidence) -> str:
    return "all of the test" if evidence.group == ALL_GROUPS else f"{evidence.group} devices"


def _tables(page: Page, evidence: Evidence) -> None:
    """All that there are, those of the paper first."""
    resampled = "clips" if evidence.group == ALL_GROUPS else "devices and then their clips"
    page.section("tables", "Tables")
    page.add(
        f'<p class="note">In %. One seed: 95 % interval in brackets, {resampled} resampled. Several: mean ± standard '
        "deviation. “vs fine-tuning”: the difference in points and its 95 % interval, paired by question and "
        "averaged over the seeds that both have. Rows with a dot are controls of the method above.</p>"
    )
    for table in build_all_tables(evidence):
        page.table(table)


def _bytes(page: Page, evidence: Evidence) -> None:
    """Accuracy against what is downloaded."""
    page.section("bytes", "Accuracy and bytes")
    series = []
    for method in evidence.names:
        runs, accuracy = evidence.find_runs(method), evidence.cite_accuracy(Side(method))
        down = evidence.cite_value(runs[0], "bytes", "down") if runs else None
        own = method not in (*SESSIONS, "cdc_mmpg", "on_device")  # their payloads follow
        if down and accuracy and own and not evidence.is_retrieval:
            label = evidence.names[method]
            point = _point(page, f"plots/bytes/{label}", down, accuracy, label, "a question")
            series.append(Series(label, color_of(method), [point], square=method in PER_SAMPLE))
    for each in list_payloads(evidence):
        a_sample = each.side.name in PER_SAMPLE
        accuracy, per = evidence.cite_accuracy(each.side), "a question" if a_sample else "a session"
        point = _point(page, f"plots/bytes/{each.label}", each.bytes, accuracy, each.label, per)
        series.append(Series(each.label, color_of(each.side.name), [point], square=a_sample))
    if not series:
        page.add("<p>No run has both.</p>")
        return
    page.plot(
        scatter(f"Accuracy, {_where(evidence)}, against bytes down", series, "bytes down", "% right"),
        f"Accuracy, {_where(evidence)}, against the bytes of a download: squares, one for every question; dots, one "
        "for a session, or none. Bars: 95 % interval of one seed, or standard deviation.",
    )


def _point(page: Page, name: str, x: Fact, accuracy: CitedText, label: str, per: str) -> Point:
    """A mark, and its figures kept."""
    page.keep(f"{name}/bytes", x)
    low, high = _ends(accuracy)
    for number, fact in enumerate(accuracy.facts):
        page.keep(f"{name}/accuracy/{number}", fact)
    return Point(x.amount, accuracy.facts[0].amount, f"{label}: {accuracy.text} %, {x.shown} bytes {per}", low, high)


def _ends(accuracy: CitedText) -> tuple[float | None, float | None]:
    """Of an interval, or of mean and deviation."""
    value, *rest = (fact.amount for fact in accuracy.facts)
    if len(rest) == 2:
        return rest[0], rest[1]
    return (value - rest[0], value + rest[0]) if rest else (None, None)


def _anchors(page: Page, evidence: Evidence) -> None:
    """Accuracy against the size of a session; the lines are those of the README's picture."""
    cases = sorted({
        int(case[1:])
        for run in evidence.find_runs(SESSION)
        for case in run.results["accuracy"]
        if case[:1] == "n" and case[1:].isdecimal()
    })  # fmt: skip
    if len(cases) < 2:
        return
    page.section("session", "Accuracy and the size of a session")
    series = []
    for kind, label, color in LINES:
        points = []
        for place, case in enumerate(cases):
            if found := evidence.cite_accuracy(Side(SESSION, f"n{case}"), kind=kind):
                for number, fact in enumerate(found.facts):
                    page.keep(f"plots/session/{label}/{case}/{number}", fact)
                points.append(
                    Point(place, found.facts[0].amount, f"{label}, {case} anchors: {found.text} %", *_ends(found))
                )
        if points:
            series.append(Series(label, color, points))
    for name, condition, label, color in REFERENCES:
        if found := evidence.cite_accuracy(Side(name, condition)):
            for number, fact in enumerate(found.facts):
                page.keep(f"plots/session/{label}/{number}", fact)
            points = [Point(0, found.facts[0].amount, f"{label}: {found.text} %")]
            series.append(Series(label, color, points, dashed=True))
    page.plot(
        lines("Accuracy against the number of anchors", series, "n, anchors of the device's other clips", "% right",
              [(place, str(case)) for place, case in enumerate(cases)]),
        f"Accuracy, {_where(evidence)}, against the number of other, unlabelled clips whose mean is uploaded. Band: "
        "95 % interval of one seed, or standard deviation. Dashed: all questions.",
    )  # fmt: skip


def _frames(page: Page, evidence: Evidence) -> None:
    """Accuracy against frames, where other numbers of them were tried."""
    series = []
    for method in ("cdc_mmpg", BASELINE):
        points = []
        for number in FRAMES:
            seeds = find_frame_seeds(evidence, method)
            if found := evidence.cite_accuracy(Side(with_frames(method, number)), seeds=seeds):
                for place, fact in enumerate(found.facts):
                    page.keep(f"plots/frames/{NAMES[method]}/{number}/{place}", fact)
                title = f"{NAMES[method]}, {number} frames: {found.text} %"
                points.append(Point(number, found.facts[0].amount, title, *_ends(found)))
        if len(points) > 1:
            series.append(Series(NAMES[method], color_of(method), points))
    if series:
        page.section("frames", "Accuracy and frames")
        page.plot(
            lines("Accuracy against frames", series, "frames of a clip", "% right", [(n, str(n)) for n in FRAMES],
                  bands=False),
            f"Accuracy, {_where(evidence)}, against the frames that are taken of a clip; intervals are in the table.",
        )  # fmt: skip


def _devices(page: Page, evidence: Evidence) -> None:
    """Static against adapted, group by group and device by device."""
    first, second = adapted(evidence), static(evidence)
    if not first or not second or evidence.group == ALL_GROUPS:
        return
    found = evidence.compare_by_device(first, second)
    if not found:
        return
    others = {device: share for device, (_, share, _) in evidence.compare_by_device(second, first).items()}
    page.section("devices", "Device by device")
    rows: list[tuple[str, list[CitedText]]] = []
    for group in evidence.groups:
        gain = evidence.compare(first, second, group)
        both = [evidence.cite_accuracy(second, group), evidence.cite_accuracy(first, group)]
        rows.append((group, [*both, gain.format() if gain else NO_TEXT]))
    header = ["devices", f"{NAMES[second.name]} %", f"{NAMES[first.name]} %", "difference"]
    page.table(Table("groups", "Static against adapted", header, rows))
    own = {device: each for device, each in found.items() if each[0] == evidence.group}
    order = sorted(own, key=lambda device: (-own[device][2].amount, device))
    for device in order:
        page.keep(f"devices/{device}/{NAMES[second.name]}", others[device])
        page.keep(f"devices/{device}/{NAMES[first.name]}", own[device][1])
        page.keep(f"devices/{device}/difference", own[device][2])
    better = sum(own[device][2].amount > 0 for device in order)
    sources = tuple(source for device in order[:1] for source in own[device][2].sources)
    more = {"minus": own[order[0]][2].more["minus"], "group": evidence.group}
    count = page.keep("devices/better", Fact(better, str(better), "devices better", sources, more))
    page.plot(
        bars(
            f"Difference of {NAMES[first.name]} to {NAMES[second.name]} by device",
            [Point(0, own[device][2].amount, f"{device}: {own[device][2].shown} points") for device in order],
            f"{evidence.group} devices, sorted", "points", (GOOD, BAD),
        ),
        f"What {NAMES[first.name]} adds to {NAMES[second.name]} on each of {len(order)} {evidence.group} devices, in "
        f"points: more than nothing on {count.shown}. A device has few questions, so single bars are noisy.",
    )  # fmt: skip
    page.plot(
        pairs(
            f"Accuracy of {NAMES[second.name]} and {NAMES[first.name]} by device",
            [
                (Point(0, others[device].amount, f"{device}, {NAMES[second.name]}: {others[device].shown} %"),
                 Point(0, own[device][1].amount, f"{device}, {NAMES[first.name]}: {own[device][1].shown} %"))
                for device in order
            ],
            f"{evidence.group} devices, in the same order", "% right",
            (NAMES[second.name], NAMES[first.name]), (color_of(second.name), color_of(first.name)),
        ),
        "The same devices: what both answer rightly, in %.",
    )  # fmt: skip
    if len(order) <= 48:
        rows = [
            (device, [cite("{}", others[device]), cite("{}", own[device][1]), cite("{}", own[device][2])])
            for device in order
        ]
        page.add("<details><summary>The figures of every device</summary>")
        page.table(Table("devices", f"By device, {evidence.group}", ["device", *header[1:]], rows))
        page.add("</details>")


def _curves(page: Page, evidence: Evidence) -> None:
    """Validation accuracy by epoch, of the first seed of every run."""
    series = []
    for name, runs in evidence.runs.items():
        run = runs[0]
        monitor = run.find("monitor") or ""
        if not monitor.startswith("val/") or "loss" in monitor:
            continue
        values, sources = _curve(evidence.folder, run, monitor)
        if len(values) < 2:
            continue
        label = NAMES.get(name, name.replace("_", " "))
        shown = [100 * value for value in values.values()]
        page.keep(f"plots/curves/{name}", Fact(shown, "", "column", sources, {"times": 100, "epochs": list(values)}))
        points = [Point(epoch + 1, y, f"{label}, epoch {epoch + 1}: {y:.1f} %")
                  for epoch, y in zip(values, shown, strict=True)]  # fmt: skip
        series.append(Series(label, color_of(name), points))
    if series:
        page.section("training", "Training")
        page.plot(
            lines("Validation accuracy by epoch", series, "epoch", "validation, % right"),
            "Validation accuracy after every epoch, of the first seed of every run; the best epoch was tested, once.",
        )


def _curve(folder: Path, run: Run, column: str) -> tuple[dict[int, float], tuple[str, ...]]:
    """A column of a run's logs by epoch; of a run that was taken up again, what came last."""
    values: dict[int, float] = {}
    sources = []
    logs = sorted(run.path.glob("logs/**/metrics.csv"), key=lambda path: (len(str(path)), path))
    for log in logs:
        try:
            with log.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row.get(column) and row.get("epoch")]
            values |= {int(row["epoch"]): value for row in rows if isfinite(value := float(row[column]))}
        except (OSError, ValueError, csv.Error):
            continue
        sources.append(f"{log.relative_to(folder)}#{column}")
    return dict(sorted(values.items())), tuple(sources)


def _time(page: Page, evidence: Evidence) -> None:
    """Seconds by run, mean over its seeds."""
    rows, parts = [], []
    for name, runs in evidence.runs.items():
        timed = [run for run in runs if run.find("seconds", "train") is not None]
        if not timed:
            continue
        train = evidence.aggregate(timed, ("seconds", "train"), form="{:,.1f}")
        tested = [run for run in timed if run.find("seconds", "test") is not None]
        test = evidence.aggregate(tested, ("seconds", "test"), form="{:,.1f}") if tested else None
        count = Fact(len(timed), str(len(timed)), "count", tuple(run.locate("seed") for run in timed))
        rows.append((name, [cite("{}", train), cite("{}", test) if test else NO_TEXT, cite("{}", count)]))
        long, shown = (test.amount, test.shown) if test else (0, "0")
        bar = [Point(train.amount, 0, f"{name}, training: {train.shown} s"), Point(long, 0, f"{name}, test: {shown} s")]
        parts.append((name, bar))
    if not rows:
        return
    parts.sort(key=lambda row: -sum(part.x for part in row[1]))
    page.section("time", "Where the time goes")
    page.plot(stacked("Seconds by run", parts, ("training", "test"), (GOOD, "#9db9d6")),
              "Seconds of training and test, a bar a run, mean over its seeds.")  # fmt: skip
    page.table(Table("time", "Seconds", ["run", "training", "test", "seeds"], rows))


# Examples.


class Example(NamedTuple):
    """A question that one answers rightly and the other does not."""

    clip: str
    device: str
    question: str
    answer: str
    static: str
    adapted: str


def choose(first: Run, case: str, second: Run, other: str, group: str) -> tuple[list[Example], list[Example]]:
    """Questions of a group where adaptation helps, and where it hurts: the first of every device, in the file's order.

    Right and wrong are by label, as in the results: two candidates of a choice may have the same words.

    Args:
        first, case: what adapts.
        second, other: what does not.
        group: of devices, or everything.
    """

    def read(run: Run, case: str) -> Iterator[tuple[tuple[str, ...], tuple[str, bool]]]:
        assert run.answers is not None
        with (run.path / PREDICTIONS).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        place = header.index(case)
        for key, row, right in zip(run.answers.keys, rows, run.answers.correct[case].tolist(), strict=True):
            if group in (row[2], ALL_GROUPS) and not isnan(right):
                yield key, (row[place], bool(right))

    before = dict(read(second, other))
    found: tuple[list[Example], list[Example]] = ([], [])
    used: tuple[set[str], set[str]] = (set(), set())
    for key, (given, right) in read(first, case):
        clip, device, _, _, question, answer, _ = key
        way = 0 if right else 1
        was, was_right = before.get(key, ("", right))
        if right != was_right and device not in used[way] and len(found[way]) < EXAMPLES:
            used[way].add(device)
            found[way].append(Example(clip, device, question, answer, was, given))
    return found


def _examples(page: Page, evidence: Evidence, data: Path | None) -> None:
    """Clips whose question adaptation gets right, and as many that it gets wrong."""
    first, second = adapted(evidence), static(evidence)
    pairs = evidence.pair_runs(first, second) if first and second and not evidence.is_retrieval else []
    if not first or not second or not pairs:
        return
    a, b = pairs[0]
    case, other = a.find_case(first.case) or "", b.find_case(second.case) or ""
    helped, hurt = choose(a, case, b, other, evidence.group)
    numbers = evidence.count_right_alone(first, second)
    page.section("examples", "Examples")
    if numbers:
        said = cite(
            f"Of seed {a.seed}, {_where(evidence)}: {NAMES[first.name]} alone is right on {{}} questions, "
            f"{NAMES[second.name]} alone on {{}}. Below, of both kinds, the first question of each of the first "
            "devices in the file's order: no other choice was made.", *numbers[0],
        )  # fmt: skip
        page.add(f"<p>{page.html('examples/numbers', said)}</p>")
    files = _clips(data, {each.clip for each in (*helped, *hurt)}) if data else {}
    if not files:
        page.add('<p class="note">Without the clips: give their folder as --data.</p>')
    for title, examples, helps in (("Adaptation helps", helped, True), ("Adaptation hurts", hurt, False)):
        page.add(f'<h3>{title}</h3><div class="clips">' if examples else f"<h3>{title}: nowhere</h3>")
        for each in examples:
            picture = _strip(files[each.clip]) if each.clip in files else ""
            image = (
                f'<img src="data:image/jpeg;base64,{picture}" width="{STRIP * SIDE}" height="{SIDE}" '
                f'alt="Frames of the clip {escape(each.clip)}, from its begin to its end">'
                if picture else ""
            )  # fmt: skip
            answers = "".join(
                f'<p>{escape(name)}: <span class="{"right" if right else "wrong"}">{escape(given)} '
                f"{'✓' if right else '✗'}</span></p>"
                for name, given, right in (
                    (NAMES[second.name], each.static, not helps),
                    (NAMES[first.name], each.adapted, helps),
                )
            )
            camera = f" · {escape(each.device)}" if each.device != each.clip else ""
            page.add(
                f'<div class="clip">{image}<p><strong>{escape(each.question)}</strong></p><p>Answer: '
                f'{escape(each.answer)}</p>{answers}<p class="note">{escape(each.clip)}{camera}</p></div>'
            )
        page.add("</div>" if examples else "")


def _clips(root: Path, names: set[str]) -> dict[str, Path]:
    """The files of clips, wherever they lie below a dataset's folder."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in files:
            stem, suffix = os.path.splitext(file)
            name = stem if stem in names else file
            if suffix.lower() in CLIPS and name in names:
                found.setdefault(name, Path(folder) / file)
    return found


def _strip(path: Path) -> str:
    """Some frames of a clip side by side, as JPEG in base64; nothing of a clip that cannot be decoded."""
    from PIL import Image  # noqa: PLC0415  only for pictures

    def places(count: int) -> list[int]:
        return [int((k + 0.5) * count / STRIP) for k in range(STRIP)]

    try:
        shown = [np.asarray(frame) for frame in read_frames(path, places, SIDE, side=SIDE)]
    except DataError:
        return ""
    cut = [frame[:, (frame.shape[1] - SIDE) // 2 :][:SIDE, :SIDE] for frame in shown]
    file = BytesIO()
    Image.fromarray(np.concatenate(cut, axis=1)).save(file, "JPEG", quality=82)
    return b64encode(file.getvalue()).decode()


# How it was made.


def _made(page: Page, evidence: Evidence) -> None:
    """Commits, machines, seeds, versions and commands."""
    page.section("made", "How it was made")
    runs = [run for each in evidence.runs.values() for run in each]
    rows = []
    for run in runs:
        facts = [evidence.cite_value(run, key) for key in ("seed", "finished", "machine", "devices", "commit")]
        if commit := facts[-1]:
            facts[-1] = commit._replace(shown=shorten_commit(commit.shown))
        cells = [cite("{}", fact) if fact else NO_TEXT for fact in facts]
        rows.append((f"{run.name}/{run.path.name}", cells))
    page.table(Table("made", "Runs", ["run", "seed", "finished", "machine", "on", "commit"], rows))
    main = [run for name in evidence.names for run in evidence.find_runs(name)]  # pretraining has clips of its own
    counted = next((run for run in main if run.find("questions", "test") is not None), None)
    if counted:
        facts = [evidence.cite_value(counted, "questions", split) for split in ("train", "val", "test")]
        named = cite("Questions: {} for training, {} for validation, {} in the test.", *(f for f in facts if f))
        page.add(f"<p>{page.html('made/questions', named)}</p>" if all(facts) else "")
    versions: dict[str, list[Run]] = {}
    for run in runs:
        known = run.find("versions") or {}
        versions.setdefault(", ".join(f"{name} {number}" for name, number in known.items()), []).append(run)
    for text, those in versions.items():
        which = "" if len(versions) == 1 else f" ({len(those)} runs)"
        page.add(f"<p>Versions{which}: {escape(text)}.</p>" if text else "")
    commands = [format_command(evidence, name, [run.seed for run in each]) for name, each in evidence.runs.items()]
    page.add(f"<h3>Commands</h3><p>One makes one run, and what it builds on.</p>{_code(commands)}")
    page.add(
        "<p>Every figure on this page stands in report.json, with the places in the runs' files that it was read from "
        "and how it was made of them.</p>"
    )
    lacking = find_missing(evidence)
    if lacking:
        page.section("missing", "What is missing")
        for what, wanted in lacking:
            page.add(f"<h3>{escape(what[0].upper() + what[1:])}</h3>{_code(wanted)}")


def _code(rows: Sequence[str]) -> str:
    return f'<pre tabindex="0"><code>{escape(chr(10).join(rows))}</code></pre>'


def build(folder: Path, data: Path | None = None) -> tuple[str, dict[str, dict[str, Any]]]:
    """The page, and the figures on it by name.

    Raises:
        ConfigError: see `selection.load_comparable`.
    """
    evidence, page = load_comparable(folder), Page()
    sections: list[Callable[[Page, Evidence], None]] = [_claims, _anchors, _bytes, _frames, _devices]
    for section in sections:
        section(page, evidence)
    _examples(page, evidence, data)
    for section in (_tables, _controls, _curves, _time, _made):
        section(page, evidence)
    finished = sorted(str(run.find("finished") or "") for runs in evidence.runs.values() for run in runs)
    lead = (
        "A model that answers questions about videos runs on a device; the cloud adapts its last layer to what the "
        "device sees, without labels and without backpropagation. What that is worth, from finished runs alone"
        + (f", the last of {finished[-1][:10]}." if finished[-1] else ".")
    )
    return page.whole(f"CDC-MMPG on {evidence.dataset}", escape(lead)), page.entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and where its figures come from; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>")
    parser.add_argument("--data", type=Path, help="the dataset's folder, for the clips of the examples")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return exit_code(lambda: write(options.folder, options.data))


def write(folder: Path, root: Path | None) -> None:
    """Page and sources below a dataset's runs, with clips from the dataset's folder; the page to W&B, too."""
    html, entries = build(folder, root)
    with atomic_write(folder / "report.html") as file:
        file.write(escape_controls(html).encode())
    write_json(entries, folder / "report.json")
    if os.environ.get("WANDB_MODE") != "disabled":
        from cdc_mmpg.training.loggers import publish  # noqa: PLC0415  imports Lightning: 10 s

        numbers = {name: entry["value"] for name, entry in entries.items() if isinstance(entry["value"], float)}
        publish(folder, html, numbers)
    for name in ("report.html", "report.json"):
        print(f"written: {folder / name}")


if __name__ == "__main__":
    sys.exit(main())
