"""Table of a test's answers, `predictions.test.csv`: a row per question, in retrieval per querying clip or caption.

Its columns are what was asked, then one per case with the answers, and last the marks: a letter per case, "r" right,
"w" wrong, "." not asked. In retrieval the cases have ranks, and there are no marks. Standard library only.
"""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.files import atomic_write

QUESTION_COLUMNS = ("clip", "device", "group", "type", "question", "answer")
RANK_COLUMNS = ("direction", "clip", "caption")  # direction: "VR" or "TR"
MARKS_COLUMN = "right"
MARKS = {"r": True, "w": False, ".": None}
LETTERS = {value: letter for letter, value in MARKS.items()}


class AnswersTable(NamedTuple):
    """Answers of a test, in columns of N rows.

    Attributes:
        asked: what was asked, by the names of `QUESTION_COLUMNS` or `RANK_COLUMNS`.
        given: answers by case, "" where a case was not asked; in retrieval the rank of the right text or clip.
        right: whether the answers are right by label, by case, None where a case was not asked; empty in retrieval, and
            in tables of earlier versions, which have no marks.
    """

    asked: Mapping[str, Sequence[str]]
    given: Mapping[str, Sequence[str | int]]
    right: Mapping[str, Sequence[bool | None]]

    def compare_words(self) -> dict[str, list[bool | None]]:
        """Return whether the answers have the words of the right ones, by case; None where a case was not asked."""
        return {
            case: [word == true if word else None for word, true in zip(words, self.asked["answer"], strict=True)]
            for case, words in self.given.items()
        }


def write_answers(table: AnswersTable, path: Path) -> None:
    """Write a table atomically as CSV."""
    header, columns = [*table.asked, *table.given], [*table.asked.values(), *table.given.values()]
    if table.right:
        header.append(MARKS_COLUMN)
        columns.append(["".join(LETTERS[mark] for mark in row) for row in zip(*table.right.values(), strict=True)])
    text = StringIO(newline="")
    csv.writer(text).writerows([header, *zip(*columns, strict=True)])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_answers(path: Path) -> AnswersTable:
    """Read a table.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged; says how.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if len(lines) < 2 or any(len(line) != len(lines[0]) for line in lines):
        raise ValueError("it has no rows, or rows of different lengths")
    header, *rows = lines
    names = RANK_COLUMNS if header[:1] == ["direction"] else QUESTION_COLUMNS
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    if tuple(header[: len(names)]) != names or len(columns) != len(header):
        raise ValueError(f"unexpected columns: {', '.join(header)}")
    asked = {name: columns.pop(name) for name in names}
    if names == RANK_COLUMNS:
        return AnswersTable(asked, {case: [int(rank) for rank in ranks] for case, ranks in columns.items()}, {})
    if header[-1] != MARKS_COLUMN:
        return AnswersTable(asked, columns, {})
    marks = columns.pop(MARKS_COLUMN)
    if not columns or any(len(row) != len(columns) or not set(row) <= MARKS.keys() for row in marks):
        raise ValueError(f"column {MARKS_COLUMN!r} does not fit the other columns")
    right = {case: [MARKS[row[place]] for row in marks] for place, case in enumerate(columns)}
    return AnswersTable(asked, columns, right)
