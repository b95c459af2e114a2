"""What is exported: a method with its vocabulary, answers and preprocessing."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cdc_mmpg.methods.answering import Answering

SPECIAL_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Source(NamedTuple):
    """A method and what its bundles need beside it."""

    method: "Answering"
    name: str  # <dataset>/<method>
    task: str
    answers: list[str]  # of the classes, with the word for all others; none of a multiple choice
    words: list[str]  # the vocabulary
    kept: list[int]  # places in it of the words that stay
    frames: dict[str, int]  # number, candidates, size, side
    text_length: int
