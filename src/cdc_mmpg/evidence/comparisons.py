"""Evidence: a dataset's finished runs, and figures that say from where they were read and how.

A figure is a `Fact`. Its sources are places in the runs' files, relative to `checkpoints/<dataset>`:
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

import csv
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from math import floor, log10
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.catalogue import BASELINE, NAMES, ROWS, Row
from cdc_mmpg.evaluation.metrics import RECALLS, RIGHT, accuracies
from cdc_mmpg.evidence.paper import ERRATA, PRINTED, Erratum
from cdc_mmpg.program import escape_controls
from cdc_mmpg.results import RESULTS, find_results, read_results
from cdc_mmpg.wire.messages import FRAMING_BYTES, HEADER

logger = logging.getLogger(__name__)

Results = dict[str, Any]

PREDICTIONS = "predictions.test.csv"
ORIGIN = ["clip", "device", "group", "type", "question", "answer"]  # of a question, the first columns of PREDICTIONS
GUESSES = ("majority", "chance")  # floors: a row that is no better has learnt nothing
EVERYTHING, ALL_TYPES = "test", "all"  # group and type that hold every question

# What `wire` adds to an upload, where a layer has FRAMING_BYTES; what HTTP, TCP and IP add is measured by `make delay`.
HEADER_BYTES = HEADER.size
ANSWER_BYTES = 2  # the id of an answer, what the cloud sends back where it answers itself
FEATURE_BYTES = 768  # 192 float32: what is uploaded

NOTHING_BYTES = 0

MIB = 2**20


class Fact(NamedTuple):
    """A figure, how it is printed, and where it comes from."""

    value: float | str | list[float]
    shown: str
    how: str
    sources: tuple[str, ...]
    more: Mapping[str, Any] = {}

    @property
    def amount(self) -> float:
        """Its value, of one that is a number."""
        return float(self.value)  # type: ignore[arg-type]

    def entry(self) -> dict[str, Any]:
        """As it stands in report.json."""
        return {
            "value": self.value, "shown": self.shown, "how": self.how, "sources": list(self.sources), **self.more,
        }  # fmt: skip


class Cell(NamedTuple):
    """A text in which facts stand: of a table, or a sentence."""

    template: str  # with a {} for each fact
    facts: tuple[Fact, ...] = ()

    @property
    def text(self) -> str:
        """With the facts as they are printed."""
        return self.template.format(*(fact.shown for fact in self.facts))

    def __bool__(self) -> bool:
        return bool(self.template)


EMPTY = Cell("")


def cell(template: str, *facts: Fact) -> Cell:
    """`template` with each `{}` replaced by a fact."""
    return Cell(template, facts)


def literal(text: str) -> str:
    """Return a foreign text as part of a template: its braces hold no figures."""
    return text.replace("{", "{{").replace("}", "}}")


def join(template: str, *parts: Cell) -> Cell:
    """`template` with each `{}` replaced by a text, whose facts it keeps."""
    return Cell(
        template.format(*(part.template for part in parts)), tuple(fact for part in parts for fact in part.facts)
    )


class Table(NamedTuple):
    """A table as data, for every renderer: the first column is the rows' label."""

    name: str  # in report.json
    title: str
    header: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: Sequence[Cell] = ()


class Side(NamedTuple):
    """What is compared: a run's folder and a case of its test; None is the first, with which it was trained."""

    name: str
    case: str | None = None


class Gain(NamedTuple):
    """A paired difference of accuracies in points, with its 95 % interval."""

    value: Fact
    low: Fact
    high: Fact
    seeds: tuple[int, ...]

    def cell(self, template: str = "{} [{}, {}]") -> Cell:
        """Difference, low and high."""
        return cell(template, self.value, self.low, self.high)

    def amounts(self) -> Cell:
        """The same in points, without signs where it is plainly more than nothing."""
        ends = (self.value, self.low, self.high)
        if self.sign > 0:
            ends = tuple(end._replace(shown=end.shown.removeprefix("+")) for end in ends)  # type: ignore[assignment]
        return cell("{} points [{}, {}]", *ends)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        low, high = self.low.amount, self.high.amount
        return (low > 0) - (high < 0)


class Answers(NamedTuple):
    """What a run answered in its test, a row a question; in retrieval a row a clip or caption that asks."""

    keys: list[tuple[str, ...]]  # all that tells a question from another
    clips: list[str]
    devices: list[str]
    groups: list[str]
    correct: dict[str, NDArray[np.float64]]  # by case; NaN where a case was not asked

    def only(self, numbers: list[int]) -> "Answers":
        """Some of the rows, without what was right."""
        clips, devices, groups = ([each[i] for i in numbers] for each in (self.clips, self.devices, self.groups))
        return Answers([self.keys[i] for i in numbers], clips, devices, groups, {})


class Run:
    """A finished run.

    Args:
        path: its folder, `checkpoints/<dataset>/<name>/seed<N>`.
        results: of it.
    """

    def __init__(self, path: Path, results: Results) -> None:
        self.path, self.results = path, results
        self.name = path.parent.name
        self.seed = int(path.name.removeprefix("seed"))

    def source(self, *keys: str) -> str:
        """Where a value of its results stands."""
        pointer = "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)
        return f"{self.name}/{self.path.name}/{RESULTS}#/{pointer}"

    def find(self, *keys: str) -> Any:
        """A value of its results, None where there is none."""
        found: Any = self.results
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def case(self, name: str | None) -> str | None:
        """A case that it was tested in, the first for None; None where it was not."""
        cases = self.results.get("accuracy") or {}
        return next(iter(cases), None) if name is None else name if name in cases else None

    @cached_property
    def answers(self) -> Answers | None:
        """What it answered; None, with a warning, where the file is damaged, and where there is none."""
        path = self.path / PREDICTIONS
        try:
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            if not rows or any(len(row) != len(header) for row in rows):
                raise ValueError("rows of different lengths, or none")
            return _ranked(header, rows) if header[0] == "direction" else self._answered(header, rows)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, IndexError, csv.Error) as error:
            logger.warning("%s: left out (%s): delete the folder and train anew", path, error)
            return None

    def _answered(self, header: list[str], rows: list[list[str]]) -> Answers:
        """Return answers to questions, right or wrong by label, as in the results.

        Raises:
            ValueError: the table has other columns, or, written before it had labels, other shares of right words
                than the results have of right labels.
        """
        start, words = len(ORIGIN), range(len(ORIGIN), len(header))
        if header[:start] != ORIGIN:
            raise ValueError(f"its columns are {', '.join(header[:start])}")
        if header[-1] == RIGHT:
            worth = {"r": 1.0, "w": 0.0, ".": np.nan}
            if any(len(row[-1]) != len(words) - 1 or not set(row[-1]) <= worth.keys() for row in rows):
                raise ValueError(f"its column {RIGHT} does not fit")
            marks = np.array([[worth[letter] for letter in row[-1]] for row in rows]).reshape(len(rows), -1)
            correct = {case: marks[:, place] for place, case in enumerate(header[start:-1])}
        else:
            correct = {
                header[i]: np.array([np.nan if row[i] == "" else float(row[i] == row[start - 1]) for row in rows])
                for i in words
            }
            for case, values in correct.items():
                share = self.find("accuracy", case, EVERYTHING, ALL_TYPES, "value")
                if share is not None and abs(np.nanmean(values) - share) > 0.5 / len(rows):
                    raise ValueError(f"equal words are no equal labels in {case}: it is of an earlier version")
        clips, devices, groups = ([row[place] for row in rows] for place in range(3))
        return Answers(_unique(row[:start] for row in rows), clips, devices, groups, correct)


def _ranked(header: list[str], rows: list[list[str]]) -> Answers:
    """Of clips and captions by their ranks.

    A row is worth the mean of its recalls at 1, 5 and 10, and both directions weigh the same, so that the mean over
    all rows is the mean of the six recalls.
    """
    ways = Counter(row[0] for row in rows)
    weights = np.array([len(rows) / (len(ways) * ways[row[0]]) for row in rows])
    correct = {}
    for i, case in enumerate(header[3:], 3):
        ranks = np.array([int(row[i]) for row in rows])
        correct[case] = weights * np.mean([ranks <= k for k in RECALLS], axis=0)
    clips = [row[1] for row in rows]
    return Answers(_unique(row[:3] for row in rows), clips, clips, [""] * len(rows), correct)


def _unique(keys: Any) -> list[tuple[str, ...]]:
    """The keys, those that stand twice told apart by their number."""
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for key in map(tuple, keys):
        found.append((*key, str(seen[key])))
        seen[key] += 1
    return found


class Evidence:
    """All finished runs of a dataset.

    Damaged results, and those of an earlier version, are left out with a warning.

    Args:
        folder: `checkpoints/<dataset>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset = folder.absolute().name
        self.runs: dict[str, list[Run]] = {}
        for path in find_results(folder, "*/seed*"):
            seed, name = path.parent.name.removeprefix("seed"), path.parents[1].name
            if not seed.isdecimal() or not (results := read_results(path.parent)):
                continue
            if name in NAMES and not results.get("accuracy"):
                logger.warning(
                    '%s has no "accuracy" by condition: the run is of an earlier version and left out; delete %s and '
                    "train anew", path, path.parent,
                )  # fmt: skip
                continue
            self.runs.setdefault(name, []).append(Run(path.parent, results))
        for runs in self.runs.values():
            runs.sort(key=lambda run: run.seed)
        self._gains: dict[tuple[Side, Side, str], Gain | None] = {}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The lines of the table of methods: `ROWS`, then methods that are not among them, by their folders' names."""
        others = [name for name in self.runs if name.partition(".")[0] not in NAMES and self.of(name)]
        return (*ROWS, *(Row(escape_controls(name), name) for name in others))

    @cached_property
    def names(self) -> dict[str, str]:
        """Every method's label, in the order of the tables."""
        return {row.method: row.label for row in self.rows if row.condition is None}

    def of(self, name: str, case: str | None = None) -> list[Run]:
        """The seeds of a run that were tested in a case; of one that answers nothing, none."""
        return [run for run in self.runs.get(name, []) if run.case(case)]

    @cached_property
    def groups(self) -> list[str]:
        """Of devices; those that nothing was trained on first. One that holds everything where devices are unknown."""
        known = {
            group
            for runs in self.runs.values()
            for run in runs
            if (case := run.case(None))
            for group in run.results["accuracy"][case]
        }
        return [group for group in ("unseen", "seen") if group in known] or [EVERYTHING]

    @property
    def group(self) -> str:
        """That which the figures are about."""
        return self.groups[0]

    def seeds(self, names: Collection[str]) -> list[int]:
        """Return the seeds that any of these runs was trained with."""
        return sorted({run.seed for name in names for run in self.runs.get(name, [])})

    @cached_property
    def ranks(self) -> bool:
        """Whether the task is retrieval, which has recalls in place of one accuracy."""
        cells = [run.find("accuracy", run.case(None) or "", self.group) for name in self.runs for run in self.of(name)]
        if not cells:
            return self.printed(BASELINE, f"VR@{RECALLS[0]}") is not None
        return not any(ALL_TYPES in (each or {}) for each in cells)

    def find_task(self) -> str | None:
        """open_ended, multiple_choice or retrieval."""
        tasks = (run.find("task") for runs in self.runs.values() for run in runs)
        return next(filter(None, tasks), None)

    # Figures of one run's folder, over its seeds.

    def beats_guessing(self, side: Side) -> bool:
        """Return whether a row answers more rightly than the majority answer, or chance; True where neither is known.

        In retrieval the mean of the recalls counts.
        """
        own, guessed = [], []
        for run in self.of(*side):
            cells = run.find("accuracy", run.case(side.case) or "", self.group) or {}
            floors = [floor for name in GUESSES if (floor := run.find("floors", name, self.group))]
            kinds = [ALL_TYPES] if ALL_TYPES in cells else list(cells)
            for floor in floors[:1]:
                known = [kind for kind in kinds if kind in floor]
                own += [cells[kind]["value"] for kind in known]
                guessed += [floor[kind]["value"] for kind in known]
        return not own or mean(own) > mean(guessed) + 1e-9

    def accuracy(
        self, side: Side, group: str | None = None, kind: str = ALL_TYPES, interval: bool = True,
        seeds: Collection[int] | None = None,
    ) -> Cell:  # fmt: skip
        """In %: of one seed with its interval, of several (all unless told) mean and standard deviation."""
        group = group or self.group
        found = [
            (run, ("accuracy", run.case(side.case) or "", group, kind, "value"))
            for run in self.of(*side)
            if run.find("accuracy", run.case(side.case) or "", group, kind) and (seeds is None or run.seed in seeds)
        ]
        if len(found) == 1 and interval:
            run, keys = found[0]
            return cell(
                "{} [{}, {}]",
                *(self.over([run], (*keys[:-1], end), times=100) for end in ("value", "low", "high")),
            )
        spread = ("mean", "stdev") if interval and len(found) > 1 else ("mean",)
        if not found:
            return EMPTY
        return cell(
            " ± ".join("{}" for _ in spread), *(self._over(found, how, lambda v: f"{v:.1f}", 100) for how in spread)
        )

    def mean_accuracy(self, side: Side, group: str | None = None) -> Fact | None:
        """In %, over seeds; None where there is none."""
        found = self.accuracy(side, group, interval=False)
        return found.facts[0] if found else None

    def over(
        self, runs: Sequence[Run], keys: Sequence[str], how: str = "mean", form: str = "{:.1f}", times: float = 1,
        **more: Any,
    ) -> Fact:  # fmt: skip
        """A value of every run's results, made into one; see the module."""
        return self._over([(run, tuple(keys)) for run in runs], how, form.format, times, **more)

    def _over(
        self, found: Sequence[tuple[Run, tuple[str, ...]]], how: str, form: Any, times: float = 1, **more: Any
    ) -> Fact:
        values = [run.find(*keys) for run, keys in found]
        if over := more.get("over"):
            values = [value / run.find(*over) for value, (run, _) in zip(values, found, strict=True)]
            more["over"] = [run.source(*over) for run, _ in found]
        values = [times * (value + more.get("plus", 0)) for value in values]
        made: dict[str, Callable[[list[float]], float]] = {"mean": mean, "stdev": stdev, "least": min, "most": max}
        value = made[how](values)
        how = "value" if how == "mean" and len(values) == 1 else how
        if times != 1:
            more["times"] = times
        return Fact(value, form(value), how, tuple(run.source(*keys) for run, keys in found), more)

    def text(self, run: Run, *keys: str) -> Fact | None:
        """A value of a run's results as it stands there."""
        value = run.find(*keys)
        if value is None:
            return None
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        return Fact(value, shown, "value", (run.source(*keys),))

    def printed(self, *keys: str) -> Fact | None:
        """What the paper prints for this dataset."""
        found: Any = PRINTED.get(self.dataset, {})
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        source = f"cdc_mmpg.evidence.paper#/{'/'.join((self.dataset, *keys))}"
        return None if found is None else Fact(found, str(found), "value", (source,))

    def errata(self, *keys: str) -> list[Erratum]:
        """Return the errors of the paper that a printed figure has."""
        place = "/".join((self.dataset, *keys))
        return [each for each in ERRATA if any(fnmatchcase(place, pattern) for pattern in each.places)]

    # What needs every answer.

    def gains(self, pairs: Sequence[tuple[Side, Side]], group: str | None = None) -> list[Gain | None]:
        """Of each pair, how much more of the questions the first answers rightly than the second.

        Correctness by question is averaged over the seeds that both have; the difference is resampled as accuracies
        are (`metrics.accuracies`), which pairs what both answered. None where they share no seed or asked differently.
        """
        group = group or self.group
        waiting: dict[int, tuple[Answers, dict[tuple[Side, Side], NDArray[np.float64]]]] = {}
        where: dict[tuple[tuple[str, ...], ...], int] = {}
        for pair in dict.fromkeys(pairs):
            if (*pair, group) in self._gains:
                continue
            self._gains[*pair, group] = None
            if found := self._paired(*pair):
                asked, amounts, _ = found
                place = where.setdefault(tuple(asked.keys), len(where))
                waiting.setdefault(place, (asked, {}))[1][pair] = amounts
        for asked, differences in waiting.values():
            if group != EVERYTHING and group not in asked.groups:
                continue
            given = {str(number): amounts for number, amounts in enumerate(differences.values())}
            table = accuracies(given, asked.clips, asked.devices, asked.groups, [""] * len(asked.clips))
            for pair, number in zip(differences, given, strict=True):
                self._gains[*pair, group] = self._gain(pair, table[number][group][ALL_TYPES], group)
        return [self._gains[*pair, group] for pair in pairs]

    def gain(self, first: Side, second: Side, group: str | None = None) -> Gain | None:
        """See `gains`."""
        return self.gains([(first, second)], group)[0]

    def shared(self, first: Side, second: Side) -> list[tuple[Run, Run]]:
        """The runs of both, seed by seed, where both have answers."""
        others = {run.seed: run for run in self.of(*second)}
        pairs = [(run, others[run.seed]) for run in self.of(*first) if run.seed in others]
        return [
            (a, b)
            for a, b in pairs
            if a.answers and b.answers
            and a.case(first.case) in a.answers.correct and b.case(second.case) in b.answers.correct
        ]  # fmt: skip

    def by_seed(self, first: Side, second: Side) -> dict[int, Fact]:
        """The difference of a `gain`, seed by seed."""
        found = {}
        for pair in self.shared(first, second):
            if part := self._paired(first, second, [pair]):
                asked, differences, _ = part
                value = 100 * float(differences[self._in(asked, self.group)].mean())
                sources, more = self._traced(first, second, self.group, [pair], times=100)
                found[pair[0].seed] = Fact(value, signed(value), "difference", sources, more)
        return found

    def only_here(self, first: Side, second: Side) -> list[tuple[Fact, Fact]]:
        """Of each seed that both have, on how many questions one alone was right, the first and then the second."""
        found = []
        for pair in self.shared(first, second):
            if part := self._paired(first, second, [pair]):
                asked, differences, _ = part
                within = differences[self._in(asked, self.group)]
                facts = []
                for sides, way in (((first, second), 1), ((second, first), -1)):
                    sources, more = self._traced(*sides, self.group, [pair[::way]])
                    number = int((way * within > 0).sum())
                    facts.append(Fact(number, f"{number:,}", "right only here", sources, more))
                found.append((facts[0], facts[1]))
        return found

    @staticmethod
    def _in(asked: Answers, group: str) -> list[int]:
        """Places of a group's questions."""
        return [place for place, own in enumerate(asked.groups) if group in (own, EVERYTHING)]

    @staticmethod
    def _traced(
        first: Side, second: Side, group: str, pairs: Sequence[tuple[Run, ...]], **more: Any
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The sources of a comparison, and what it is minus."""
        sources = tuple(_predictions(run, first.case) for run, _ in pairs)
        return sources, {"minus": [_predictions(run, second.case) for _, run in pairs], "group": group, **more}

    def _gain(self, pair: tuple[Side, Side], found: Mapping[str, float], group: str) -> Gain:
        shared = self.shared(*pair)
        sources, more = self._traced(*pair, group, shared, times=100)
        seeds = tuple(run.seed for run, _ in shared)
        value, low, high = (
            Fact(100 * found[key], signed(100 * found[key]), how, sources, more)
            for key, how in (("value", "difference"), ("low", "low"), ("high", "high"))
        )
        return Gain(value, low, high, seeds)

    def _paired(
        self, first: Side, second: Side, pairs: list[tuple[Run, Run]] | None = None
    ) -> tuple[Answers, NDArray[np.float64], NDArray[np.float64]] | None:
        """The questions that both were asked, the difference on each, and on each how often the first was right."""
        total: NDArray[np.float64] | None = None
        mine: NDArray[np.float64] | None = None
        asked: Answers | None = None
        pairs = self.shared(first, second) if pairs is None else pairs
        for a, b in pairs:
            left, right = a.answers, b.answers
            assert left is not None
            assert right is not None
            own, other = left.correct[a.case(first.case) or ""], right.correct[b.case(second.case) or ""]
            right_of = {key: number for number, key in enumerate(right.keys) if not np.isnan(other[number])}
            answered = np.flatnonzero(~np.isnan(own)).tolist()
            both = [number for number in answered if left.keys[number] in right_of]
            if len(both) < min(len(answered), len(right_of)):
                return None
            own, other = own[both], other[[right_of[left.keys[number]] for number in both]]
            part = left.only(both)
            if asked and asked.keys != part.keys:
                return None
            asked = part
            total = own - other if total is None else total + own - other
            mine = own if mine is None else mine + own
        if asked is None or total is None or mine is None:
            return None
        return (asked, total / len(pairs), mine / len(pairs)) if len(asked.keys) else None

    def by_device(self, first: Side, second: Side) -> dict[str, tuple[str, Fact, Fact]]:
        """Group, share of right answers of the first, and its difference to the second, in % and points, by device."""
        if not (found := self._paired(first, second)):
            return {}
        asked, differences, mine = found
        shared = self.shared(first, second)
        rows: dict[str, list[int]] = {}
        for number, device in enumerate(asked.devices):
            rows.setdefault(device, []).append(number)
        result = {}
        for device, numbers in rows.items():
            sources, more = self._traced(first, second, EVERYTHING, shared, times=100, device=device)
            value, share = 100 * float(differences[numbers].mean()), 100 * float(mine[numbers].mean())
            alone = {key: each for key, each in more.items() if key != "minus"}
            result[device] = (
                asked.groups[numbers[0]],
                Fact(share, f"{share:.1f}", "share", sources, alone),
                Fact(value, signed(value), "difference", sources, more),
            )
        return result


def _predictions(run: Run, case: str | None) -> str:
    return f"{run.name}/{run.path.name}/{PREDICTIONS}#{run.case(case)}"


def signed(value: float) -> str:
    """A difference; what rounds to nothing has no sign."""
    return "0.0" if round(value, 1) == 0 else f"{value:+.1f}".replace("-", "−")


def constant(value: float, name: str, module: str = "cdc_mmpg.evidence.comparisons") -> Fact:
    """A constant of a module, of this one unless told; broken numbers with three digits that count."""
    return Fact(value, f"{value:,}" if isinstance(value, int) else f"{value:.3g}", "value", (f"{module}#{name}",))


def total(*facts: Fact) -> Fact:
    """The sum of values that stand somewhere each."""
    value = sum(fact.amount for fact in facts)
    return Fact(value, f"{value:,.0f}", "sum", tuple(source for fact in facts for source in fact.sources))


def on_wire(payload: Fact, upload: bool = False) -> Fact:
    """Bytes of a message with its header and, of a layer, its signature; nothing where nothing is sent."""
    added = constant(HEADER_BYTES, "HEADER_BYTES") if upload else constant(FRAMING_BYTES, "FRAMING_BYTES")
    return total(payload, added) if payload.value else payload


def delay(payload: Fact, rate: int) -> Fact:
    """Milliseconds for a payload at so many MiB/s, which the paper calls MB/s."""
    value = 1000 * payload.amount / (rate * MIB)
    digits = 2 if value >= 1 else 2 - floor(log10(value)) if value > 0 else 0  # three that count
    return Fact(value, f"{value:.{digits}f}", "delay", payload.sources, {"rate": rate})
