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
        right: whether the answers are right, by case, None where a case was not asked; empty in retrieval.
    """

    asked: Mapping[str, Sequence[str]]
    given: Mapping[str, Sequence[str | int]]
    right: Mapping[str, Sequence[bool | None]]


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
            header, *rows = csv.reader(file)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if not rows or any(len(row) != len(header) for row in rows):
        raise ValueError("it has no rows, or rows of different lengths")
    columns = [list(column) for column in zip(*rows, strict=True)]
    names = RANK_COLUMNS if header[0] == RANK_COLUMNS[0] else QUESTION_COLUMNS
    number = len(names)
    if tuple(header[:number]) != names or len(set(header)) != len(header):
        raise ValueError(f"unexpected columns: {', '.join(header)}")
    asked = dict(zip(names, columns[:number], strict=True))
    if names == RANK_COLUMNS:
        ranks = {case: [int(rank) for rank in ranks] for case, ranks in zip(header[3:], columns[3:], strict=True)}
        return AnswersTable(asked, ranks, {})
    given = dict(zip(header[number:-1], columns[number:-1], strict=True))
    marks = columns[-1]
    fits = all(len(row) == len(given) and set(row) <= MARKS.keys() for row in marks)
    if not given or header[-1] != MARKS_COLUMN or not fits:
        raise ValueError(f"no cases, or no column {MARKS_COLUMN!r} at the end with a mark for every case")
    right = {case: [MARKS[row[place]] for row in marks] for place, case in enumerate(given)}
    return AnswersTable(asked, given, right)
