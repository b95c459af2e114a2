"""Evidence: a dataset's finished runs, their figures over seeds, and the paired differences between them.

Every figure is a `Fact`, which says from where it was read and how (`facts`).
"""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from numpy import float64
from numpy.typing import NDArray

from cdc_mmpg.catalogue import BASELINE, NAMES, ROWS, Row
from cdc_mmpg.evaluation.metrics import RECALLS, accuracies
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, cite, format_difference
from cdc_mmpg.evidence.pairing import Gain, RunPair, Side, cite_gain, cite_pairs, pair_answers
from cdc_mmpg.evidence.paper import ERRATA, PRINTED, Erratum
from cdc_mmpg.evidence.runs import ALL_GROUPS, ALL_TYPES, Run, RunAnswers, load_runs
from cdc_mmpg.program import escape_controls

GUESSES = ("majority", "chance")  # floors: a row that is no better has learnt nothing


class Evidence:
    """All finished runs of a dataset.

    Args:
        folder: `checkpoints/<dataset>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset = folder.absolute().name
        self.runs = load_runs(folder)
        self._gains: dict[tuple[Side, Side, str], Gain | None] = {}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The lines of the table of methods: `ROWS`, then methods that are not among them, by their folders' names."""
        others = [name for name in self.runs if name.partition(".")[0] not in NAMES and self.find_runs(name)]
        return (*ROWS, *(Row(escape_controls(name), name) for name in others))

    @cached_property
    def names(self) -> dict[str, str]:
        """Every method's label, in the order of the tables."""
        return {row.method: row.label for row in self.rows if row.condition is None}

    @cached_property
    def groups(self) -> list[str]:
        """Groups of devices; those that nothing was trained on first. `ALL_GROUPS` where devices are unknown."""
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
        """The group that the figures are about."""
        return self.groups[0]

    @cached_property
    def is_retrieval(self) -> bool:
        """Whether the task is retrieval, which has recalls in place of one accuracy."""
        cells = [
            run.find("accuracy", run.find_case(None) or "", self.group)
            for name in self.runs
            for run in self.find_runs(name)
        ]
        if not cells:
            return self.cite_paper(BASELINE, f"VR@{RECALLS[0]}") is not None
        return not any(ALL_TYPES in (cell or {}) for cell in cells)

    def find_runs(self, name: str, case: str | None = None) -> list[Run]:
        """Return the seeds of a run that were tested in a case; of one that answers nothing, none."""
        return [run for run in self.runs.get(name, []) if run.find_case(case)]

    def find_seeds(self, names: Collection[str]) -> list[int]:
        """Return the seeds that any of these runs was trained with."""
        return sorted({run.seed for name in names for run in self.runs.get(name, [])})

    def find_task(self) -> str | None:
        """Return open_ended, multiple_choice or retrieval; None where no run says it."""
        tasks = (run.find("task") for runs in self.runs.values() for run in runs)
        return next(filter(None, tasks), None)

    # Figures of one run's folder, over its seeds.

    def beats_guessing(self, side: Side) -> bool:
        """Return whether a row answers more rightly than the majority answer, or chance; True where neither is known.

        In retrieval the mean of the recalls counts.
        """
        own, guessed = [], []
        for run in self.find_runs(*side):
            cells = run.find("accuracy", run.find_case(side.case) or "", self.group) or {}
            floors = [floor for name in GUESSES if (floor := run.find("floors", name, self.group))]
            kinds = [ALL_TYPES] if ALL_TYPES in cells else list(cells)
            for floor in floors[:1]:
                known = [kind for kind in kinds if kind in floor]
                own += [cells[kind]["value"] for kind in known]
                guessed += [floor[kind]["value"] for kind in known]
        return not own or mean(own) > mean(guessed) + 1e-9

    def cite_accuracy(
        self, side: Side, group: str | None = None, kind: str = ALL_TYPES, interval: bool = True,
        seeds: Collection[int] | None = None,
    ) -> CitedText:  # fmt: skip
        """Return accuracy in %: of one seed with its interval, of several mean and standard deviation.

        Args:
            side: run and case.
            group: of devices, the evidence's own for None.
            kind: type of question.
            interval: with interval or deviation.
            seeds: those that count, all for None.
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
        hows = ("mean", "stdev") if interval and len(cells) > 1 else ("mean",)
        facts = (_aggregate(cells, how, "{:.1f}".format, 100) for how in hows)
        return cite(" ± ".join("{}" for _ in hows), *facts)

    def mean_accuracy(self, side: Side, group: str | None = None) -> Fact | None:
        """Return mean accuracy over seeds in %; None where there is none."""
        accuracy = self.cite_accuracy(side, group, interval=False)
        return accuracy.facts[0] if accuracy else None

    def aggregate(
        self, runs: Sequence[Run], keys: Sequence[str], how: str = "mean", form: str = "{:.1f}", times: float = 1,
        **more: Any,
    ) -> Fact:  # fmt: skip
        """Return one figure of a value that every run's results have.

        Args:
            runs: at least one, for `stdev` two.
            keys: of the value.
            how: mean, stdev, least or most.
            form: of the printed figure.
            times, more: `times`, `plus` and `over` as in the entries of `facts`; `over` are keys.
        """
        return _aggregate([(run, tuple(keys)) for run in runs], how, form.format, times, **more)

    def cite_value(self, run: Run, *keys: str) -> Fact | None:
        """Return a value of a run's results as it stands there."""
        value = run.find(*keys)
        if value is None:
            return None
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        return Fact(value, shown, "value", (run.locate(*keys),))

    def cite_paper(self, *keys: str) -> Fact | None:
        """Return what the paper prints for this dataset."""
        value: Any = PRINTED.get(self.dataset, {})
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        source = f"cdc_mmpg.evidence.paper#/{'/'.join((self.dataset, *keys))}"
        return None if value is None else Fact(value, str(value), "value", (source,))

    def find_errata(self, *keys: str) -> list[Erratum]:
        """Return the errors of the paper that a printed figure has."""
        place = "/".join((self.dataset, *keys))
        return [erratum for erratum in ERRATA if any(fnmatchcase(place, pattern) for pattern in erratum.places)]

    # Differences between runs, which need every answer.

    def compare_all(self, pairs: Sequence[tuple[Side, Side]], group: str | None = None) -> list[Gain | None]:
        """Return of each pair how much more of the questions the first answers rightly than the second.

        Correctness by question is averaged over the seeds that both have, or pooled where seeds have worlds of their
        own (`pair_answers`); the difference is resampled as accuracies are (`metrics.accuracies`), which pairs what
        both answered. None where they share no seed or asked differently.
        """
        group = group or self.group
        waiting: dict[int, tuple[RunAnswers, dict[tuple[Side, Side], NDArray[float64]]]] = {}
        places: dict[tuple[tuple[str, ...], ...], int] = {}
        for pair in dict.fromkeys(pairs):
            if (*pair, group) in self._gains:
                continue
            self._gains[*pair, group] = None
            if paired := pair_answers(self.pair_runs(*pair), *pair):
                place = places.setdefault(tuple(paired.questions.keys), len(places))
                waiting.setdefault(place, (paired.questions, {}))[1][pair] = paired.differences
        for questions, differences in waiting.values():
            if group != ALL_GROUPS and group not in questions.groups:
                continue
            numbered = {str(number): values for number, values in enumerate(differences.values())}
            no_types = [""] * len(questions.clips)
            table = accuracies(
                numbered, questions.clips, questions.devices, questions.groups, no_types, worlds=questions.worlds
            )
            for pair, number in zip(differences, numbered, strict=True):
                difference = table[number][group][ALL_TYPES]
                self._gains[*pair, group] = cite_gain(self.pair_runs(*pair), *pair, group, difference)
        return [self._gains[*pair, group] for pair in pairs]

    def compare(self, first: Side, second: Side, group: str | None = None) -> Gain | None:
        """Return the difference of two sides; see `compare_all`."""
        return self.compare_all([(first, second)], group)[0]

    def pair_runs(self, first: Side, second: Side) -> list[RunPair]:
        """Return the runs of both, seed by seed, where both have answers."""
        others = {run.seed: run for run in self.find_runs(*second)}
        pairs = [(run, others[run.seed]) for run in self.find_runs(*first) if run.seed in others]
        return [
            (a, b)
            for a, b in pairs
            if a.answers and b.answers
            and a.find_case(first.case) in a.answers.correct and b.find_case(second.case) in b.answers.correct
        ]  # fmt: skip

    def compare_by_seed(self, first: Side, second: Side) -> dict[int, Fact]:
        """Return the difference of two sides in points, by seed."""
        by_seed = {}
        for pair in self.pair_runs(first, second):
            if paired := pair_answers([pair], first, second):
                value = 100 * float(paired.differences[paired.places_of(self.group)].mean())
                sources, more = cite_pairs([pair], first, second, self.group, times=100)
                by_seed[pair[0].seed] = Fact(value, format_difference(value), "difference", sources, more)
        return by_seed

    def count_right_alone(self, first: Side, second: Side) -> list[tuple[Fact, Fact]]:
        """Return, of each seed that both have, on how many questions only the first was right, and only the second."""
        counts = []
        for pair in self.pair_runs(first, second):
            if paired := pair_answers([pair], first, second):
                differences = paired.differences[paired.places_of(self.group)]
                facts = []
                for sides, way in (((first, second), 1), ((second, first), -1)):
                    sources, more = cite_pairs([pair[::way]], *sides, self.group)
                    number = int((way * differences > 0).sum())
                    facts.append(Fact(number, f"{number:,}", "right only here", sources, more))
                counts.append((facts[0], facts[1]))
        return counts

    def compare_by_device(self, first: Side, second: Side) -> dict[str, tuple[str, Fact, Fact]]:
        """Return group, accuracy of the first in % and its difference to the second in points, by device."""
        pairs = self.pair_runs(first, second)
        if not (paired := pair_answers(pairs, first, second)):
            return {}
        places: dict[str, list[int]] = {}
        for place, device in enumerate(paired.questions.devices):
            places.setdefault(device, []).append(place)
        by_device = {}
        for device, asked in places.items():
            sources, more = cite_pairs(pairs, first, second, ALL_GROUPS, times=100, device=device)
            difference = 100 * float(paired.differences[asked].mean())
            share = 100 * float(paired.first_correct[asked].mean())
            of_first = {key: value for key, value in more.items() if key != "minus"}
            by_device[device] = (
                paired.questions.groups[asked[0]],
                Fact(share, f"{share:.1f}", "share", sources, of_first),
                Fact(difference, format_difference(difference), "difference", sources, more),
            )
        return by_device


def _aggregate(
    cells: Sequence[tuple[Run, tuple[str, ...]]], how: str, form: Callable[[float], str], times: float = 1, **more: Any
) -> Fact:
    """Return one figure of values of several runs; see `Evidence.aggregate`."""
    values = [run.find(*keys) for run, keys in cells]
    if over := more.get("over"):
        values = [value / run.find(*over) for value, (run, _) in zip(values, cells, strict=True)]
        more["over"] = [run.locate(*over) for run, _ in cells]
    values = [times * (value + more.get("plus", 0)) for value in values]
    ways: dict[str, Callable[[list[float]], float]] = {"mean": mean, "stdev": stdev, "least": min, "most": max}
    value = ways[how](values)
    how = "value" if how == "mean" and len(values) == 1 else how
    if times != 1:
        more["times"] = times
    return Fact(value, form(value), how, tuple(run.locate(*keys) for run, keys in cells), more)
