"""Source of an export: a method with its vocabulary, answers and preprocessing."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cdc_mmpg.methods.answering import Answering

SPECIAL_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Source(NamedTuple):
    """A method and the further data that its bundles need."""

    method: "Answering"
    name: str  # <dataset>/<method>
    task: str
    answers: list[str]  # answer of each class, then the one for unknown answers; empty for multiple choice
    words: list[str]  # vocabulary
    kept: list[int]  # indices in `words` of the words to keep
    frames: dict[str, int]  # number, candidates, size, side
    text_length: int
