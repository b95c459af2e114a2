"""Scoring of predictions files: answers of a model that is not ours, by question id.

An answer is right if it equals the annotated one, both in the form of `normalize_answer`: the paper's exact match, with
no credit for synonyms, for a sentence that contains the answer, or by another model's judgement. A question without an
answer counts as wrong.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdc_mmpg.data.interface import VideoTextData
from cdc_mmpg.errors import DataError
from cdc_mmpg.evaluation.evaluate import rate_answers

COLUMNS = ("id", "answer")  # of a predictions file; others are ignored
CASE = "predicted"  # case of the run's test
NO_ANSWER = "(no answer)"  # in the table of answers


class Prediction(NamedTuple):
    """Answer to a question as a predictions file gives it."""

    answer: str
    place: str  # for messages: "<path>, line 4"


def normalize_answer(text: str) -> str:
    """Return an answer in the form in which it is compared: lower case, single blanks, no final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Read a predictions file, CSV with the columns of `COLUMNS`, by question id.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or CSV, has no rows, lacks a column, or has an id twice; names
            the line.
    """
    predictions: dict[str, Prediction] = {}
    header: list[str] = []
    place = str(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if not row:
                    continue
                if not header:
                    header = row
                    _check_header(header, place)
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{place}: {len(row)} fields where the header has {len(header)}: put an answer that contains a "
                        "comma in double quotes"
                    )
                identity, answer = (row[header.index(column)].strip() for column in COLUMNS)
                if identity in predictions:
                    first = predictions[identity].place
                    raise DataError(f"{place}: the id {identity!r:.80} is also in {first}: keep one of the two")
                predictions[identity] = Prediction(answer, place)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}, after {place}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the path (PREDICTIONS=)") from error
    except csv.Error as error:
        raise DataError(f"{place}: the next line is not CSV ({error}): fix the quotation marks") from error
    if not predictions:
        raise DataError(f"{path}: no predictions: write the header {','.join(COLUMNS)} and one line per question")
    return predictions


def _check_header(header: Sequence[str], place: str) -> None:
    """Refuse a header without exactly one column of each name."""
    for column in COLUMNS:
        if header.count(column) != 1:
            shown = ",".join(header)
            problem = "no column" if column not in header else "several columns"
            raise DataError(f"{place}: {problem} {column} in the header ({shown:.80}): write {','.join(COLUMNS)}")


def score_predictions(data: VideoTextData, predictions: dict[str, Prediction], table: Path) -> dict[str, Any]:
    """Score predictions on the test split, write them to `table` (CSV) and return the entries of results.json.

    In an open-ended task an answer outside the vocabulary can be right. In a multiple choice an answer is the text of
    an option or, if it is none, an option's number from 0.

    Args:
        data: dataset, set up; not one of retrieval.
        predictions: answers by question id, see `VideoTextData.locate_test_questions`.
        table: file to write.

    Returns:
        accuracy and floors, see `evaluate.evaluate_outcomes`, and unanswered, the number of questions without answer.

    Raises:
        DataError: an id is none of the test questions', or an answer none of a question's options; names the line.
    """
    places = data.locate_test_questions()
    for identity, prediction in predictions.items():
        if identity not in places:
            raise DataError(
                f"{prediction.place}: no test question has the id {identity!r:.80}; ids are those of the annotations, "
                f"such as {next(iter(places))!r}: fix the id, or remove the line"
            )
    by_place = {place: predictions[identity] for identity, place in places.items() if identity in predictions}
    words, correct, unanswered = [], [], 0
    labels = data.labels("test").tolist()
    origins = data.origins("test")
    for place, origin in enumerate(origins):
        given = by_place.get(place)
        if not given or not normalize_answer(given.answer):
            answer, is_right, unanswered = NO_ANSWER, False, unanswered + 1
        elif data.task == "open_ended":
            answer = " ".join(given.answer.split())
            is_right = normalize_answer(answer) == normalize_answer(origin.answer)
        else:
            options = data.texts("test", place)
            answer = options[_choose_option(given, options)]
            is_right = normalize_answer(answer) == normalize_answer(options[labels[place]])
        words.append(answer)
        correct.append(is_right)
    return {**rate_answers(data, origins, {CASE: words}, {CASE: correct}, table), "unanswered": unanswered}


def _choose_option(prediction: Prediction, options: Sequence[str]) -> int:
    """Return the index of the option that a prediction names."""
    given, texts = normalize_answer(prediction.answer), [normalize_answer(option) for option in options]
    if given in texts:
        return texts.index(given)
    if given.isdecimal() and len(given) < 4 and int(given) < len(options):
        return int(given)
    raise DataError(
        f"{prediction.place}: {prediction.answer!r:.80} is none of the question's {len(options)} options: write the "
        f"text of an option or its number, 0 to {len(options) - 1}, or nothing if the model chose none"
    )
