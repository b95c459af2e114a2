"""Paired answers: two runs compared on the questions that both were asked, seed by seed."""

from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.evidence.facts import CitedText, Fact, cite, format_difference
from cdc_mmpg.evidence.runs import ALL_GROUPS, Run, RunAnswers

RunPair = tuple[Run, Run]  # of one seed


class Side(NamedTuple):
    """One side of a comparison: name of the runs and case of their test (None: the first, as in training)."""

    name: str
    case: str | None = None


class Gain(NamedTuple):
    """A paired difference of accuracies in percentage points, with its 95 % interval."""

    value: Fact
    low: Fact
    high: Fact
    seeds: tuple[int, ...]

    def format(self, template: str = "{} [{}, {}]") -> CitedText:
        """Return the difference with the ends of its interval."""
        return cite(template, self.value, self.low, self.high)

    def format_points(self) -> CitedText:
        """Return the same with the unit, without plus signs if the whole interval is above zero."""
        ends = (self.value, self.low, self.high)
        if self.sign > 0:
            ends = tuple(end._replace(shown=end.shown.removeprefix("+")) for end in ends)  # type: ignore[assignment]
        return cite("{} points [{}, {}]", *ends)

    @property
    def sign(self) -> int:
        """1 if the interval lies above zero, -1 if it lies below, else 0."""
        low, high = self.low.amount, self.high.amount
        return (low > 0) - (high < 0)


class PairedAnswers(NamedTuple):
    """Two sides on the questions that both were asked, averaged over seeds."""

    questions: RunAnswers
    differences: NDArray[np.float64]  # (questions,): correctness of the first minus the second, from -1 to 1
    first_correct: NDArray[np.float64]  # (questions,): correctness of the first, from 0 to 1

    def find_positions(self, group: str) -> list[int]:
        """Return the positions of a group's questions."""
        return [position for position, name in enumerate(self.questions.groups) if group in (name, ALL_GROUPS)]


def pair_answers(pairs: Sequence[RunPair], first: Side, second: Side) -> PairedAnswers | None:
    """Return the answers of both sides to the same questions; None if they cannot be paired.

    Seeds with the same questions are averaged question by question; seeds with entirely different questions (each with
    its own world) are concatenated.
    """
    paired = [_pair_seed(a, b, first, second) for a, b in pairs]
    seeds = [seed for seed in paired if seed is not None]
    if not seeds or len(seeds) < len(paired):
        return None
    if all(seed.questions.keys == seeds[0].questions.keys for seed in seeds):
        questions = seeds[0].questions._replace(worlds=[])
        return PairedAnswers(
            questions, *(np.mean(values, axis=0) for values in zip(*(s[1:] for s in seeds), strict=True))
        )
    if any(set(a.questions.keys) & set(b.questions.keys) for a, b in combinations(seeds, 2)):
        return None
    keys, clips, devices, groups, worlds = (
        list(chain(*(getattr(seed.questions, name) for seed in seeds)))
        for name in ("keys", "clips", "devices", "groups", "worlds")
    )
    questions = RunAnswers(keys, clips, devices, groups, {}, worlds)
    return PairedAnswers(questions, *(np.concatenate(values) for values in zip(*(s[1:] for s in seeds), strict=True)))


def _pair_seed(a: Run, b: Run, first: Side, second: Side) -> PairedAnswers | None:
    """Return the answers of two runs to the same questions; None if neither covers all questions of the other."""
    left, right = a.answers, b.answers
    assert left is not None
    assert right is not None
    correct_a, correct_b = left.correct[a.find_case(first.case) or ""], right.correct[b.find_case(second.case) or ""]
    right_places = {key: number for number, key in enumerate(right.keys) if not np.isnan(correct_b[number])}
    answered = np.flatnonzero(~np.isnan(correct_a)).tolist()
    both = [number for number in answered if left.keys[number] in right_places]
    if not both or len(both) < min(len(answered), len(right_places)):
        return None
    correct_a, correct_b = correct_a[both], correct_b[[right_places[left.keys[number]] for number in both]]
    return PairedAnswers(left.select(both, str(a.seed)), correct_a - correct_b, correct_a)


def cite_pairs(
    pairs: Sequence[tuple[Run, ...]], first: Side, second: Side, group: str, **more: Any
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the sources of the first side, and the rest of the entry: the second side's sources and the group."""
    sources = tuple(run.locate_answers(first.case) for run, _ in pairs)
    return sources, {"minus": [run.locate_answers(second.case) for _, run in pairs], "group": group, **more}


def cite_gain(pairs: Sequence[RunPair], first: Side, second: Side, group: str, difference: Mapping[str, float]) -> Gain:
    """Return a difference of accuracies in points with its sources; `difference` has value, low and high as shares."""
    sources, more = cite_pairs(pairs, first, second, group, times=100)
    value, low, high = (
        Fact(100 * difference[key], format_difference(100 * difference[key]), how, sources, more)
        for key, how in (("value", "difference"), ("low", "low"), ("high", "high"))
    )
    return Gain(value, low, high, tuple(run.seed for run, _ in pairs))
