"""Evidence: a dataset's finished runs, their figures over seeds, and the paired differences between them.

Every figure is a `Fact`, which records its sources and how it was computed (see `facts`).
"""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from numpy import float64
from numpy.typing import NDArray

from cdc_mmpg.catalogue import BASELINE, METHOD_LABELS, ROWS, Row
from cdc_mmpg.evaluation.metrics import RECALLS, compute_accuracies
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, cite, format_difference
from cdc_mmpg.evidence.pairing import Gain, RunPair, Side, cite_gain, cite_pairs, pair_answers
from cdc_mmpg.evidence.paper import ERRATA, PRINTED, Erratum
from cdc_mmpg.evidence.runs import ALL_GROUPS, ALL_TYPES, Run, RunAnswers, load_runs
from cdc_mmpg.program import escape_controls

FLOOR_NAMES = ("majority", "chance")  # guesses: a row that is no better has learned nothing


class Evidence:
    """All finished runs of a dataset.

    Args:
        folder: folder of the dataset's runs, `checkpoints/<dataset>`.
        quoted_from: folder that sources are relative to; default: `folder`.
    """

    def __init__(self, folder: Path, quoted_from: Path | None = None) -> None:
        self.folder = folder
        self.dataset = folder.absolute().name
        self.runs = load_runs(folder, quoted_from)
        self._gains: dict[tuple[Side, Side, str], Gain | None] = {}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Rows of the table of methods: `ROWS`, then methods outside the catalogue by the names of their folders."""
        others = [name for name in self.runs if name.partition(".")[0] not in METHOD_LABELS and self.find_runs(name)]
        return (*ROWS, *(Row(escape_controls(name), name) for name in others))

    @cached_property
    def names(self) -> dict[str, str]:
        """Labels of all methods by name, in the order of the tables."""
        return {row.method: row.label for row in self.rows if row.condition is None}

    @cached_property
    def groups(self) -> list[str]:
        """Groups of devices, those unseen in training first; `ALL_GROUPS` alone if devices are unknown."""
        known = {
            group
            for runs in self.runs.values()
            for run in runs
            if (case := run.find_case(None))
            for group in run.results["accuracy"][case]
        }
        return [group for group in ("unseen", "seen") if group in known] or [ALL_GROUPS]

    @property
    def group(self) -> str:
        """Group of devices that the figures are about."""
        return self.groups[0]

    @cached_property
    def is_retrieval(self) -> bool:
        """Whether the task is retrieval, which has recalls instead of one accuracy."""
        cells = [
            run.find("accuracy", run.find_case(None) or "", self.group)
            for name in self.runs
            for run in self.find_runs(name)
        ]
        if not cells:
            return self.cite_paper(BASELINE, f"VR@{RECALLS[0]}") is not None
        return not any(ALL_TYPES in (cell or {}) for cell in cells)

    def find_runs(self, name: str, case: str | None = None) -> list[Run]:
        """Return the runs of a name that were tested in a case (None: the first); empty if they answer nothing."""
        return [run for run in self.runs.get(name, []) if run.find_case(case)]

    def find_seeds(self, names: Collection[str]) -> list[int]:
        """Return the seeds of all runs with these names, sorted."""
        return sorted({run.seed for name in names for run in self.runs.get(name, [])})

    def find_task(self) -> str | None:
        """Return open_ended, multiple_choice or retrieval; None if no run records it."""
        tasks = (run.find("task") for runs in self.runs.values() for run in runs)
        return next(filter(None, tasks), None)

    # Figures of one name, over its seeds.

    def beats_guessing(self, side: Side) -> bool:
        """Return whether a row is more accurate than the majority answer, or chance; True if neither is known.

        In retrieval the means of the recalls are compared.
        """
        shares, floor_shares = [], []
        for run in self.find_runs(*side):
            cells = run.find("accuracy", run.find_case(side.case) or "", self.group) or {}
            floors = [floor for name in FLOOR_NAMES if (floor := run.find("floors", name, self.group))]
            kinds = [ALL_TYPES] if ALL_TYPES in cells else list(cells)
            for floor in floors[:1]:
                known = [kind for kind in kinds if kind in floor]
                shares += [cells[kind]["value"] for kind in known]
                floor_shares += [floor[kind]["value"] for kind in known]
        return not shares or mean(shares) > mean(floor_shares) + 1e-9

    def cite_accuracy(
        self, side: Side, group: str | None = None, kind: str = ALL_TYPES, interval: bool = True,
        seeds: Collection[int] | None = None,
    ) -> CitedText:  # fmt: skip
        """Return the accuracy in %: of one seed with its interval, of several seeds as mean and standard deviation.

        Args:
            side: name of the runs and case of their test.
            group: group of devices; None for `self.group`.
            kind: type of question.
            interval: whether to add the interval or the standard deviation.
            seeds: seeds to include; None for all.
        """
        group = group or self.group
        cells = [
            (run, ("accuracy", run.find_case(side.case) or "", group, kind, "value"))
            for run in self.find_runs(*side)
            if run.find("accuracy", run.find_case(side.case) or "", group, kind)
            and (seeds is None or run.seed in seeds)
        ]
        if not cells:
            return NO_TEXT
        if len(cells) == 1 and interval:
            run, keys = cells[0]
            ends = (self.aggregate([run], (*keys[:-1], end), times=100) for end in ("value", "low", "high"))
            return cite("{} [{}, {}]", *ends)
        statistics = ("mean", "stdev") if interval and len(cells) > 1 else ("mean",)
        facts = (_aggregate(cells, how, "{:.1f}".format, 100) for how in statistics)
        return cite(" ± ".join("{}" for _ in statistics), *facts)

    def cite_mean_accuracy(self, side: Side, group: str | None = None) -> Fact | None:
        """Return the mean accuracy over seeds in %; None without runs."""
        accuracy = self.cite_accuracy(side, group, interval=False)
        return accuracy.facts[0] if accuracy else None

    def aggregate(
        self, runs: Sequence[Run], keys: Sequence[str], how: str = "mean", form: str = "{:.1f}", times: float = 1,
        **more: Any,
    ) -> Fact:  # fmt: skip
        """Return one figure computed from a value that the results of every run have.

        Args:
            runs: runs to aggregate: at least one, for `stdev` at least two.
            keys: keys that lead to the value in results.json.
            how: mean, stdev, least or most.
            form: format of the printed figure.
            times: as in the entries of `facts`.
            **more: `plus` and `over` as in the entries of `facts`; `over` is given as keys.
        """
        return _aggregate([(run, tuple(keys)) for run in runs], how, form.format, times, **more)

    def cite_value(self, run: Run, *keys: str) -> Fact | None:
        """Return a value of a run's results as it is stored; None if it is missing."""
        value = run.find(*keys)
        if value is None:
            return None
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        return Fact(value, shown, "value", (run.locate(*keys),))

    def cite_paper(self, *keys: str) -> Fact | None:
        """Return the figure that the paper prints for this dataset; None if it prints none."""
        value: Any = PRINTED.get(self.dataset, {})
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        source = f"cdc_mmpg.evidence.paper#/{'/'.join((self.dataset, *keys))}"
        return None if value is None else Fact(value, str(value), "value", (source,))

    def find_errata(self, *keys: str) -> list[Erratum]:
        """Return the paper's errors that affect a printed figure."""
        place = "/".join((self.dataset, *keys))
        return [erratum for erratum in ERRATA if any(fnmatchcase(place, pattern) for pattern in erratum.places)]

    # Differences between runs, computed from their answers to every question.

    def compare_all(self, pairs: Sequence[tuple[Side, Side]], group: str | None = None) -> list[Gain | None]:
        """Return for each pair the accuracy of the first side minus that of the second, with its 95 % interval.

        Correctness by question is averaged over the seeds that both have, or pooled if each seed has a different world
        (`pair_answers`). The difference is resampled like accuracies (`metrics.compute_accuracies`), which keeps the
        questions paired. None for a pair that shares no seed or was asked different questions.
        """
        group = group or self.group
        pending: dict[int, tuple[RunAnswers, dict[tuple[Side, Side], NDArray[float64]]]] = {}
        places: dict[tuple[tuple[str, ...], ...], int] = {}
        for pair in dict.fromkeys(pairs):
            if (*pair, group) in self._gains:
                continue
            self._gains[*pair, group] = None
            if paired := pair_answers(self.pair_runs(*pair), *pair):
                place = places.setdefault(tuple(paired.questions.keys), len(places))
                pending.setdefault(place, (paired.questions, {}))[1][pair] = paired.differences
        for questions, differences in pending.values():
            if group != ALL_GROUPS and group not in questions.groups:
                continue
            numbered = {str(number): values for number, values in enumerate(differences.values())}
            no_types = [""] * len(questions.clips)
            table = compute_accuracies(
                numbered, questions.clips, questions.devices, questions.groups, no_types, worlds=questions.worlds
            )
            for pair, number in zip(differences, numbered, strict=True):
                difference = table[number][group][ALL_TYPES]
                self._gains[*pair, group] = cite_gain(self.pair_runs(*pair), *pair, group, difference)
        return [self._gains[*pair, group] for pair in pairs]

    def compare(self, first: Side, second: Side, group: str | None = None) -> Gain | None:
        """Return the accuracy of the first side minus that of the second; see `compare_all`."""
        return self.compare_all([(first, second)], group)[0]

    def pair_runs(self, first: Side, second: Side) -> list[RunPair]:
        """Return the pairs of runs with the same seed in which both sides have answers."""
        others = {run.seed: run for run in self.find_runs(*second)}
        pairs = [(run, others[run.seed]) for run in self.find_runs(*first) if run.seed in others]
        return [
            (a, b)
            for a, b in pairs
            if a.answers and b.answers
            and a.find_case(first.case) in a.answers.correct and b.find_case(second.case) in b.answers.correct
        ]  # fmt: skip

    def compare_by_seed(self, first: Side, second: Side) -> dict[int, Fact]:
        """Return the difference of two sides in percentage points, by seed."""
        by_seed = {}
        for pair in self.pair_runs(first, second):
            if paired := pair_answers([pair], first, second):
                value = 100 * float(paired.differences[paired.find_positions(self.group)].mean())
                sources, more = cite_pairs([pair], first, second, self.group, times=100)
                by_seed[pair[0].seed] = Fact(value, format_difference(value), "difference", sources, more)
        return by_seed

    def count_only_one_right(self, first: Side, second: Side) -> list[tuple[Fact, Fact]]:
        """Count, per seed that both have, the questions that only the first and only the second answer correctly."""
        counts = []
        for pair in self.pair_runs(first, second):
            if paired := pair_answers([pair], first, second):
                differences = paired.differences[paired.find_positions(self.group)]
                facts = []
                for sides, way in (((first, second), 1), ((second, first), -1)):
                    sources, more = cite_pairs([pair[::way]], *sides, self.group)
                    number = int((way * differences > 0).sum())
                    facts.append(Fact(number, f"{number:,}", "right only here", sources, more))
                counts.append((facts[0], facts[1]))
        return counts

    def compare_by_device(self, first: Side, second: Side) -> dict[str, tuple[str, Fact, Fact]]:
        """Return by device its group, the accuracy of the first in %, and its difference to the second in points."""
        pairs = self.pair_runs(first, second)
        if not (paired := pair_answers(pairs, first, second)):
            return {}
        places: dict[str, list[int]] = {}
        for place, device in enumerate(paired.questions.devices):
            places.setdefault(device, []).append(place)
        by_device = {}
        for device, positions in places.items():
            sources, more = cite_pairs(pairs, first, second, ALL_GROUPS, times=100, device=device)
            difference = 100 * float(paired.differences[positions].mean())
            share = 100 * float(paired.first_correct[positions].mean())
            of_first = {key: value for key, value in more.items() if key != "minus"}
            by_device[device] = (
                paired.questions.groups[positions[0]],
                Fact(share, f"{share:.1f}", "share", sources, of_first),
                Fact(difference, format_difference(difference), "difference", sources, more),
            )
        return by_device


def _aggregate(
    cells: Sequence[tuple[Run, tuple[str, ...]]], how: str, form: Callable[[float], str], times: float = 1, **more: Any
) -> Fact:
    """Return one figure computed from a value of several runs; see `Evidence.aggregate`."""
    values = [run.find(*keys) for run, keys in cells]
    if over := more.get("over"):
        values = [value / run.find(*over) for value, (run, _) in zip(values, cells, strict=True)]
        more["over"] = [run.locate(*over) for run, _ in cells]
    values = [times * (value + more.get("plus", 0)) for value in values]
    statistics: dict[str, Callable[[list[float]], float]] = {"mean": mean, "stdev": stdev, "least": min, "most": max}
    value = statistics[how](values)
    how = "value" if how == "mean" and len(values) == 1 else how
    if times != 1:
        more["times"] = times
    return Fact(value, form(value), how, tuple(run.locate(*keys) for run, keys in cells), more)
