"""Tokenization into WordPieces: truncation with expected results written by hand, unknown words, vocabularies."""

from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg.errors import DataError
from cdc_mmpg.media.text import TextEncoder, count_wordpieces, pad

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl", "word", "##s"]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def spell(ids: list[int]) -> str:
    """Return the WordPieces, with [CLS] as < and [SEP] as >."""
    return " ".join(WORDS[i] for i in ids).replace("[CLS]", "<").replace("[SEP]", ">")


def test_long_texts_keep_their_beginning(vocab):
    encoder = TextEncoder(vocab, 5)
    assert [spell(ids) for ids in encoder(["a b c d", "", "A b", "a zebra words"])] == [
        "< a b c >", "< >", "< a b >", "< a [UNK] word >"
    ]  # fmt: skip
    assert [spell(ids) for ids in TextEncoder(vocab)(["words " * 30])] == [" ".join(["<", *["word ##s"] * 19, ">"])]
    assert TextEncoder(vocab).words() == WORDS
    assert TextEncoder(vocab).neutral() == [2, 4, 4, 4, 4, 4, 4, 4, 4, 3]


def test_words_beyond_the_known_vocabulary_become_unk(vocab):
    assert [spell(ids) for ids in TextEncoder(vocab, 9, known=7)(["a b c", "[MASK] a"])] == [
        "< a b [UNK] >",
        "< [MASK] a >",
    ]


def test_unknown_words_are_listed_once(vocab):
    encoder = TextEncoder(vocab, known=7)  # [PAD] to [MASK], a, b
    assert encoder.unknown_words(["a Zebra b, zebra", "c words?"]) == ["zebra", ",", "c", "words", "?"]
    assert TextEncoder(vocab).unknown_words(["a c words"]) == []


@pytest.mark.parametrize(
    ("length", "question", "options", "expected"),
    [
        (9, "a b c", ["d e", "f"], ["< a b c > d e >", "< a b c > f >"]),
        (8, "a b c d e", ["f g", "h"], ["< a b c > f g >", "< a b c > h >"]),  # the longest candidate needs two
        (8, "a b c d e", ["f g h i", "j"], ["< a b > f g h >", "< a b > j >"]),  # half of it for the question
        (8, "a", ["b c d e f g", "h"], ["< a > b c d e >", "< a > h >"]),
        (6, "", ["a b c d e", "f"], ["< a b c d >", "< f >"]),
        # Truncation would make two equal: both start later, so that they end with the first word that differs.
        (6, "", ["a b c d e", "a b c d f", "g"], ["< b c d e >", "< b c d f >", "< g >"]),
        (6, "", ["a b c d e f", "a b c d", "a b c d e g"], ["< b c d e >", "< b c d >", "< a b c d >"]),
        (7, "i j k", ["a b c", "a b d", "a b c"], ["< i j > b c >", "< i j > b d >", "< i j > b c >"]),
    ],
)
def test_question_and_candidates_are_truncated_to_stay_distinct(vocab, length, question, options, expected):
    encoder = TextEncoder(vocab, length)
    encoded = encoder.encode_choices([("", ["a"]), (question, options)])
    assert [spell(ids) for ids in encoded[1]] == expected
    assert [spell(ids) for ids in encoded[0]] == ["< a >"]


def test_candidates_without_room_are_refused(vocab):
    with pytest.raises(DataError, match=r"'a'.*\['b', 'c'\].*in 3 WordPieces.*text_length"):
        TextEncoder(vocab, 3).encode_choices([("a", ["b", "c"])])


def test_texts_of_a_batch_are_padded_to_the_longest():
    ids, mask = pad([[2, 5, 3], [2, 3], [2, 6, 7, 3]])
    np.testing.assert_array_equal(ids, [[2, 5, 3, 0], [2, 3, 0, 0], [2, 6, 7, 3]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert ids.dtype == mask.dtype == np.int64


def test_wordpieces_of_a_vocabulary_are_counted(vocab, tmp_path):
    assert count_wordpieces(vocab) == len(WORDS)
    assert count_wordpieces(None) == count_wordpieces(tmp_path / "absent.txt") == 30_522
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    for read in (count_wordpieces, TextEncoder):
        with pytest.raises(DataError, match=r"latin\.txt, byte 3: not UTF-8"):
            read(latin)


@pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
def test_vocabulary_without_a_special_word_is_refused(tmp_path, missing):
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in WORDS if word != missing))
    with pytest.raises(DataError, match=rf"not a WordPiece vocabulary, it lacks \{missing[:-1]}\]; use a local one"):
        TextEncoder(tmp_path / "vocab.txt")
    with pytest.raises(DataError, match="no such vocabulary"):
        TextEncoder(tmp_path / "absent.txt")
