"""Reading annotation files: damage is refused with file and place, unusual but valid input is read."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from cdc_mmpg.errors import DataError
from cdc_mmpg.results import hash_annotations
from data_modules.annotations import (
    AnnotationRow,
    choose_file,
    find_file,
    is_outside_folder,
    list_clips,
    read_json,
    read_json_lines,
    read_json_list,
    read_question_type,
    read_table,
    read_text,
)
from data_modules.answers import Answers


def test_text_is_read_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "file"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + "é\r\n".encode())
        assert read_text(path) == "é\n"


@pytest.mark.parametrize(
    "reader", [read_text, read_json, read_json_list, read_json_lines, lambda path: read_table(path, [])]
)
def test_other_encodings_are_refused(tmp_path, reader):
    path = tmp_path / "rows"
    path.write_bytes('[{"caption": "é"}]'.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows, byte 0: not UTF-8"):
        reader(path)
    path.write_bytes('{"caption": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows, byte 13: not UTF-8"):
        reader(path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a"', r"rows, line 2, column 6: "),
        ("", r"rows, line 1, column 1"),
        ('{"a": 1}', r"rows: the file is an object of a: unsupported format, expected a list of objects"),
        ("[]", r"rows: the file is an empty list"),
        ("null", r"rows: the file is null: unsupported format"),
        ('[{"a": 1}, 7]', r"rows: \[1\] is 7, not an object"),
        ("[" * 100_000, r"rows: nested too deeply"),
        (f"[{'9' * 5_000}]", r"rows: .*digits"),
        ('[{"a": 1, "b": 2, "a": 3}]', r"rows: the key 'a' occurs twice"),
        ('[{"a": NaN}]', r"rows: NaN is not valid JSON"),
        ('{"a": 1}\n{"a": 2}\n', r"rows: this is JSON lines, one object per line: unsupported format"),
        ("<!DOCTYPE html>\n<html>", r"rows: this is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"rows: this is a Git LFS pointer"),
        ("a\tb\n1\t2\n", r"rows: this is a TAB-separated table"),
    ],
)
def test_damaged_json_is_refused(tmp_path, content, message):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(DataError, match=message):
        read_json_list(tmp_path / "rows")


def test_json_lines_report_their_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\r\n{"a": "one\u2028two"}\r\n\r\n{"a": 2}'.encode())  # U+2028 does not end a line
    rows = read_json_lines(path)
    assert [row.place for row in rows] == [f"{path}, line 2", f"{path}, line 4"]
    assert [row.value("a") for row in rows] == ["one\u2028two", 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": ', r"rows, line 2, column 7: "),
        ('{"a": 1}\n\n[1]\n', r"rows, line 3: \[1\] is not an object"),
        ("\n\n", r"rows: empty"),
        ('{"a": 1} {"a": 2}', r"rows, line 1, column 10"),
        ('[{"a": 1},\n{"a": 2}]', r"rows: this is a JSON list: unsupported format, expected JSON lines"),
        ("a,b\n1,2\n", r"rows: this is a comma-separated table: unsupported format"),
        ("{}\n" + "[" * 100_000, r"rows, line 2: nested too deeply"),
    ],
)
def test_damaged_json_lines_are_refused(tmp_path, content, message):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(DataError, match=message):
        read_json_lines(tmp_path / "rows")


@pytest.mark.parametrize("line_ending", ["\n", "\r\n"])
def test_tables_are_read_with_either_line_ending(tmp_path, line_ending):
    path = tmp_path / "rows.csv"
    path.write_text(line_ending.join(["id,text", '1,"a, ""b"""', "", "2,c"]) + line_ending, newline="")
    rows = read_table(path, ["text"])
    assert [row.fields for row in rows] == [{"id": "1", "text": 'a, "b"'}, {"id": "2", "text": "c"}]
    assert [row.place for row in rows] == [f"{path}, line 2", f"{path}, line 4"]


def test_a_stray_quote_does_not_swallow_rows(tmp_path):
    path = tmp_path / "rows.csv"
    values = ['"bare', 'in "the" middle', '"whole ""one"""', '"two" and "two"', '"', "it's 5\""]
    path.write_text("id\ttext\r\n" + "".join(f"{i}\t{value}\r\n" for i, value in enumerate(values)), newline="")
    rows = read_table(path, ["text"], "\t")
    expected = ['"bare', 'in "the" middle', 'whole "one"', '"two" and "two"', '"', "it's 5\""]
    assert [row.value("text") for row in rows] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n2\n", r"rows, line 3: 1 fields where the header has 2"),
        ("id,text\n1,a,b\n", r"rows, line 2: 3 fields where the header has 2"),
        (
            "id,texts\n1,a\n",
            r"rows, line 1: no column text in the header \(id, texts\): "
            r"unsupported format, expected the columns id, text;",
        ),
        (
            '[{"id": 1, "text": "a"}]',
            r"rows: this is a JSON list: unsupported format, expected a comma-separated table",
        ),
        (
            "id\ttext\n1\ta\n",
            r"rows: this is a TAB-separated table: unsupported format, expected a comma-separated table",
        ),
        ("id,text\n", r"rows: no rows"),
        ("", r"rows: no rows"),
        ('id,text\n1,a\n2,"cut', r"rows, line 3: unexpected end of data"),
        ('id,text\n1,"a" b\n', r"rows, line 2: .*expected after"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, content, message):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "rows", ["id", "text"])


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda row: row.field(str, "absent"), r"f, line 3: absent is missing, found only .*, or convert it"),
        (lambda row: row.field(int, "text"), r"f, line 3: text is 'yes', not an integer"),
        (lambda row: row.field(int, "truth"), r"truth is True, not an integer"),
        (lambda row: row.field(str, "half"), r"half is '\\ud800', not text"),
        (lambda row: row.field(str, "absent", "number"), r"absent or number is 7, not a text"),
        (lambda row: row.texts(2, "text"), r"text is 'yes', not a list of 2 texts"),
        (lambda row: row.texts(3, "list"), r"list is \['a', 'b'\], not a list of 3 texts"),
        (lambda row: row.texts(2, "mixed"), r"mixed is \['a', 2\], not a list of 2 texts"),
        (lambda row: row.index_below(7, "number"), r"number is 7, not a whole number from 0 to 6"),
        (lambda row: row.index_below(5, "text"), r"text is 'yes', not a whole number"),
        (lambda row: row.index_below(5, "truth"), r"truth is True, not a whole number"),
        (lambda row: row.index_below(5, "minus"), r"minus is '-1', not a whole number"),
        (lambda row: row.line("lines"), r"lines is 'a\\nb', not a text on one line"),
        (lambda row: row.line("separated"), r"separated is 'a\\u2028b', not a text on one line"),
        (lambda row: row.clip("out"), r"out is '\.\./x', not a plain file name"),
    ],
)
def test_wrong_fields_are_refused(read, message):
    fields = {"text": "yes", "number": 7, "truth": True, "half": "\ud800", "list": ["a", "b"], "mixed": ["a", 2],
              "minus": "-1", "out": "../x", "lines": "a\nb", "separated": "a\u2028b"}  # fmt: skip
    with pytest.raises(DataError, match=message):
        read(AnnotationRow("f, line 3", fields))


def test_valid_fields_are_read():
    row = AnnotationRow("f: [0]", {"text": "é", "number": 4, "digits": "4", "list": ["a", "b"], "clip": "-aB_0_5"})
    assert (row.field(str, "nothing", "text"), row.field(int, "number")) == ("é", 4)
    assert (row.index_below(5, "number"), row.index_below(5, "digits")) == (4, 4)
    assert (row.texts(2, "list"), row.clip("clip")) == (("a", "b"), "-aB_0_5")


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "", ".", ".."])
def test_names_that_lead_outside_the_folder_are_recognized(name):
    assert is_outside_folder(name)
    assert not is_outside_folder(f"x{name}".replace("/", "").replace("\\", ""))


def test_question_types_are_read_or_derived_from_the_first_word():
    untyped_row = AnnotationRow("f", {})
    questions = ["What is it?", "who's there", " HOW many", "when", "where to", "whose is it", "", "?"]
    types = ["what", "who", "how", "when", "where", "other", "other", "other"]
    assert [read_question_type(untyped_row, question) for question in questions] == types
    assert read_question_type(AnnotationRow("f", {"type": "colour"}), "what?") == "colour"
    assert read_question_type(AnnotationRow("f", {"answer_type": "who"}), "what?") == "who"
    with pytest.raises(DataError, match="type is 3"):
        read_question_type(AnnotationRow("f", {"type": 3}), "what?")


def test_the_first_existing_file_is_chosen(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    assert find_file(paths) is None
    with pytest.raises(DataError, match=r"a\.json: no such file, nor b\.json, c\.json\nget it there"):
        choose_file(paths, "get it there")
    with pytest.raises(DataError, match=r"a\.json: no such file\nget"):
        choose_file(paths[:1], "get it there")
    for path in paths[1:]:
        path.touch()
    assert choose_file(paths, "") == find_file(paths) == paths[1]
    assert f"reading {paths[1]}" in caplog.text


def test_clips_of_a_folder_are_listed_by_name(tmp_path):
    for name in ("a.avi", "a.mp4", "b.MP4", "c.txt", "d.mp4.part"):
        (tmp_path / name).touch()
    (tmp_path / "e.mp4").mkdir()
    (tmp_path / "f.mp4").symlink_to(tmp_path / "gone")
    (tmp_path / "g.mp4").symlink_to(tmp_path / "g.mp4")  # a link to itself
    (tmp_path / "h.mp4").symlink_to("x" * 300)
    clips = list_clips(tmp_path, (".avi", ".mp4"))
    assert clips == {"a": tmp_path / "a.avi", "b": tmp_path / "b.MP4"}
    assert list_clips(tmp_path, (".mp4", ".avi"))["a"] == tmp_path / "a.mp4"
    assert list_clips(tmp_path / "gone", (".mp4",)) == {}


def test_a_vocabulary_comes_from_a_file_or_from_the_most_frequent_answers(tmp_path):
    path = tmp_path / "answers.txt"
    training = ["red", "blue", "blue", "dog", "dog", "dog", "cat", "ant"]
    assert Answers.read(path, 4, training).words == ["dog", "blue", "ant"]  # ties are in alphabetical order
    with pytest.raises(
        DataError, match=rf"{tmp_path}: 5 different training answers, but num_classes is 7.*num_classes=6$"
    ):
        Answers.read(path, 7, training)
    path.write_text("red\ngreen\n")
    with pytest.raises(DataError, match=r"answers\.txt: 2 different answers, but .*num_classes=3, or fix the file"):
        Answers.read(path, 4, training)
    answers = Answers.read(path, 3, training)
    assert (answers.words, answers.label("red"), answers.label("green"), answers.label("blue")) == (
        ["red", "green"], 0, 1, -100
    )  # fmt: skip
    path.write_text("red\ngreen\nred\n")
    for classes in (3, 4):
        with pytest.raises(DataError, match=r"answers\.txt: 2 different answers in 3 lines: remove the repeated"):
            Answers.read(path, classes, training)


@pytest.fixture
def unprivileged():
    """Yield a folder that every user may write, while the test runs as an unprivileged user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    yield folder
    if privileged:
        os.seteuid(0)
    folder.chmod(0o777)
    shutil.rmtree(folder)


def test_unreadable_annotation_files_are_refused_by_name(unprivileged):
    folder = unprivileged / "clips"
    folder.mkdir()
    (folder / "a.mp4").touch()
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match=rf"{folder}: cannot be read \(Permission denied\)"):
            list_clips(folder, (".mp4",))
        with pytest.raises(DataError, match=r"a\.mp4: cannot be read \(Permission denied\)"):
            find_file([folder / "a.mp4"])
        folder.chmod(0o777)
        (folder / "train_qa.json").write_text("[]")
        (folder / "train_qa.json").chmod(0)
        with pytest.raises(DataError, match=r"train_qa\.json: cannot be read \(Permission denied\)"):
            hash_annotations(folder)
    finally:
        folder.chmod(0o777)


@pytest.mark.parametrize(
    ("content", "line"), [("red\nblue\x85green\n", 2), ("red\n\nblue\n", 2), ("a\tb\nred\nblue\n", 1)]
)
def test_vocabulary_lines_that_would_shift_the_classes_are_refused(content, line, tmp_path):
    """`str.splitlines` ends a line at more characters than other readers of vocabularies do."""
    path = tmp_path / "answer_set.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"answer_set\.txt, line {line}: .* is not an answer"):
        Answers.read(path, 4, [])


def test_blank_lines_at_the_end_of_a_vocabulary_are_ignored(tmp_path):
    (tmp_path / "answer_set.txt").write_text("red\nblue\n\n\n")
    assert Answers.read(tmp_path / "answer_set.txt", 3, []).words == ["red", "blue"]


def test_a_vocabulary_is_read_from_a_label_file(tmp_path):
    path = tmp_path / "train_ans2label.json"
    path.write_text(json.dumps({"red": 2, "blue": 0, "green": 1}))
    answers = Answers.read(path, 4, [])
    assert answers.words == ["blue", "green", "red"]
    assert [answers.label(word) for word in ("red", "blue", "dog")] == [2, 0, -100]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"red": 1, "blue": 1, "green": 0}, r"none of 3 answers has class 2"),
        ({"red": 1, "blue": 2, "green": 3}, r"none of 3 answers has class 0"),
        ({"red": 0, "blue": -1, "green": 1}, r"none of 3 answers has class 2"),
        ({"red": 0, "blue": "1", "green": 2}, r"blue is '1', not an integer"),
        (["red", "blue", "green"], r"holds a list: unsupported format, expected \{answer: class\}"),
        ({"0": "red", "1": "blue", "2": "green"}, r"\{'0': 'red'\}: unsupported format, expected \{answer: class\}"),
        ({"red": 0, "blue\ngreen": 1, "man": 2}, r"'blue\\ngreen' is not an answer"),
        ({"red": 0, "blue": 1}, r"2 different answers.*num_classes=3"),
    ],
)
def test_damaged_label_files_are_refused(tmp_path, labels, message):
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(DataError, match=rf"labels\.json.*{message}"):
        Answers.read(tmp_path / "labels.json", 4, [])
