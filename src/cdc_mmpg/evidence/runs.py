"""Finished runs: their results, and what they answered in their tests."""

import csv
import logging
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.catalogue import NAMES
from cdc_mmpg.evaluation.metrics import RECALLS, RIGHT
from cdc_mmpg.results import RESULTS, find_results, read_results

logger = logging.getLogger(__name__)

Results = dict[str, Any]

PREDICTIONS = "predictions.test.csv"
QUESTION_COLUMNS = ["clip", "device", "group", "type", "question", "answer"]  # the first columns of PREDICTIONS
ALL_GROUPS, ALL_TYPES = "test", "all"  # group and type that hold every question


class RunAnswers(NamedTuple):
    """What a run answered in its test, a row a question; in retrieval a row a clip or caption that asks."""

    keys: list[tuple[str, ...]]  # all that tells a question from another
    clips: list[str]
    devices: list[str]
    groups: list[str]
    correct: dict[str, NDArray[np.float64]]  # by case; NaN where a case was not asked
    worlds: list[str]  # seed of the run, where runs with other seeds were asked about other devices

    def select(self, numbers: list[int], world: str) -> "RunAnswers":
        """Return some of the rows, without what was right, as those of a world."""
        clips, devices, groups = ([column[i] for i in numbers] for column in (self.clips, self.devices, self.groups))
        return RunAnswers([self.keys[i] for i in numbers], clips, devices, groups, {}, [world] * len(numbers))


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

    def locate(self, *keys: str) -> str:
        """Return the source of a value of its results."""
        pointer = "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)
        return f"{self.name}/{self.path.name}/{RESULTS}#/{pointer}"

    def locate_answers(self, case: str | None) -> str:
        """Return the source of its answers in a case, the first for None."""
        return f"{self.name}/{self.path.name}/{PREDICTIONS}#{self.find_case(case)}"

    def find(self, *keys: str) -> Any:
        """Return a value of its results, None where there is none."""
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def find_case(self, name: str | None) -> str | None:
        """Return a case that it was tested in, the first for None; None where it was not."""
        cases = self.results.get("accuracy") or {}
        return next(iter(cases), None) if name is None else name if name in cases else None

    @cached_property
    def answers(self) -> RunAnswers | None:
        """What it answered; None, with a warning, where the file is damaged, and where there is none."""
        path = self.path / PREDICTIONS
        try:
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            if not rows or any(len(row) != len(header) for row in rows):
                raise ValueError("rows of different lengths, or none")
            return _read_ranks(header, rows) if header[0] == "direction" else self._read_answers(header, rows)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, IndexError, csv.Error) as error:
            logger.warning("%s: left out (%s): delete the folder and train anew", path, error)
            return None

    def _read_answers(self, header: list[str], rows: list[list[str]]) -> RunAnswers:
        """Return answers to questions, right or wrong by label, as in the results.

        Raises:
            ValueError: the table has other columns, or, written before it had labels, other shares of right words
                than the results have of right labels.
        """
        start, words = len(QUESTION_COLUMNS), range(len(QUESTION_COLUMNS), len(header))
        if header[:start] != QUESTION_COLUMNS:
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
                share = self.find("accuracy", case, ALL_GROUPS, ALL_TYPES, "value")
                if share is not None and abs(np.nanmean(values) - share) > 0.5 / len(rows):
                    raise ValueError(f"equal words are no equal labels in {case}: it is of an earlier version")
        clips, devices, groups = ([row[place] for row in rows] for place in range(3))
        # Groups tell no question from another: whether a device is seen depends on the run.
        keys = _number_repeats(row[:2] + row[3:start] for row in rows)
        return RunAnswers(keys, clips, devices, groups, correct, [])


def _read_ranks(header: list[str], rows: list[list[str]]) -> RunAnswers:
    """Return answers of clips and captions by their ranks.

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
    return RunAnswers(_number_repeats(row[:3] for row in rows), clips, clips, [""] * len(rows), correct, [])


def _number_repeats(keys: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Return the keys, each with how often it came before."""
    seen: Counter[tuple[str, ...]] = Counter()
    numbered = []
    for key in map(tuple, keys):
        numbered.append((*key, str(seen[key])))
        seen[key] += 1
    return numbered


def load_runs(folder: Path) -> dict[str, list[Run]]:
    """Return the finished runs below `checkpoints/<dataset>` by name, each name's by seed.

    Damaged results, and those of an earlier version, are left out with a warning.
    """
    by_name: dict[str, list[Run]] = {}
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
        by_name.setdefault(name, []).append(Run(path.parent, results))
    for runs in by_name.values():
        runs.sort(key=lambda run: run.seed)
    return by_name
