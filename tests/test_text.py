"""Texts as WordPieces: what is kept where there is too little room, by hand."""

from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg.errors import DataError
from cdc_mmpg.media.text import TextEncoder, pad, vocabulary_size

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl", "word", "##s"]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def spelled(ids: list[int]) -> str:
    """The pieces, [CLS] as < and [SEP] as >."""
    return " ".join(WORDS[i] for i in ids).replace("[CLS]", "<").replace("[SEP]", ">")


def test_a_text_keeps_its_beginning(vocab):
    encoder = TextEncoder(vocab, 5)
    assert [spelled(ids) for ids in encoder(["a b c d", "", "A b", "a zebra words"])] == [
        "< a b c >", "< >", "< a b >", "< a [UNK] word >"
    ]  # fmt: skip
    assert [spelled(ids) for ids in TextEncoder(vocab)(["words " * 30])] == [" ".join(["<", *["word ##s"] * 19, ">"])]
    assert TextEncoder(vocab).words() == WORDS
    assert TextEncoder(vocab).neutral() == [2, 4, 4, 4, 4, 4, 4, 4, 4, 3]


def test_words_that_the_encoder_does_not_know_are_unknown(vocab):
    assert [spelled(ids) for ids in TextEncoder(vocab, 9, known=7)(["a b c", "[MASK] a"])] == [
        "< a b [UNK] >",
        "< [MASK] a >",
    ]


def test_unknown_words_are_named_once_as_they_were_written(vocab):
    encoder = TextEncoder(vocab, known=7)  # [PAD] to [MASK], a, b
    assert encoder.unknown_words(["a Zebra b, zebra", "c words?"]) == ["zebra", ",", "c", "words", "?"]
    assert TextEncoder(vocab).unknown_words(["a c words"]) == []


@pytest.mark.parametrize(
    ("length", "question", "options", "expected"),
    [
        (9, "a b c", ["d e", "f"], ["< a b c > d e >", "< a b c > f >"]),
        (8, "a b c d e", ["f g", "h"], ["< a b c > f g >", "< a b c > h >"]),  # the longest candidate needs two
        (8, "a b c d e", ["f g h i", "j"], ["< a b > f g h >", "< a b > j >"]),  # half of the room is the question's
        (8, "a", ["b c d e f g", "h"], ["< a > b c d e >", "< a > h >"]),
        (6, "", ["a b c d e", "f"], ["< a b c d >", "< f >"]),
        # Equal where they are cut: both begin later, to end with the first word that differs.
        (6, "", ["a b c d e", "a b c d f", "g"], ["< b c d e >", "< b c d f >", "< g >"]),
        (6, "", ["a b c d e f", "a b c d", "a b c d e g"], ["< b c d e >", "< b c d >", "< a b c d >"]),
        (7, "i j k", ["a b c", "a b d", "a b c"], ["< i j > b c >", "< i j > b d >", "< i j > b c >"]),
    ],
)
def test_truncation_of_question_and_candidates(vocab, length, question, options, expected):
    encoder = TextEncoder(vocab, length)
    two = encoder.choices([("", ["a"]), (question, options)])
    assert [spelled(ids) for ids in two[1]] == expected
    assert [spelled(ids) for ids in two[0]] == ["< a >"]


def test_candidates_without_room_are_refused(vocab):
    with pytest.raises(DataError, match=r"'a'.*\['b', 'c'\].*in 3 WordPieces.*text_length"):
        TextEncoder(vocab, 3).choices([("a", ["b", "c"])])


def test_texts_of_a_batch_are_padded_to_the_longest():
    ids, mask = pad([[2, 5, 3], [2, 3], [2, 6, 7, 3]])
    np.testing.assert_array_equal(ids, [[2, 5, 3, 0], [2, 3, 0, 0], [2, 6, 7, 3]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert ids.dtype == mask.dtype == np.int64


def test_the_size_of_a_vocabulary(vocab, tmp_path):
    assert vocabulary_size(vocab) == len(WORDS)
    assert vocabulary_size(None) == vocabulary_size(tmp_path / "absent.txt") == 30_522
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    for read in (vocabulary_size, TextEncoder):
        with pytest.raises(DataError, match=r"latin\.txt, byte 3: not UTF-8"):
            read(latin)


@pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
def test_files_that_are_no_vocabulary_are_refused(tmp_path, missing):
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in WORDS if word != missing))
    with pytest.raises(DataError, match=rf"not a WordPiece vocabulary, it lacks \{missing[:-1]}\]; give a local one"):
        TextEncoder(tmp_path / "vocab.txt")
    with pytest.raises(DataError, match="no such vocabulary"):
        TextEncoder(tmp_path / "absent.txt")
