"""Questions as WordPiece ids: bert-base-uncased's tokenizer, from a local `vocab.txt` or from the hub."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer  # type: ignore[attr-defined]

from cdc_mmpg.errors import DataError

logger = logging.getLogger(__name__)

HUB_NAME = "google-bert/bert-base-uncased"
REMEDY = "give a local one with VOCAB=path/to/vocab.txt (30,522 lines for bert-base-uncased)"


BERT_SIZE = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary_size(vocab: str | Path | None) -> int:
    """WordPieces in a `vocab.txt`; bert-base-uncased's where none is given or the file is absent."""
    if vocab is None or not Path(vocab).is_file():
        return BERT_SIZE
    return len(_words(vocab))


def _words(vocab: str | Path) -> list[str]:
    """Return the WordPieces of a `vocab.txt`, a line each.

    Raises:
        DataError: it cannot be read.
    """
    try:
        words = Path(vocab).read_bytes().decode().replace("\r\n", "\n").rstrip("\n").split("\n")
    except OSError as error:
        raise DataError(f"{vocab}: cannot be read ({error.strerror}); {REMEDY}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{vocab}, byte {error.start}: not UTF-8, so no vocabulary; {REMEDY}") from error
    return words


def _check_lines(words: Sequence[str], vocab: str | Path) -> None:
    """Refuse a vocabulary in which a line is blank or stands twice: the ids of what follows would be those of others.

    Raises:
        DataError: names the line.
    """
    lines: dict[str, int] = {}
    for number, word in enumerate(words, start=1):
        if not word.strip() or word != word.rstrip() or lines.setdefault(word, number) != number:
            wrong = f"stands in line {lines[word]}, too" if word in lines else "is no WordPiece"
            raise DataError(f"{vocab}, line {number}: {word!r:.80} {wrong}; {REMEDY}")


class TextEncoder:
    """Texts -> ids and masks, [CLS] first and [SEP] last, cut to a length.

    Args:
        vocab: a `vocab.txt`, one WordPiece a line; None fetches bert-base-uncased from the hub.
        length: most tokens in a text, [CLS] and [SEP] included.
        known: how many WordPieces, the first of the vocabulary, the encoder knows; others become [UNK]. None is all.

    Raises:
        DataError: the vocabulary is absent, or is none.
    """

    def __init__(self, vocab: str | Path | None = None, length: int = 40, known: int | None = None) -> None:
        if vocab is None:
            logger.info("fetching the vocabulary of %s, unless it is there", HUB_NAME)
            try:
                self._tokenizer = Tokenizer.from_pretrained(HUB_NAME)
            except Exception as error:  # the hub's client raises errors of many families
                raise DataError(
                    f"cannot fetch the vocabulary of {HUB_NAME} ({type(error).__name__}): {REMEDY}"
                ) from error
        else:
            if not Path(vocab).is_file():
                raise DataError(f"{vocab}: no such vocabulary; {REMEDY}")
            words = _words(vocab)
            if missing := [token for token in SPECIAL if token not in words]:
                raise DataError(f"{vocab}: not a WordPiece vocabulary, it lacks {' '.join(missing)}; {REMEDY}")
            _check_lines(words, vocab)
            self._tokenizer = BertWordPieceTokenizer(str(vocab), lowercase=True)._tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.length = length
        self._known, self._unknown = known or self._tokenizer.get_vocab_size(), 0
        self._cls, self._sep, (self._unknown,) = self._whole(["[CLS]", "[SEP]", "[UNK]"])

    def words(self) -> list[str]:
        """The vocabulary, a WordPiece's place being its id."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """Return the words of texts of which a WordPiece is unknown, once each, in lower case."""
        found: dict[str, None] = {}
        for text, encoding in zip(
            texts, self._tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            for i, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word is not None and (i >= self._known or i == self._unknown):
                    place = encoding.word_to_chars(word)
                    assert place is not None
                    found[text[slice(*place)].lower()] = None
        return list(found)

    def neutral(self) -> list[int]:
        """A question that asks for nothing: [CLS], eight [MASK], [SEP]. With it, one anchor serves all questions."""
        return self(["[MASK] " * 8])[0]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, unpadded."""
        return [[*self._cls, *ids[: self.length - 2], *self._sep] for ids in self._whole(texts)]

    def choices(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[list[int]]]:
        """The ids of questions with their candidates: [CLS] question [SEP] candidate [SEP], for every candidate.

        Without a question, [CLS] candidate [SEP]. Where they are too long together, the question loses its end, down to
        half of the room; then a candidate its end, too. Where that would make two different ones equal, both begin
        later, so that they end with the first word that tells them apart.

        Raises:
            DataError: there is no room, or two different candidates cannot be told apart in it.
        """
        questions = self._whole([question for question, _ in items])
        candidates = iter(self._whole([option for _, options in items for option in options]))
        found = []
        for (text, options), question in zip(items, questions, strict=True):
            own = [next(candidates) for _ in options]
            room = self.length - 2 - bool(question)
            kept = question[: max(room - max(map(len, own)), room // 2)]
            different = list(dict.fromkeys(map(tuple, own)))
            windows = _windows(different, room - len(kept))
            if windows is None:
                raise DataError(
                    f"{text!r} with {list(options)}: in {self.length} WordPieces its candidates cannot be told apart; "
                    "raise --data.init_args.text_length"
                )
            start = [*self._cls, *kept, *self._sep] if question else self._cls
            cut = dict(zip(different, windows, strict=True))
            found.append([[*start, *cut[tuple(text)], *self._sep] for text in own])
        return found

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, neither cut nor marked."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[i if i < self._known else self._unknown for i in encoding.ids] for encoding in encodings]


def _windows(texts: Sequence[tuple[int, ...]], room: int) -> list[tuple[int, ...]] | None:
    """Of each of different texts `room` ids, such that they stay different; None where that fails."""
    starts = [0] * len(texts)
    for _ in range(len(texts) ** 2 + 1):
        windows = [text[start : start + room] for text, start in zip(texts, starts, strict=True)]
        equal = [(i, j) for j in range(len(texts)) for i in range(j) if windows[i] == windows[j]]
        if not equal:
            return windows
        i, j = equal[0]
        common = next(
            (place for place, (a, b) in enumerate(zip(texts[i], texts[j], strict=False)) if a != b),
            min(len(texts[i]), len(texts[j])),
        )
        starts[i] = starts[j] = max(0, common - room + 1)
    return None


def pad(texts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask (B, L), padded with 0 at the end to the longest text."""
    ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask
