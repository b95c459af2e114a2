"""The answer vocabulary: the answers that are classes."""

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
    explain_unsupported_format,
    is_file,
    name_kind,
    read_json,
    read_text,
)

logger = logging.getLogger(__name__)


class Answers:
    """Answers with one class each, and one more class for all other answers.

    Args:
        words: the known answers in the order of their classes.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._labels = {word: label for label, word in enumerate(words)}

    def label(self, answer: str) -> int:
        """Return the class of an answer, or `UNKNOWN_LABEL` if it is outside the vocabulary."""
        return self._labels.get(answer, UNKNOWN_LABEL)

    @classmethod
    def read(cls, path: Path, num_classes: int, training_answers: Iterable[str]) -> "Answers":
        """Read the distributed vocabulary, or count the most frequent training answers if its file is absent.

        A text file has one answer per line, whose class is the line's index; a JSON file has {answer: class}.

        Raises:
            DataError: the vocabulary does not have num_classes - 1 different answers with one class each.
        """
        is_present = is_file(path)
        if is_present:
            words = _read_labels(path) if path.suffix == ".json" else _read_lines(path)
        else:
            counts = Counter(training_answers)
            words = sorted(counts, key=lambda word: (-counts[word], word))[: num_classes - 1]
            if len(words) < len(counts):
                _warn_of_ties(path, len(words), len(counts))
        if (distinct := len(set(words))) < len(words):
            raise DataError(
                f"{path}: {distinct} different answers in {len(words)} lines: remove the repeated lines, or fetch the "
                "file again"
            )
        if distinct != num_classes - 1:
            source, otherwise = f"{path}: {distinct} different answers", ", or fix the file"
            if not is_present:
                source, otherwise = f"{path.parent}: {distinct} different training answers", ""
            raise DataError(
                f"{source}, but num_classes is {num_classes}, one of them for all other answers: set "
                f"ARGS=--data.init_args.num_classes={distinct + 1}{otherwise}"
            )
        return cls(words)


def _read_lines(path: Path) -> list[str]:
    """Read the answers of a file that has one per line.

    Raises:
        DataError: a line is blank, or holds a control character, which other programs may read as a line end; names it.
    """
    words = read_text(path).rstrip("\n").split("\n")
    for number, word in enumerate(words, start=1):
        if not word.strip() or CONTROL_CHARACTERS.search(word):
            raise DataError(f"{path}, line {number}: {word!r:.80} is not an answer; fix the file, or fetch it again")
    return words


@cache
def _warn_of_ties(path: Path, taken: int, different: int) -> None:
    """Warn once per process that the vocabulary is counted, not read (a run reads it several times)."""
    logger.warning(
        "%s is absent: the classes are the %d most frequent of %d training answers (num_classes - 1), ties in "
        "alphabetical order; where the file is distributed, a few of its classes may differ",
        path, taken, different,
    )  # fmt: skip


def _read_labels(path: Path) -> list[str]:
    """Read the answers of a JSON file {answer: class}, in the order of their classes."""
    labels = read_json(path)
    if not isinstance(labels, dict):
        raise DataError(f"{path}: holds {name_kind(labels)}: {explain_unsupported_format('{answer: class}')}")
    row = AnnotationRow(str(path), labels)
    for word in labels:
        if not word.strip() or CONTROL_CHARACTERS.search(word):
            raise DataError(f"{path}: {word!r:.80} is not an answer; fix the file, or fetch it again")
        if isinstance(labels[word], str) and word.isdigit():
            problem = explain_unsupported_format("{answer: class}")
            raise DataError(f"{path}: {{{word!r}: {labels[word]!r:.80}}}: {problem}")
    words = {row.field(int, word): word for word in labels}
    for label in range(len(labels)):
        if label not in words:
            raise DataError(
                f"{path}: none of {len(labels)} answers has class {label}: classes must be 0 to {len(labels) - 1}, "
                "each once; fetch it again"
            )
    return [words[label] for label in range(len(labels))]
