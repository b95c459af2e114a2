"""The tables: the methods of a dataset side by side, and the paper's tables beside ours, from the runs' results.

`cdc-mmpg table checkpoints/<dataset>` prints the methods and writes `table.md`. With `--paper` it prints the tables of
the paper, too, with what is missing and the command that makes it, and writes `tables.md`; given `checkpoints`, of all
its datasets.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from cdc_mmpg.catalogue import (
    BASELINE,
    BY_NAME,
    FRAMES,
    NAMES,
    PAPERS,
    PRETRAINING,
    RECIPE_FRAMES,
    SESSION,
    SESSIONS,
    STUDY,
    STUDY_SEEDS,
    Row,
    runs_of_all,
    with_frames,
)
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import RECALLS
from cdc_mmpg.evidence.comparisons import (
    ALL_TYPES,
    ANSWER_BYTES,
    EMPTY,
    EVERYTHING,
    FEATURE_BYTES,
    HEADER_BYTES,
    NOTHING_BYTES,
    PREDICTIONS,
    Cell,
    Evidence,
    Fact,
    Gain,
    Run,
    Side,
    Table,
    cell,
    constant,
    delay,
    join,
    literal,
    on_wire,
    total,
)
from cdc_mmpg.evidence.findings import payloads, told
from cdc_mmpg.evidence.paper import Erratum
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import escape_controls, exit_code, log_to_terminal
from cdc_mmpg.results import find_results
from cdc_mmpg.wire.messages import FRAMING_BYTES

FLOORS = {
    "majority": "Majority answer",
    "majority_per_type": "Majority answer per type",
    "chance": "Chance",
}
STATIC = "n0"  # the condition in which nothing is sent
MEDIANS = {"VR": "VR median", "TR": "TR median"}  # ranks
COSTS = ["D-Param", "C-Param", "up, B", "down, B", "epoch", "train s", "seeds"]
GAIN = "vs fine-tuning"

RATES = (5, 15, 50, 100)  # MiB/s, the paper's MB/s

REASONER_NOTES = {
    "small": "The reasoner is small (554,880 parameters), not of the paper's size.",
    "paper_qa": "The reasoner's sizes (27,802,816 parameters) fit the paper's totals; it prints no sizes.",
    "paper_mc": "The reasoner's sizes (20,213,984 parameters) fit the paper's totals; it prints no sizes.",
}
REASONER_NOTES["default"] = REASONER_NOTES["small"]  # its name in runs of earlier versions
NOT_RUN = Cell("not run")
NOTHING = constant(NOTHING_BYTES, "NOTHING_BYTES")


SIGNS = "†‡§¶"  # of footnotes, in this order


class Quotes:
    """Figures of the paper in a table, and a footnote to each of its errors that stands there.

    Args:
        evidence: of the dataset.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.found: list[Erratum] = []

    def cell(self, *keys: str) -> Cell:
        """Return a printed figure with the signs of its footnotes; empty where the paper has none."""
        fact = self.evidence.printed(*keys)
        if fact is None:
            return EMPTY
        errata = self.evidence.errata(*keys)
        self.found += [each for each in errata if each not in self.found]
        signs = "".join(SIGNS[self.found.index(each)] for each in errata)
        return cell(f"{{}} {signs}".rstrip(), fact)

    def notes(self) -> list[Cell]:
        """Return the footnotes."""
        return [
            cell(
                f"{sign} {each.text}.",
                *(constant(value, name, Erratum.__module__) for name, value in each.figures.items()),
            )
            for sign, each in zip(SIGNS, self.found, strict=False)
        ]


def answering(folder: Path, may_be_empty: bool = False) -> Evidence:
    """The evidence of a dataset whose runs can stand side by side.

    Raises:
        ConfigError: they are on different splits, or no method has a finished run (unless `may_be_empty`).
    """
    evidence = Evidence(folder)
    runs = _main_runs(evidence)
    kinds = {
        (run.find("protocol"), _domains(run), str(run.find("splits"))): run.name for run in runs if run.find("protocol")
    }
    if len(kinds) > 1:
        raise ConfigError(
            f"{folder} holds runs on different splits, which no table can set side by side: "
            + "; ".join(f"{method} on protocol {protocol}{domains}" for (protocol, domains, _), method in kinds.items())
            + ": give the runs of each protocol an OUT= of their own"
        )
    if not runs and not may_be_empty:
        raise ConfigError(f"{folder}: no finished run of {', '.join(NAMES)}; train one first (make train)")
    return evidence


# The methods side by side.


def methods(evidence: Evidence) -> Table:
    """A row for every method and condition with finished runs, of which there must be one."""
    quotes = Quotes(evidence)
    types = _types(evidence)
    header = ["method", *_accuracy_header(evidence, types), "val %", *COSTS]
    runs = _main_runs(evidence)
    rows: list[tuple[str, list[Cell]]] = [
        (label, [*_floor(evidence, runs[0], name, types), *[EMPTY] * (1 + len(COSTS))])
        for name, label in FLOORS.items()
        if runs[0].find("floors", name)
    ]
    there = [row for row in evidence.rows if evidence.of(row.method, row.condition)]
    gains = _gains(evidence, [Side(row.method, row.condition) for row in there])
    for row, gain in zip(there, gains, strict=True):
        found = evidence.of(row.method, row.condition)
        accuracies = _accuracies(evidence, row, found, gain, types, quotes)
        rows.append((row.label, [*accuracies, *_costs(evidence, row, found)]))
    return Table("methods", "Methods side by side", header, rows, quotes.notes())


def _main_runs(evidence: Evidence) -> list[Run]:
    """Of the methods that have rows, method by method."""
    return [run for method in evidence.names for run in evidence.of(method)]


def _types(evidence: Evidence) -> list[str]:
    """Of questions, in retrieval the recalls: those of any run's first condition."""
    groups = [run.find("accuracy", run.case(None) or "", evidence.group) or {} for run in _main_runs(evidence)]
    return list(dict.fromkeys(kind for group in groups for kind in group if kind != ALL_TYPES))


def _accuracy_header(evidence: Evidence, types: list[str]) -> list[str]:
    if evidence.ranks:
        return [*types, GAIN, "paper VR", "paper TR", *MEDIANS.values()]
    printed = ["paper %"] if evidence.groups == [EVERYTHING] else []
    return [*(f"{group} %" for group in evidence.groups), *printed, GAIN, *types]


def _gains(evidence: Evidence, sides: list[Side]) -> list[Gain | None]:
    """Over fine-tuning; of itself, none."""
    found = evidence.gains([(side, Side(BASELINE)) for side in sides])
    return [None if side.name == BASELINE else gain for side, gain in zip(sides, found, strict=True)]


def _floor(evidence: Evidence, run: Run, name: str, types: list[str]) -> list[Cell]:
    """What answers without looking; the same in every run."""

    def value(group: str, kind: str, interval: bool) -> Cell:
        if not run.find("floors", name, group, kind):
            return EMPTY
        ends = ("value", "low", "high") if interval else ("value",)
        facts = [evidence.over([run], ("floors", name, group, kind, end), times=100) for end in ends]
        return cell("{} [{}, {}]" if interval else "{}", *facts)

    by_type = [value(evidence.group, kind, False) for kind in types]
    if evidence.ranks:
        return [*by_type, EMPTY, *[EMPTY] * (2 + len(MEDIANS))]
    printed = [EMPTY] if evidence.groups == [EVERYTHING] else []
    return [*(value(group, ALL_TYPES, True) for group in evidence.groups), *printed, EMPTY, *by_type]


def _accuracies(
    evidence: Evidence, row: Row, runs: list[Run], gain: Gain | None, types: list[str], quotes: Quotes
) -> list[Cell]:
    """By group, the paper's where there are no devices, the difference to fine-tuning, then by type."""
    side = Side(row.method, row.condition)
    whole = row.condition is None and _on_published(runs)
    difference = gain.cell() if gain else EMPTY
    if evidence.ranks:
        recalls = [_spread(evidence, side, kind) for kind in types]
        published = [EMPTY, EMPTY]
        if whole and runs[0].find("protocol") == "full":
            published = [
                join("{} / {} / {}", *recalled) if all(recalled) else EMPTY
                for way in MEDIANS
                for recalled in ([quotes.cell(row.method, f"{way}@{k}") for k in RECALLS],)
            ]
        case = runs[0].case(row.condition) or ""
        known = [run for run in runs if run.find("median_rank", case)]
        medians = [
            cell("{}", evidence.over(known, ("median_rank", case, way), form="{:g}")) if known else EMPTY
            for way in MEDIANS
        ]
        return [*recalls, difference, *published, *medians]
    printed = quotes.cell(row.method, "accuracy") if whole else EMPTY
    return [
        *(evidence.accuracy(side, group) for group in evidence.groups),
        *([printed] if evidence.groups == [EVERYTHING] else []),
        difference,
        *(evidence.accuracy(side, kind=kind, interval=False) for kind in types),
    ]


def _spread(evidence: Evidence, side: Side, kind: str) -> Cell:
    """Without an interval: six of them would make the table twice as wide."""
    several = len(evidence.of(*side)) > 1
    return evidence.accuracy(side, kind=kind, interval=several)


def _costs(evidence: Evidence, row: Row, runs: list[Run]) -> list[Cell]:
    """A row's validation accuracy and what it took; a condition gives what is not the method's own."""
    own, control = row.condition is None, row.label.startswith("·")
    size = [EMPTY, EMPTY] if control else [_known(evidence, runs[0], "parameters", key) for key in ("device", "cloud")]
    traffic = [EMPTY, EMPTY] if control else [_known(evidence, runs[0], "bytes", key) for key in ("up", "down")]
    if row.condition == STATIC:
        traffic = [cell("{}", NOTHING)] * 2
    validated = [run for run in runs if run.find("metrics", run.find("monitor") or "") is not None]
    validation = EMPTY
    if own and validated:
        keys = ("metrics", validated[0].results["monitor"])
        hows = ("mean", "stdev") if len(validated) > 1 else ("mean",)
        validation = cell(
            " ± ".join("{}" for _ in hows), *(evidence.over(validated, keys, how, times=100) for how in hows)
        )
    timed = [run for run in runs if run.find("seconds", "train") is not None] if own else []
    return [
        validation,
        *size,
        *traffic,
        _epochs(evidence, runs),
        cell("{}", evidence.over(timed, ("seconds", "train"))) if timed else EMPTY,
        _seeds(runs),
    ]


def _epochs(evidence: Evidence, runs: list[Run]) -> Cell:
    """The best epoch, from one on, of so many."""
    runs = [run for run in runs if run.find("best_epoch") is not None and run.find("epochs") is not None]
    if not runs:
        return EMPTY
    parts = []
    for key, plus in (("best_epoch", 1), ("epochs", 0)):
        least, most = (evidence.over(runs, (key,), how, "{:.0f}", plus=plus) for how in ("least", "most"))
        parts.append(cell("{}", least) if least.value == most.value else cell("{}–{}", least, most))
    return join("{}/{}", *parts)


def _seeds(runs: list[Run]) -> Cell:
    return cell("{}", Fact(len(runs), str(len(runs)), "count", tuple(run.source("seed") for run in runs)))


def _known(evidence: Evidence, run: Run, *keys: str) -> Cell:
    found = evidence.text(run, *keys)
    return cell("{}", found) if found else EMPTY


def _left_out(run: Run, split: str) -> int:
    """Questions whose clips were not there: of a partial copy, beside which no published figure may stand."""
    return run.find("data", split, "left_out") or 0


def _partial(runs: list[Run]) -> bool:
    return any(_left_out(run, EVERYTHING) for run in runs)


def _domains(run: Run) -> str:
    """What stood for devices, and which of them left training."""
    found = run.find("domains")
    return f", {found['kind']} without {', '.join(found['held_out'])}" if found else ""


def _unlike_published(runs: list[Run], what: str | None = None) -> list[Cell]:
    """Return where the annotation files of these runs hold other numbers (of `what`) than the published ones."""
    found: dict[str, Cell] = {}
    for run in runs:
        for place, row in enumerate(run.find("published") or []):
            if not row.get("same", True) and what in (None, row.get("what")):
                facts = [
                    Fact(row[key], f"{row[key]:,}", "value", (run.source("published", str(place), key),))
                    for key in ("here", "published")
                ]
                text = cell(f"{literal(row['split'])}: {{}} of {{}} {literal(row['what'])}", *facts)
                found.setdefault(text.text, text)
    return list(found.values())


def _cut_note(runs: list[Run]) -> Cell:
    """Return a sentence on annotation files that are not the published ones; empty where they are."""
    unlike = _unlike_published(runs)
    template = f"Not the published files, so no published figure stands beside ({'; '.join('{}' for _ in unlike)})."
    return join(template, *unlike) if unlike else EMPTY


def _on_published(runs: list[Run]) -> bool:
    """Whether these runs saw the published splits, whole and as they are."""
    return not _partial(runs) and not any(map(_domains, runs)) and not _unlike_published(runs)


def _comparable(evidence: Evidence, runs: list[Run]) -> bool:
    """Whether these runs answered what the paper's did: all of the test split, on the paper's protocol."""
    full = not evidence.ranks or all(run.find("protocol") == "full" for run in runs)
    return full and evidence.groups == [EVERYTHING] and _on_published(runs)


# The paper's tables.


def paper_form(evidence: Evidence) -> Table:
    """Tables 1, 2, 3 and 5: accuracy, parameters, bytes and delay of every method, the paper's beside ours."""
    number = evidence.printed("table")
    columns: list[tuple[str, list[str]]] = []  # ours, with the paper's key where it prints one
    runs = _main_runs(evidence)
    whole = _comparable(evidence, runs)
    shown = bool(number) and whole
    if evidence.ranks:
        asked = _types(evidence) or [f"{way}@{k}" for way in MEDIANS for k in RECALLS]
        columns = [(kind, [kind]) for kind in asked]
    else:
        columns = [(f"{evidence.group} %", ["accuracy"])]
    columns += [(GAIN, []), ("D-Param", ["D-Param"]), ("C-Param", ["C-Param"]), ("bytes up", []), ("bytes down", []),
                ("delay up, ms", []), ("delay down, ms", ["delay"]), ("seeds", [])]  # fmt: skip
    keys = [key for _, own in columns for key in own]
    printed = {key: shown and any(evidence.printed(method, key) for method in PAPERS) for key in keys}
    header = ["method"]
    for name, own in columns:
        header += [name, *(["paper"] if own and printed[own[0]] else [])]
    listed = [name for name in evidence.names if name != "on_device" and evidence.of(name)]
    quotes = Quotes(evidence)
    gains = dict(zip(listed, _gains(evidence, [Side(name) for name in listed]), strict=True))
    rows: list[tuple[str, list[Cell]]] = []

    def add(label: str, ours: dict[str, Cell], method: str | None) -> None:
        cells = []
        for name, own in columns:
            cells.append(ours.get(name, EMPTY))
            if own and printed[own[0]]:
                cells.append(quotes.cell(method, own[0]) if method else EMPTY)
        rows.append((label, cells))

    for method in [*PAPERS, *(name for name in listed if name not in PAPERS)]:
        found = evidence.of(method)
        if not found and not shown:
            continue
        ours = _ours(evidence, method, found, gains.get(method)) if found else {columns[0][0]: NOT_RUN}
        add(evidence.names[method], ours, method if method in PAPERS else None)
    for label, ours in _computed(evidence):
        add(label, ours, None)
    title = f"Table {number.shown} of the paper" if number else "In the form of the paper's tables 1 and 2"
    notes = [
        Cell("Delays are those of the payload alone at 100 MiB/s, the paper's 100 MB/s."),
        Cell("Computed: no run, the bytes follow from what is sent. The generator on the device is CDC-MMPG's."),
    ]
    sizes = dict.fromkeys(run.find("reasoner") for run in runs)
    notes += [Cell(REASONER_NOTES[size]) for size in sizes if size in REASONER_NOTES]
    if shown:
        notes += [Cell("The paper's columns are as printed, its errors included."), *quotes.notes()]
    if number and not whole:
        notes.append(Cell("These runs are on another selection than the paper's, so its figures are left out."))
    notes += [note for note in [_cut_note(runs)] if note]
    return Table("paper", f"{title}: {evidence.dataset}", header, rows, notes)


def _ours(evidence: Evidence, method: str, runs: list[Run], gain: Gain | None) -> dict[str, Cell]:
    """A method's cells by column."""
    side = Side(method)
    result = {
        **{kind: _spread(evidence, side, kind) for kind in (_types(evidence) if evidence.ranks else [])},
        f"{evidence.group} %": evidence.accuracy(side),
        GAIN: gain.cell() if gain else EMPTY,
        "D-Param": _known(evidence, runs[0], "parameters", "device"),
        "C-Param": _known(evidence, runs[0], "parameters", "cloud"),
        "seeds": _seeds(runs),
    }
    for way in ("up", "down"):
        if sent := evidence.text(runs[0], "bytes", way):
            result |= _traffic(way, sent)
    return result


def _traffic(way: str, sent: Fact) -> dict[str, Cell]:
    return {f"bytes {way}": cell("{}", sent), f"delay {way}, ms": cell("{}", delay(sent, RATES[-1]))}


def _computed(evidence: Evidence) -> list[tuple[str, dict[str, Cell]]]:
    """What needs no run: the cloud answers itself, or the device generates itself."""
    rows: list[tuple[str, dict[str, Cell]]] = []
    if not evidence.ranks:
        up, down = constant(FEATURE_BYTES, "FEATURE_BYTES"), constant(ANSWER_BYTES, "ANSWER_BYTES")
        rows.append(("Split inference: the cloud answers (computed)", _traffic("up", up) | _traffic("down", down)))
    for method, label in (("cdc_mmpg", "Generator on the device (computed)"),):
        for run in evidence.of(method)[:1]:
            sizes = [evidence.text(run, "parameters", place) for place in ("device", "cloud")]
            known = [size for size in sizes if size]
            rows.append((label, {
                "D-Param": cell("{}", total(*known)) if len(known) == 2 else EMPTY,
                "C-Param": cell("{}", NOTHING),
                **_traffic("up", NOTHING), **_traffic("down", NOTHING),
            }))  # fmt: skip
    return rows


def frames(evidence: Evidence) -> Table | None:
    """Table 4: accuracy and seconds per epoch by frames. The paper's are fine-tuning's."""
    if evidence.ranks or evidence.find_task() == "multiple_choice":
        return None
    others = [number for number in FRAMES if number != RECIPE_FRAMES]
    shown = [name for name in ("cdc_mmpg",) if any(evidence.of(with_frames(name, n)) for n in others)]
    runs = [*_main_runs(evidence), *(run for n in others for run in evidence.of(with_frames(BASELINE, n)))]
    beside = evidence.printed("frames", "2", "accuracy") and _comparable(evidence, runs)
    if shown or beside or any(evidence.of(with_frames(BASELINE, n)) for n in FRAMES):
        shown.append(BASELINE)
    quotes = Quotes(evidence)
    header = ["frames"]
    for method in shown:
        header += [f"{NAMES[method]} %", "s / epoch"]
    header += ["paper %", "paper s / epoch"] if beside else []
    rows = []
    for number in FRAMES:
        cells = []
        for method in shown:
            name, seeds = with_frames(method, number), seeds_of_frames(evidence, method)
            runs = [run for run in evidence.of(name) if run.seed in seeds and run.find("epochs")]
            runs = [run for run in runs if run.find("seconds", "train") is not None]
            cells.append(evidence.accuracy(Side(name), seeds=seeds) or NOT_RUN)
            epoch = evidence.over(runs, ("seconds", "train"), over=("epochs",)) if runs else None
            cells.append(cell("{}", epoch) if epoch else EMPTY)
        if beside:
            cells += [quotes.cell("frames", str(number), key) for key in ("accuracy", "seconds")]
        rows.append((str(number), cells))
    notes = [Cell("The rows of a method are of the same seeds.")]
    notes += [Cell("The paper's figures are fine-tuning's on one A100, 256 questions a batch.")] if beside else []
    notes += quotes.notes()
    title = "Table 4 of the paper" if beside else "In the form of the paper's table 4"
    return Table("frames", f"{title}: frames, {evidence.dataset}", header, rows, notes) if shown or beside else None


def seeds_of_frames(evidence: Evidence, method: str) -> Collection[int]:
    """Return the seeds that every number of frames has of those that were run: rows of other seeds do not compare."""
    tried = [{run.seed for run in evidence.of(with_frames(method, number))} for number in FRAMES]
    return set.intersection(*(seeds for seeds in tried if seeds)) if any(tried) else set()


def delays(evidence: Evidence) -> Table | None:
    """Table 6: bytes, and the time that they take at four rates."""
    sent: list[tuple[str, Fact, str]] = []
    for run in [*evidence.of("cdc_mmpg"), *evidence.of(SESSION)][:1]:
        if up := evidence.text(run, "bytes", "up"):
            sent.append(("Upload: the feature of one frame", up, "up"))
    for each in payloads(evidence):
        whole = each.side.name == "cdc_mmpg" and each.side.case in (None, "float32")
        per = "session" if each.side.name in SESSIONS else "sample"
        sent.append((f"Download a {per}: {each.label}", each.bytes, "down" if whole else ""))
    if not sent:
        return None
    sent.append(("Split inference: the answer of the cloud (computed)", constant(ANSWER_BYTES, "ANSWER_BYTES"), ""))
    beside = bool(evidence.printed("delays", "up", "KB")) and not _unlike_published(_main_runs(evidence), "answers")
    header = ["what", "payload B", "on the wire B", *(f"{rate} MB/s, ms" for rate in RATES)]
    header += ["paper KB", "paper 100 MB/s, ms"] if beside else []
    rows = []
    for label, payload, way in sent:
        cells = [cell("{}", payload), cell("{}", on_wire(payload, upload=way == "up"))]
        cells += [cell("{}", delay(payload, rate)) for rate in RATES]
        if beside:
            printed = (evidence.printed("delays", way, key) if way else None for key in ("KB", "100"))
            cells += [cell("{}", fact) if fact else EMPTY for fact in printed]
        rows.append((label, cells))
    notes = [
        Cell("MB/s as in the paper, whose figures are those of MiB/s; delays are the payload's bytes over the rate."),
        cell(
            "On the wire: an upload has a header of {} bytes, what comes down a header and a signature, {}; what HTTP, "
            "TCP and IP add, and round trips, are measured by make delay.",
            constant(HEADER_BYTES, "HEADER_BYTES"), constant(FRAMING_BYTES, "FRAMING_BYTES"),
        ),
    ]  # fmt: skip
    title = "Table 6 of the paper" if beside else "In the form of the paper's table 6"
    return Table("delays", f"{title}: bytes and time, {evidence.dataset}", header, rows, notes)


# What the paper does not show.


def sent(evidence: Evidence) -> Table | None:
    """Heads by the way in which they are sent."""
    found = payloads(evidence)
    if not found:
        return None
    gains = _gains(evidence, [each.side for each in found])
    rows = []
    for each, gain in zip(found, gains, strict=True):
        per = Cell("a session" if each.side.name in SESSIONS else "a sample")
        cells = [per, cell("{}", each.bytes), cell("{}", on_wire(each.bytes)), evidence.accuracy(each.side)]
        rows.append((each.label, [*cells, gain.cell() if gain else EMPTY]))
    header = ["head", "sent once", "payload B", "on the wire B", f"{evidence.group} %", GAIN]
    return Table("payloads", "What is sent, and what it answers", header, rows)


def reasoner(evidence: Evidence) -> Table | None:
    """The readings of equation 16, each with the reasoner and without it."""
    there = {label: name for name, label in STUDY.items() if evidence.of(name)}
    if not there:
        return None
    gains = evidence.gains([(Side(name), Side(name, "bypassed")) for name in there.values()])
    rows = []
    for (label, name), gain in zip(there.items(), gains, strict=True):
        both = [evidence.accuracy(Side(name)), evidence.accuracy(Side(name, "bypassed"))]
        rows.append((label, [*both, gain.cell() if gain else EMPTY, _seeds(evidence.of(name))]))
    header = ["statistics over, target", f"{evidence.group} %", "bypassed %", "difference", "seeds"]
    return Table("reasoner", "Does the reasoner do anything?", header, rows)


def privacy(evidence: Evidence) -> Table | None:
    """What can be read out of what is uploaded."""
    rows = []
    runs = evidence.runs.get("privacy", [])
    for run in runs:
        for place, probe in enumerate(run.find("probes") or []):
            unit = "accuracy" if "accuracy" in probe else "degrees"
            form, times = ("{:.1f}", 100) if unit == "accuracy" else ("{:.1f}", 1)

            def figure(
                key: str, run: Run = run, place: int = place, form: str = form, times: int = times,
                probe: dict[str, Any] = probe,
            ) -> Fact | None:  # fmt: skip
                if probe.get(key) is None:
                    return None
                value = times * probe[key]
                more = {"times": times} if times != 1 else {}
                return Fact(value, form.format(value), "value", (run.source("probes", str(place), key),), more)

            value, low, high, *floors = (figure(key) for key in (unit, "low", "high", "chance", "majority"))
            interval = cell("{} [{}, {}]", value, low, high) if value and low and high else EMPTY
            number = probe.get("number")
            asked = (
                Fact(number, f"{number:,}", "value", (run.source("probes", str(place), "number"),)) if number else None
            )
            label = f"{probe.get('what', '')}, from {probe.get('from', '')}"
            rows.append((label + (f" (seed {run.seed})" if len(runs) > 1 else ""), [
                interval or (cell("{}", value) if value else EMPTY),
                Cell("% right" if unit == "accuracy" else "degrees off"),
                *(cell("{}", floor) if floor else EMPTY for floor in floors),
                cell("{}", asked) if asked else EMPTY,
            ]))  # fmt: skip
    if not rows:
        return None
    header = ["what is guessed", "by a probe", "unit", "chance", "always the same guess", "on"]
    return Table("privacy", "What the upload gives away", header, rows)


def everything(evidence: Evidence) -> list[Table]:
    """All tables for which there is anything."""
    side_by_side = [methods] if _main_runs(evidence) else []
    made = (paper_form, frames, delays, *side_by_side, sent, reasoner, privacy)
    return [table for make in made if (table := make(evidence))]


# What is missing.


def missing(evidence: Evidence) -> list[tuple[str, list[str]]]:
    """For every table the commands that make what it lacks.

    A study's seeds are those that any of its own runs has: three of the main rows say nothing about the others.
    """
    devices = evidence.groups != [EVERYTHING]
    trained = [BY_NAME[name] for name in runs_of_all(embedded=devices) if BY_NAME[name].label]
    main = [method.name for method in trained if method.several_seeds or not devices]
    once = [method.name for method in trained if method.name not in main]  # `make tables` takes one seed
    sessions = [method.name for method in trained if method.datasets == "devices" and method.program == "fit"]
    other_frames = [with_frames(BASELINE, number) for number in FRAMES if number != RECIPE_FRAMES]
    seeds = evidence.seeds(main) or [0]
    of_once = evidence.seeds(once) or seeds[:1]
    by_table: list[tuple[str, Sequence[str], Sequence[int]]] = [
        ("the paper's methods", PAPERS, seeds),
        ("controls", [name for name in main if name not in PAPERS + tuple(sessions)], seeds),
        ("sessions", sessions, seeds),
        ("opponents on the device", ["on_device"] if devices else [], of_once),
        ("frames (table 4)", other_frames if frames(evidence) else [], evidence.seeds(other_frames) or seeds[:1]),
        ("the study of the reasoner", list(STUDY) if devices else [], STUDY_SEEDS),
        ("privacy", ["privacy"] if devices else [], evidence.seeds(["privacy"]) or seeds[:1]),
    ]
    found = []
    for what, names, wanted in by_table:
        commands = []
        for name in names:
            there = evidence.seeds([name])
            if lacking := [seed for seed in (of_once if name in once else wanted) if seed not in there]:
                commands.append(command(evidence, name, lacking))
        if commands:
            found.append((what, commands))
    without = [
        f"delete {run.path} and train anew: it has no {PREDICTIONS}"
        for run in _main_runs(evidence) if run.answers is None
    ]  # fmt: skip
    return found + ([("answers by question, for the differences", without)] if without else [])


def command(evidence: Evidence, name: str, seeds: Sequence[int]) -> str:
    """What makes a run, a method or a variant of one, with one seed or several."""
    words = ["make", "train", f"DATASET={evidence.dataset}", f"METHOD={name}"]
    if len(seeds) == 1:
        words.append(f"SEED={seeds[0]}")
    else:
        words.append(f"SEEDS={len(seeds)}" if list(seeds) == list(range(len(seeds))) else "SEED=$seed")
    if name in STUDY:
        words.append("ENCODER_SEED=0")  # one encoder for all
    out = evidence.folder.parent
    if out.absolute() != Path("checkpoints").absolute():
        words.append(f"OUT={shlex.quote(str(out))}")
    encoders = (run.find("encoder") for run in evidence.of("linear"))
    given = [encoder for encoder in encoders if encoder and PRETRAINING not in Path(encoder).parts]
    words += [f"CHECKPOINT={shlex.quote(encoder)}" for encoder in given[:1]]
    made = " ".join(words)
    return f"for seed in {' '.join(map(str, seeds))}; do {made}; done" if "SEED=$seed" in words else made


# In the terminal and as Markdown.


def columns(folder: Path) -> list[str]:
    """The header of the table of methods."""
    return methods(answering(folder)).header


def rows(folder: Path) -> list[list[str]]:
    """The rows of the table of methods, as texts.

    Raises:
        ConfigError: see `answering`.
    """
    return texts(methods(answering(folder)))


def texts(table: Table) -> list[list[str]]:
    """A table's rows without where they come from."""
    return [[label, *(each.text for each in cells)] for label, cells in table.rows]


def caption(folder: Path) -> str:
    """What the figures were obtained on, how to read them, and by which commits.

    Raises:
        ConfigError: see `answering`.
    """
    return _caption(answering(folder))


def _caption(evidence: Evidence) -> str:
    runs = [run for run in _main_runs(evidence) if run.name != "on_device"] or _main_runs(evidence)
    groups, types = evidence.groups, _types(evidence)
    asked = "captions" if evidence.ranks else "questions"

    def each(values: list[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    table = methods(evidence)
    cells = [text for row in texts(table) for text in row]
    gained = table.header.index(GAIN)
    known = [run.find("data", EVERYTHING, "ceiling") for run in runs]
    ceilings = each([f"{100 * ceiling:.1f} %" for ceiling in known if ceiling is not None])
    outside = f"; no method can exceed {ceilings} (answers outside the vocabulary)"
    beyond = "" if ceilings in ("100.0 %", "") else outside
    resampled = "clips" if groups == [EVERYTHING] else "devices and then their clips"
    splits = dict.fromkeys(f"{split}: {source}" for run in runs for split, source in (run.find("splits") or {}).items())
    machines = [machine for run in runs if (machine := run.find("machine"))]
    commits = [shorten(commit) for run in runs if (commit := run.find("commit"))]
    steps = [
        f"{step}, where the recipe has {recipe}"
        for run in runs
        if (recipe := run.find("recipe_questions_per_step")) and (step := run.find("questions_per_step")) != recipe
    ]
    monitors = [monitor.replace("val/", "validation ") for run in runs if (monitor := run.find("monitor"))]
    sentences = [
        f"{evidence.dataset}: {each([_asked(run, EVERYTHING) for run in runs])} test {asked}, "
        f"{each([_asked(run, 'train') for run in runs])} for training{beyond}.",
        "A partial copy: clips are missing, so nothing here compares with published ones." if _partial(runs) else "",
        _cut_note(runs).text,
        f"In brackets: 95 % interval, {resampled} resampled." if any("[" in text for text in cells) else "",
        "±: standard deviation over seeds." if any("±" in text for text in cells) else "",
        "Against fine-tuning: the difference in points, paired by question."
        if any(row[gained] for row in texts(table))
        else "",
        f"By question type ({', '.join(types)}): % on unseen devices." if types and groups != [EVERYTHING] else "",
        "VR@K, in %: a clip asks for its captions, of which the best placed counts; TR@K: a caption "
        "asks for its clip. Ties count against us."
        if evidence.ranks
        else "",
        f"Splits: {'; '.join(splits)}." if splits else "",
        f"Encoder from: {each([_inside(evidence.folder, r) or r.find('encoder') or 'random weights' for r in runs])}.",
        _pretraining(evidence, runs),
        f"Best epoch by {each(monitors)}, tested once." if monitors else "",
        f"Questions of a step: {each(steps)}." if steps else "",
        f"Machine: {each(machines)}." if machines else "",
        f"Commit {each(commits)}." if commits else "",
    ]
    return " ".join(filter(None, sentences))


def _asked(run: Run, split: str) -> str:
    """Questions of a split, of how many where some were left out."""
    number, left_out = run.find("questions", split), _left_out(run, split)
    if number is None:
        return "?"
    return f"{number:,} of {number + left_out:,}" if left_out else str(number)


def shorten(commit: str) -> str:
    """Return the first letters of a commit, and whether the files were others."""
    digits, _, dirty = commit.partition("-")
    return f"{digits[:8]}-{dirty}" if dirty else digits[:8]


def _inside(folder: Path, run: Run) -> Path | None:
    """Where in `folder` a run's encoder came from."""
    if not run.find("encoder"):
        return None
    path = Path(run.results["encoder"]).resolve()
    return path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else None


def _pretraining(evidence: Evidence, runs: list[Run]) -> str:
    """On what the encoder was pretrained, where that is a run of the dataset, too."""
    inside = filter(None, (_inside(evidence.folder, run) for run in runs))
    places = {place.parent.name for place in inside if place.parts[0] == PRETRAINING}
    found = [run for run in evidence.runs.get(PRETRAINING, []) if run.path.name in places and run.find("labels")]
    if not found:
        return ""
    labels = [found[0].find("labels", what) for what in ("captions", "questions", "clips")]
    seconds = [round(run.find("seconds", "train") or 0) for run in found]
    if None in labels:
        return ""
    return (
        "Encoder pretrained in this run on {:,} captions and {:,} questions of {:,} other clips ".format(*labels)
        + f"({'–'.join(dict.fromkeys(map(str, (min(seconds), max(seconds)))))} s)."
    )


def _grid(table: Table) -> str:
    """As Markdown."""
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    header, *rows = ([" ".join(text.replace("|", "&#124;").split("\n")) for text in row]
                     for row in (table.header, *texts(table)))  # fmt: skip
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown(folder: Path) -> str:
    """The table of methods with its caption and footnotes, and what it says."""
    evidence = answering(folder)
    table = methods(evidence)
    notes = " ".join(note.text for note in table.notes)
    parts = [_grid(table), _caption(evidence), notes, _bullets([each.text for each in told(evidence)])]
    return "\n\n".join(filter(None, parts)) + "\n"


def all_markdown(evidence: Evidence) -> str:
    """All tables, what they say, and what is missing."""
    parts = [f"# {evidence.dataset}"]
    for table in everything(evidence):
        parts += [f"## {table.title}", _grid(table), " ".join(note.text for note in table.notes)]
        parts += [_caption(evidence)] if table.name == "methods" else []
    if sentences := [each.text for each in told(evidence)]:
        parts += ["## What the figures say", _bullets(sentences)]
    if lacking := missing(evidence):
        parts.append("## What is missing")
        for what, commands in lacking:
            parts += [f"{what[0].upper()}{what[1:]}:", "```sh\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _print(table: Table, below: str, title: str | None = None) -> None:
    grid = Grid(
        collapse_padding=True, pad_edge=False, box=SIMPLE_HEAD, caption=_plain(below), caption_justify="left",
        title=title and _plain(title), title_justify="left",
    )  # fmt: skip
    for number, name in enumerate(table.header):
        grid.add_column(_plain(name), justify="right" if number else "left", no_wrap=True)
    for row in texts(table):
        grid.add_row(*map(_plain, row))
    console = Console(width=1000)  # as wide as its figures, below 200 columns; a narrower terminal wraps it
    with console.capture() as captured:
        console.print(grid)
    print(captured.get(), end="")  # rich has an exit code of its own for a reader that leaves


def _plain(text: str) -> Text:
    """Return a text in which neither brackets are markup nor foreign control characters are left."""
    return Text(escape_controls(text))


def _say(*lines: str) -> None:
    for line in lines:
        print(escape_controls(line))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(escape_controls(text).encode())


def _methods_alone(folder: Path) -> None:
    evidence = answering(folder)
    table = methods(evidence)
    try:  # what cannot be written is shown all the same, and what nobody reads to its end is written
        _write(folder / "table.md", markdown(folder))
    finally:
        _print(table, " ".join([_caption(evidence), *(note.text for note in table.notes)]))
        _say(*(f"- {each.text}" for each in told(evidence)))
    _say(f"written: {folder / 'table.md'}")


def _all(folder: Path) -> None:
    """Of a dataset, or of all that lie in a folder; of a known dataset without runs, what is missing."""
    datasets = sorted({path.parents[2] for path in find_results(folder, "*/*/seed*")})
    if find_results(folder, "*/seed*") or not datasets:
        datasets = [folder]
    for dataset in datasets:
        known = Path("experiments", "datasets", f"{dataset.absolute().name}.yaml").is_file()
        evidence = answering(dataset, may_be_empty=known)
        try:  # see `_methods_alone`
            _write(dataset / "tables.md", all_markdown(evidence))
        finally:
            for table in everything(evidence):
                notes = [note.text for note in table.notes]
                above = [_caption(evidence)] if table.name == "methods" else []
                _print(table, " ".join(above + notes), table.title)
                print()
            _say(*(f"- {each.text}" for each in told(evidence)))
            for what, commands in missing(evidence):
                _say(f"\nmissing, {what}:", *(f"  {line}" for line in commands))
        _say(f"written: {dataset / 'tables.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write them beside the runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>; with --paper also checkpoints")
    parser.add_argument("--paper", action="store_true", help="all tables, and what they lack")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return exit_code(partial(_all if options.paper else _methods_alone, options.folder))


if __name__ == "__main__":
    sys.exit(main())
