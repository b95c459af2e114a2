"""The answer vocabulary: which answers have a class of their own."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from cdc_mmpg.batch import UNKNOWN
from cdc_mmpg.errors import DataError

logger = logging.getLogger(__name__)


def read_text(path: Path) -> str:
    """The text of an annotation file, with or without a byte order mark.

    Raises:
        DataError: not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8; save it as UTF-8, or fetch it again") from error


class Answers:
    """Answers with a class each; class number = line number in the file, and one class more for all others.

    Args:
        words: the known answers in the order of their classes.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._labels = {word: label for label, word in enumerate(words)}

    def label(self, answer: str) -> int:
        """The class of an answer, `UNKNOWN` outside the vocabulary."""
        return self._labels.get(answer, UNKNOWN)

    @classmethod
    def read(cls, path: Path, num_classes: int, training_answers: Iterable[str]) -> "Answers":
        """The distributed vocabulary, or, where it is absent, the most frequent training answers.

        Raises:
            DataError: the vocabulary does not hold num_classes - 1 different answers.
        """
        if path.is_file():
            words = read_text(path).splitlines()
        else:
            counts = Counter(training_answers)
            words = sorted(counts, key=lambda word: (-counts[word], word))[: num_classes - 1]
            logger.warning(
                "%s is absent: took the %d most frequent training answers instead, by alphabet where frequencies tie; "
                "the distributed file breaks ties in its own way, so a few classes may differ",
                path, len(words),
            )  # fmt: skip
        if len(set(words)) != num_classes - 1 or len(words) != num_classes - 1:
            raise DataError(
                f"{path}: {len(set(words))} different answers in {len(words)} lines, but num_classes is {num_classes} "
                f"(answers + 1): set --data.init_args.num_classes={len(set(words)) + 1}, or mend the file"
            )
        return cls(words)
