"""Sections of the page with charts: accuracy against bytes, anchors, frames, devices; training and time."""

import csv
from math import isfinite
from pathlib import Path

from cdc_mmpg.catalogue import (
    BASELINE,
    DEVICE_COUNTS,
    FRAME_COUNTS,
    METHOD_LABELS,
    SAMPLE_METHODS,
    SESSION_METHODS,
    VARIANTS,
    choose_color,
    name_frames_variant,
)
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, Table, cite
from cdc_mmpg.evidence.findings import list_payloads
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import ALL_GROUPS, Run
from cdc_mmpg.evidence.selection import describe_group, find_adaptive_side, find_static_side
from cdc_mmpg.report.anchor_chart import ANCHORS_LABEL, collect_anchor_curves, find_anchor_counts
from cdc_mmpg.report.cells import cite_or_empty
from cdc_mmpg.report.document import Page
from cdc_mmpg.report.paper_tables import find_frame_seeds
from cdc_mmpg.report.plots import (
    Point,
    Series,
    chart_bars,
    chart_lines,
    chart_pairs,
    chart_scatter,
    chart_stacked,
    make_point,
)

BETTER, WORSE = "#0b5cad", "#cf3f2e"  # colors of bars above and below zero


def add_bytes(page: Page, evidence: Evidence) -> None:
    """Add the chart of accuracy against download size."""
    page.begin("bytes", "Accuracy and bytes")
    series = []
    for row in evidence.rows:
        method, label = row.method, row.label
        if method in (*SESSION_METHODS, "cdc_mmpg") or evidence.is_retrieval:  # drawn below, one mark per payload
            continue
        if label.startswith("·") or (row.condition and method != "on_device"):
            continue
        runs = evidence.find_runs(method, row.condition)
        accuracy = evidence.cite_accuracy(Side(method, row.condition))
        down = evidence.cite_value(runs[0], "bytes", "down") if runs else None
        if down and accuracy:
            point = _mark_point(page, f"plots/bytes/{label}", down, accuracy, label, "per question")
            series.append(Series(label, choose_color(method), [point], square=method in SAMPLE_METHODS))
    for payload in list_payloads(evidence):
        method, label = payload.side.name, payload.label
        per_sample = method in SAMPLE_METHODS
        accuracy, unit = evidence.cite_accuracy(payload.side), "per question" if per_sample else "per session"
        point = _mark_point(page, f"plots/bytes/{label}", payload.bytes, accuracy, label, unit)
        series.append(Series(label, choose_color(method), [point], square=per_sample))
    if not series:
        page.add_paragraph("No run has both an accuracy and a download size.")
        return
    page.add_chart(
        chart_scatter(f"Accuracy, {describe_group(evidence)}, against bytes down", series, "bytes down", "accuracy, %"),
        f"Accuracy ({describe_group(evidence)}) against download size. Squares: one download per question; dots: one "
        "per session, or none. Bars: 95 % interval (one seed) or ± standard deviation (several seeds).",
    )


def _mark_point(page: Page, name: str, x: Fact, accuracy: CitedText, label: str, unit: str) -> Point:
    """Return a mark and record its figures in the page."""
    page.keep(f"{name}/bytes", x)
    page.keep_all(f"{name}/accuracy", accuracy)
    return make_point(x.amount, accuracy, f"{label}: {accuracy.text} %, {x.shown} bytes {unit}")


def add_anchors(page: Page, evidence: Evidence) -> None:
    """Add the chart of accuracy against session size, with the lines of anchors.png."""
    counts = find_anchor_counts(evidence)
    if len(counts) < 2:
        return
    page.begin("session", "Accuracy and session size")
    curves = collect_anchor_curves(evidence)
    for curve in curves:
        for count, accuracy in curve.accuracies:
            page.keep_all(f"plots/session/{curve.label}" + ("" if count is None else f"/{count}"), accuracy)
    series = [curve.to_series(counts) for curve in curves]
    ticks = [(float(place), str(count)) for place, count in enumerate(counts)]
    page.add_chart(
        chart_lines("Accuracy against the number of anchors", series, ANCHORS_LABEL, "accuracy, %", ticks),
        f"Accuracy ({describe_group(evidence)}) against the number of unlabelled clips whose mean anchor is uploaded. "
        "Band: 95 % interval (one seed) or ± standard deviation (several). Dashed: other methods, all questions.",
    )


def add_frames(page: Page, evidence: Evidence) -> None:
    """Add the chart of accuracy against frames per clip, if several numbers of frames were trained."""
    series = []
    for method in ("cdc_mmpg", BASELINE):
        points = []
        for number in FRAME_COUNTS:
            seeds = find_frame_seeds(evidence, method)
            if accuracy := evidence.cite_accuracy(Side(name_frames_variant(method, number)), seeds=seeds):
                page.keep_all(f"plots/frames/{METHOD_LABELS[method]}/{number}", accuracy)
                title = f"{METHOD_LABELS[method]}, {number} frames: {accuracy.text} %"
                points.append(make_point(number, accuracy, title))
        if len(points) > 1:
            series.append(Series(METHOD_LABELS[method], choose_color(method), points))
    if series:
        page.begin("frames", "Accuracy and frames")
        page.add_chart(
            chart_lines("Accuracy against frames", series, "frames per clip", "accuracy, %",
                        [(n, str(n)) for n in FRAME_COUNTS], bands=False),
            f"Accuracy ({describe_group(evidence)}) against the number of frames per clip; "
            "the intervals are in the table of frames.",
        )  # fmt: skip


def add_history(page: Page, evidence: Evidence) -> None:
    """Add the chart of accuracy against the number of training devices, if several were trained."""
    series, most = [], 0
    for method in VARIANTS[f"devices{DEVICE_COUNTS[0]}"].methods:
        full_runs = evidence.find_runs(method)
        trained = {row[1] for run in full_runs[:1] for row in _read_groups(run) if row[0] == "seen"}
        numbers = {f"{method}.devices{number}": number for number in DEVICE_COUNTS} | {method: len(trained)}
        points = []
        for name, number in numbers.items():
            if number and (accuracy := evidence.cite_accuracy(Side(name))):
                page.keep_all(f"plots/history/{METHOD_LABELS[method]}/{number}", accuracy)
                title = f"{METHOD_LABELS[method]}, {number} devices: {accuracy.text} %"
                points.append(make_point(number, accuracy, title))
        if len(points) > 1:
            series.append(Series(METHOD_LABELS[method], choose_color(method), points))
            most = max(most, len(trained))
    if series:
        page.begin("history", "Accuracy and number of training devices")
        page.add_chart(
            chart_lines("Accuracy against number of training devices", series, "training devices", "accuracy, %",
                        [(n, str(n)) for n in (*DEVICE_COUNTS, most)]),
            f"Accuracy ({describe_group(evidence)}) against the number of devices in training. "
            "Band: 95 % interval (one seed) or ± standard deviation (several seeds).",
        )  # fmt: skip


def _read_groups(run: Run) -> list[tuple[str, str]]:
    """Return the group and device of every question in a run's test; empty without answers."""
    return list(zip(run.answers.groups, run.answers.devices, strict=True)) if run.answers else []


def add_devices(page: Page, evidence: Evidence) -> None:
    """Add the comparison of the static and the adaptive method by group and by device."""
    first, second = find_adaptive_side(evidence), find_static_side(evidence)
    if not first or not second or evidence.group == ALL_GROUPS:
        return
    compared = evidence.compare_by_device(first, second)
    if not compared:
        return
    others = {device: share for device, (_, share, _) in evidence.compare_by_device(second, first).items()}
    page.begin("devices", "Device by device")
    rows: list[tuple[str, list[CitedText]]] = []
    for group in evidence.groups:
        gain = evidence.compare(first, second, group)
        both = [evidence.cite_accuracy(second, group), evidence.cite_accuracy(first, group)]
        rows.append((group, [*both, gain.format() if gain else NO_TEXT]))
    adapted, static = METHOD_LABELS[first.name], METHOD_LABELS[second.name]
    header = ["devices", f"{static} %", f"{adapted} %", "difference"]
    page.add_table(Table("groups", "Static and adapted", header, rows))
    in_group = {device: row for device, row in compared.items() if row[0] == evidence.group}
    order = sorted(in_group, key=lambda device: (-in_group[device][2].amount, device))
    for device in order:
        page.keep(f"devices/{device}/{static}", others[device])
        page.keep(f"devices/{device}/{adapted}", in_group[device][1])
        page.keep(f"devices/{device}/difference", in_group[device][2])
    better = sum(in_group[device][2].amount > 0 for device in order)
    sources = tuple(source for device in order[:1] for source in in_group[device][2].sources)
    more = {"minus": in_group[order[0]][2].more["minus"], "group": evidence.group}
    count = page.keep("devices/better", Fact(better, str(better), "devices better", sources, more))
    page.add_chart(
        chart_bars(
            f"{adapted} minus {static} by device",
            [Point(0, in_group[device][2].amount, f"{device}: {in_group[device][2].shown} points") for device in order],
            f"{evidence.group} devices, sorted", "points", (BETTER, WORSE),
        ),
        f"Accuracy of {adapted} minus accuracy of {static} on each of {len(order)} {evidence.group} devices, in "
        f"percentage points; positive on {count.shown}. A device has few questions, so single bars are noisy.",
    )  # fmt: skip
    page.add_chart(
        chart_pairs(
            f"Accuracy of {static} and {adapted} by device",
            [
                (Point(0, others[device].amount, f"{device}, {static}: {others[device].shown} %"),
                 Point(0, in_group[device][1].amount, f"{device}, {adapted}: {in_group[device][1].shown} %"))
                for device in order
            ],
            f"{evidence.group} devices, in the same order", "accuracy, %",
            (static, adapted), (choose_color(second.name), choose_color(first.name)),
        ),
        "The same devices in the same order: accuracy of both methods, in %.",
    )  # fmt: skip
    if len(order) <= 48:
        rows = [
            (device, [cite("{}", others[device]), cite("{}", in_group[device][1]), cite("{}", in_group[device][2])])
            for device in order
        ]
        by_device = Table("devices", f"By device, {evidence.group}", ["device", *header[1:]], rows)
        page.add_table(by_device, summary="Figures of every device")


def add_curves(page: Page, evidence: Evidence) -> None:
    """Add the chart of validation accuracy by epoch, for the first seed of every run."""
    series = []
    for name, runs in evidence.runs.items():
        run = runs[0]
        monitor = run.find("monitor") or ""
        if not monitor.startswith("val/") or "loss" in monitor:
            continue
        values, sources = _read_curve(evidence.folder, run, monitor)
        if len(values) < 2:
            continue
        label = METHOD_LABELS.get(name, name.replace("_", " "))
        shown = [100 * value for value in values.values()]
        page.keep(f"plots/curves/{name}", Fact(shown, "", "column", sources, {"times": 100, "epochs": list(values)}))
        points = [Point(epoch + 1, y, f"{label}, epoch {epoch + 1}: {y:.1f} %")
                  for epoch, y in zip(values, shown, strict=True)]  # fmt: skip
        series.append(Series(label, choose_color(name), points))
    if series:
        page.begin("training", "Training")
        page.add_chart(
            chart_lines("Validation accuracy by epoch", series, "epoch", "validation accuracy, %"),
            "Validation accuracy after every epoch, for the first seed of a run; only the best epoch was tested, once.",
        )


def _read_curve(folder: Path, run: Run, column: str) -> tuple[dict[int, float], tuple[str, ...]]:
    """Read a column of a run's logs by epoch, with its sources; later logs of a resumed run take precedence."""
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


def add_time(page: Page, evidence: Evidence) -> None:
    """Add the seconds of training and test by run, averaged over its seeds."""
    rows, parts = [], []
    for name, runs in evidence.runs.items():
        timed = [run for run in runs if run.find("seconds", "train") is not None]
        if not timed:
            continue
        train = evidence.aggregate(timed, ("seconds", "train"), form="{:,.1f}")
        tested = [run for run in timed if run.find("seconds", "test") is not None]
        test = evidence.aggregate(tested, ("seconds", "test"), form="{:,.1f}") if tested else None
        count = Fact(len(timed), str(len(timed)), "count", tuple(run.locate("seed") for run in timed))
        rows.append((name, [cite("{}", train), cite_or_empty(test), cite("{}", count)]))
        long, shown = (test.amount, test.shown) if test else (0, "0")
        bar = [Point(train.amount, 0, f"{name}, training: {train.shown} s"), Point(long, 0, f"{name}, test: {shown} s")]
        parts.append((name, bar))
    if not rows:
        return
    parts.sort(key=lambda row: -sum(part.x for part in row[1]))
    page.begin("time", "Where the time goes")
    page.add_chart(chart_stacked("Seconds by run", parts, ("training", "test"), (BETTER, "#9db9d6")),
              "Seconds of training and test, one bar per run, averaged over its seeds.")  # fmt: skip
    page.add_table(Table("time", "Seconds", ["run", "training", "test", "seeds"], rows))
