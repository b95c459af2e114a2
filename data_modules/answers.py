"""The answer vocabulary: which answers have a class of their own."""

import logging
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from cdc_mmpg.data.batch import UNKNOWN_LABEL
from cdc_mmpg.errors import DataError
from data_modules.annotations import (
    CONTROL_CHARACTERS,
    AnnotationRow,
    another_convention,
    is_file,
    read_json,
    read_text,
)

logger = logging.getLogger(__name__)


class Answers:
    """Answers with a class each, and one class more for all others.

    Args:
        words: the known answers in the order of their classes.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._labels = {word: label for label, word in enumerate(words)}

    def label(self, answer: str) -> int:
        """Return the class of an answer, `UNKNOWN_LABEL` outside the vocabulary."""
        return self._labels.get(answer, UNKNOWN_LABEL)

    @classmethod
    def read(cls, path: Path, num_classes: int, training_answers: Iterable[str]) -> "Answers":
        """Read the distributed vocabulary, or, where it is absent, take the most frequent training answers.

        A text file has an answer a line, its class the line's number; a JSON file {answer: class}.

        Raises:
            DataError: the vocabulary does not hold num_classes - 1 different answers, or not a class for each.
        """
        there = is_file(path)
        if there:
            words = _read_labels(path) if path.suffix == ".json" else _read_lines(path)
        else:
            counts = Counter(training_answers)
            words = sorted(counts, key=lambda word: (-counts[word], word))[: num_classes - 1]
            _warn_of_ties(path, len(words), len(counts))
        if len(set(words)) != num_classes - 1 or len(words) != num_classes - 1:
            source = f"{path}: {len(set(words))} different answers in {len(words)} lines"
            if not there:
                source = f"{path.parent}: {len(words)} different training answers"
            raise DataError(
                f"{source}, but num_classes is {num_classes}, one of them for all other answers: set "
                f"ARGS=--data.init_args.num_classes={len(set(words)) + 1}, or mend the file"
            )
        return cls(words)


def _read_lines(path: Path) -> list[str]:
    """Return the answers of a file that has one a line.

    Raises:
        DataError: a line is blank, or holds a control character, which could end a line elsewhere; names it.
    """
    words = read_text(path).rstrip("\n").split("\n")
    for number, word in enumerate(words, start=1):
        if not word.strip() or CONTROL_CHARACTERS.search(word):
            raise DataError(f"{path}, line {number}: {word!r:.80} is no answer; mend the file, or fetch it again")
    return words


@cache
def _warn_of_ties(path: Path, taken: int, different: int) -> None:
    """Say once a process that the vocabulary is counted, not read: a run reads it several times."""
    logger.warning(
        "%s is absent: took the %d most frequent of %d training answers instead, by alphabet where frequencies "
        "tie; the distributed file breaks ties in its own way, so a few classes may differ",
        path, taken, different,
    )  # fmt: skip


def _read_labels(path: Path) -> list[str]:
    """Read the answers of {answer: class}, in the order of their classes."""
    labels = read_json(path)
    if not isinstance(labels, dict):
        raise DataError(f"{path}: holds a {type(labels).__name__}: {another_convention('{answer: class}')}")
    row = AnnotationRow(str(path), labels)
    for word in labels:
        if not word.strip() or CONTROL_CHARACTERS.search(word):
            raise DataError(f"{path}: {word!r:.80} is no answer; mend the file, or fetch it again")
        if isinstance(labels[word], str) and word.isdigit():
            raise DataError(f"{path}: {{{word!r}: {labels[word]!r:.80}}}: {another_convention('{answer: class}')}")
    words = {row.field(int, word): word for word in labels}
    for label in range(len(labels)):
        if label not in words:
            raise DataError(
                f"{path}: none of {len(labels)} answers has class {label}: classes must be 0 to {len(labels) - 1}, "
                "each once; fetch it again"
            )
    return [words[label] for label in range(len(labels))]
