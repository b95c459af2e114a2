"""Finished runs: their results, and their answers in the test."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.catalogue import METHOD_LABELS
from cdc_mmpg.evaluation.answers import AnswersTable, read_answers
from cdc_mmpg.evaluation.metrics import RECALLS
from cdc_mmpg.results import PREDICTIONS, RESULTS, find_results, read_results

logger = logging.getLogger(__name__)

Results = dict[str, Any]

ALL_GROUPS, ALL_TYPES = "test", "all"  # group and type that hold every question


class RunAnswers(NamedTuple):
    """Answers of a run in its test, one row per question; in retrieval one row per querying clip or caption."""

    keys: list[tuple[str, ...]]  # identity of each question
    clips: list[str]
    devices: list[str]
    groups: list[str]
    correct: dict[str, NDArray[np.float64]]  # by case; NaN where a case was not asked
    worlds: list[str]  # seed of the run, if other seeds have other devices; else empty

    def select(self, numbers: list[int], world: str) -> "RunAnswers":
        """Return the rows with these numbers as rows of `world`, without their correctness."""
        clips, devices, groups = ([column[i] for i in numbers] for column in (self.clips, self.devices, self.groups))
        return RunAnswers([self.keys[i] for i in numbers], clips, devices, groups, {}, [world] * len(numbers))


class Run:
    """A finished run.

    Args:
        path: folder of the run, `checkpoints/<dataset>/<name>/seed<N>`.
        results: content of its results.json.
        quoted_from: folder that sources are relative to; default: `checkpoints/<dataset>`.
    """

    def __init__(self, path: Path, results: Results, quoted_from: Path | None = None) -> None:
        self.path, self.results = path, results
        self.place = Path(os.path.relpath(path, quoted_from or path.parents[1])).as_posix()
        self.name = path.parent.name
        self.seed = int(path.name.removeprefix("seed"))

    @property
    def is_external(self) -> bool:
        """Whether a predictions file gave the answers, of a model that was not trained here."""
        return bool(self.find("predictions"))

    def locate(self, *keys: str) -> str:
        """Return the source of a value in the results, as `facts` writes sources."""
        pointer = "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)
        return f"{self.place}/{RESULTS}#/{pointer}"

    def locate_answers(self, case: str | None) -> str:
        """Return the source of the answers in a case (None: the first)."""
        return f"{self.place}/{PREDICTIONS}#{self.find_case(case)}"

    def find(self, *keys: str) -> Any:
        """Return a value of the results; None if it is missing."""
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def find_case(self, name: str | None) -> str | None:
        """Return the case with this name (None: the first); None if the run was not tested in it."""
        cases = self.results.get("accuracy") or {}
        return next(iter(cases), None) if name is None else name if name in cases else None

    @cached_property
    def answers(self) -> RunAnswers | None:
        """Answers of the run; None if the file is missing or, with a warning, unusable."""
        path = self.path / PREDICTIONS
        try:
            table = read_answers(path)
            if "direction" in table.asked:
                return _take_ranks(table)
            return _take_answers(table, table.right or self._judge_words(table))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "%s: cannot be used (%s), so its answers are left out: restore the file or its permissions, or delete "
                "the folder and train anew",
                path, error,
            )  # fmt: skip
            return None

    def _judge_words(self, table: AnswersTable) -> dict[str, list[bool | None]]:
        """Return which answers are right by their words, for a table of a version without marks.

        Raises:
            ValueError: the shares of right words differ from the results' shares of right labels.
        """
        right = table.compare_words()
        for case, marks in right.items():
            share = self.find("accuracy", case, ALL_GROUPS, ALL_TYPES, "value")
            if share is not None and abs(np.nanmean(np.array(marks, np.float64)) - share) > 0.5 / len(marks):
                raise ValueError(f"right words and right labels differ in {case}: it is from an earlier version")
        return right


def _take_answers(table: AnswersTable, right: Mapping[str, Sequence[bool | None]]) -> RunAnswers:
    """Take the answers to questions, which are right or wrong by label, as in the results."""
    clips, devices, groups, types, questions, answers = (list(column) for column in table.asked.values())
    # The key leaves out the group: whether a device is seen depends on the run.
    keys = _number_repeats(zip(clips, devices, types, questions, answers, strict=True))
    correct = {case: np.array(marks, np.float64) for case, marks in right.items()}  # None becomes NaN
    return RunAnswers(keys, clips, devices, groups, correct, [])


def _take_ranks(table: AnswersTable) -> RunAnswers:
    """Take the ranks of retrieval as answers of clips and captions.

    The value of a row is the mean of its recalls at 1, 5 and 10. Both directions have the same total weight, so the
    mean over all rows is the mean of the six recalls.
    """
    directions, clips, captions = (list(column) for column in table.asked.values())
    numbers = Counter(directions)
    weights = np.array([len(directions) / (len(numbers) * numbers[direction]) for direction in directions])
    correct = {
        case: weights * np.mean([np.array(ranks, np.int64) <= k for k in RECALLS], axis=0)
        for case, ranks in table.given.items()
    }
    keys = _number_repeats(zip(directions, clips, captions, strict=True))
    return RunAnswers(keys, clips, clips, [""] * len(clips), correct, [])


def _number_repeats(keys: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Append to each key the number of its earlier occurrences, so that all keys differ."""
    seen: Counter[tuple[str, ...]] = Counter()
    numbered = []
    for key in map(tuple, keys):
        numbered.append((*key, str(seen[key])))
        seen[key] += 1
    return numbered


def load_runs(folder: Path, quoted_from: Path | None = None) -> dict[str, list[Run]]:
    """Read the finished runs below `checkpoints/<dataset>`, by name and in the order of their seeds.

    Damaged results, and those of an earlier version, are left out with a warning.

    Args:
        folder: folder of the dataset's runs.
        quoted_from: see `Run`.
    """
    by_name: dict[str, list[Run]] = {}
    for path in find_results(folder, "*/seed*"):
        seed, name = path.parent.name.removeprefix("seed"), path.parents[1].name
        if not seed.isdecimal() or not (results := read_results(path.parent)):
            continue
        if name in METHOD_LABELS and not results.get("accuracy"):
            logger.warning(
                '%s has no "accuracy" by condition: the run is from an earlier version and left out; delete %s and '
                "train anew", path, path.parent,
            )  # fmt: skip
            continue
        by_name.setdefault(name, []).append(Run(path.parent, results, quoted_from))
    for runs in by_name.values():
        runs.sort(key=lambda run: run.seed)
    return by_name
