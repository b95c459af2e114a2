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
REMEDY = "use a local one with VOCAB=path/to/vocab.txt (30,522 lines for bert-base-uncased)"
BERT_VOCABULARY_SIZE = 30_522
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def count_wordpieces(vocab: str | Path | None) -> int:
    """Count the WordPieces in a `vocab.txt`; without one, those of bert-base-uncased."""
    if vocab is None or not Path(vocab).is_file():
        return BERT_VOCABULARY_SIZE
    return len(_read_words(vocab))


def _read_words(vocab: str | Path) -> list[str]:
    """Read the WordPieces of a `vocab.txt`, one per line.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        words = Path(vocab).read_bytes().decode().replace("\r\n", "\n").rstrip("\n").split("\n")
    except OSError as error:
        raise DataError(f"{vocab}: cannot be read ({error.strerror}); {REMEDY}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{vocab}, byte {error.start}: not UTF-8, so not a vocabulary; {REMEDY}") from error
    return words


def _check_lines(words: Sequence[str], vocab: str | Path) -> None:
    """Refuse a vocabulary with a blank or repeated line: the ids of the lines after it would be wrong.

    Raises:
        DataError: a line is blank or repeated; names it.
    """
    lines: dict[str, int] = {}
    for number, word in enumerate(words, start=1):
        if not word.strip() or word != word.rstrip() or lines.setdefault(word, number) != number:
            problem = f"repeats line {lines[word]}" if word in lines else "is not a WordPiece"
            raise DataError(f"{vocab}, line {number}: {word!r:.80} {problem}; {REMEDY}")


def build_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Build bert-base-uncased's tokenizer with another vocabulary: WordPieces by id."""
    tokenizer: Tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)._tokenizer
    return tokenizer


class TextEncoder:
    """A tokenizer of texts into ids, [CLS] first and [SEP] last, cut to a length.

    Args:
        vocab: a `vocab.txt`, one WordPiece per line, or a tokenizer; None downloads bert-base-uncased's from the hub.
        length: maximum number of tokens in a text, including [CLS] and [SEP].
        known: number of WordPieces at the start of the vocabulary that are known; others become [UNK]. None is all.

    Raises:
        DataError: the vocabulary is absent or invalid.
    """

    def __init__(self, vocab: str | Path | Tokenizer | None = None, length: int = 40, known: int | None = None) -> None:
        if vocab is None:
            logger.info("downloading the vocabulary of %s unless it is cached", HUB_NAME)
            try:
                self._tokenizer = Tokenizer.from_pretrained(HUB_NAME)
            except Exception as error:  # the hub's client raises many unrelated types of errors
                raise DataError(
                    f"cannot download the vocabulary of {HUB_NAME} ({type(error).__name__}): {REMEDY}"
                ) from error
        elif isinstance(vocab, Tokenizer):
            self._tokenizer = vocab
        else:
            if not Path(vocab).is_file():
                raise DataError(f"{vocab}: no such vocabulary; {REMEDY}")
            words = _read_words(vocab)
            if missing := [token for token in SPECIAL_TOKENS if token not in words]:
                raise DataError(f"{vocab}: not a WordPiece vocabulary, it lacks {' '.join(missing)}; {REMEDY}")
            _check_lines(words, vocab)
            self._tokenizer = build_tokenizer(words)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.length = length
        self._known, self._unknown = known or self._tokenizer.get_vocab_size(), 0
        self._cls, self._sep, (self._unknown,) = self._encode(["[CLS]", "[SEP]", "[UNK]"])

    def words(self) -> list[str]:
        """Return the vocabulary: WordPieces by id."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct words of texts that have an unknown WordPiece, in lower case."""
        words: dict[str, None] = {}  # keys in order of occurrence
        for text, encoding in zip(
            texts, self._tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            for i, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word is not None and (i >= self._known or i == self._unknown):
                    place = encoding.word_to_chars(word)
                    assert place is not None
                    words[text[slice(*place)].lower()] = None
        return list(words)

    def neutral(self) -> list[int]:
        """Return the ids of a prompt that serves as every question: [CLS], eight [MASK], [SEP]."""
        return self(["[MASK] " * 8])[0]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, cut but not padded."""
        return [[*self._cls, *ids[: self.length - 2], *self._sep] for ids in self._encode(texts)]

    def encode_choices(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[list[int]]]:
        """Return the ids of questions with each of their candidates: [CLS] question [SEP] candidate [SEP].

        Without a question, [CLS] candidate [SEP]. If that is too long, the end of the question is cut, down to half of
        the length; then the end of the candidate. If this makes two different candidates equal, their beginning is cut
        instead, so that they end with the first WordPiece that differs.

        Raises:
            DataError: `length` is too small to tell two different candidates apart.
        """
        questions = self._encode([question for question, _ in items])
        candidates = iter(self._encode([option for _, options in items for option in options]))
        encoded = []
        for (text, options), question in zip(items, questions, strict=True):
            option_ids = [next(candidates) for _ in options]
            room = self.length - 2 - bool(question)
            kept = question[: max(room - max(map(len, option_ids)), room // 2)]
            different = list(dict.fromkeys(map(tuple, option_ids)))
            windows = _find_windows(different, room - len(kept))
            if windows is None:
                raise DataError(
                    f"{text!r} with {list(options)}: within {self.length} WordPieces the candidates cannot be told "
                    "apart: shorten them, or train with a larger --data.init_args.text_length"
                )
            start = [*self._cls, *kept, *self._sep] if question else self._cls
            cut = dict(zip(different, windows, strict=True))
            encoded.append([[*start, *cut[tuple(ids)], *self._sep] for ids in option_ids])
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, uncut and without [CLS] and [SEP]."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[i if i < self._known else self._unknown for i in encoding.ids] for encoding in encodings]


def _find_windows(texts: Sequence[tuple[int, ...]], room: int) -> list[tuple[int, ...]] | None:
    """Find a window of `room` ids in each of several texts such that they stay different; None if impossible."""
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
    """Return ids and mask (B, L), padded with 0 at the end to the longest text."""
    ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask
