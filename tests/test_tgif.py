"""TGIF-QA in both file conventions: samples, held-out validation, vocabularies, and refused files."""

import json
import logging
import shutil

import pytest

from cdc_mmpg.errors import DataError
from communities import TGIF_TEST, TGIF_TRAIN, TGIF_VAL, build_small, write_tgif
from conftest import ANSWERS, write_clip
from data_modules.checks import find_shared_clips
from data_modules.tgif_qa import TGIFAction, TGIFFrameQA, TGIFTransition, is_held_out

KINDS = {"frameqa": TGIFFrameQA, "action": TGIFAction, "transition": TGIFTransition}
HELD_OUT = ["tumblr_n17o1_250", "tumblr_n18o1_250"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Read-only folders by task and convention."""
    root = tmp_path_factory.mktemp("tgif")
    return {
        (part, convention): write_tgif(root / f"{part}-{convention}", part, convention)
        for part in KINDS
        for convention in ("csv", "clipbert")
    }


def build_data(root, part="frameqa", **arguments):
    return build_small(KINDS[part], root, num_classes=6 if part == "frameqa" else None, **arguments)


@pytest.fixture
def copy_folder(folders, tmp_path):
    """Function that returns a writable copy of a task's folder."""

    def copy(part="frameqa", convention="csv"):
        return shutil.copytree(folders[part, convention], tmp_path / part)

    return copy


def change(path, old, new):
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())


def test_both_conventions_give_the_same_samples(folders):
    for part in KINDS:
        tables, lines = (build_data(folders[part, convention], part) for convention in ("csv", "clipbert"))
        training_samples = sorted(
            [*tables.samples("train"), *tables.samples("val")], key=lambda s: TGIF_TRAIN.index(s.clip)
        )
        assert [sample._replace(id="") for sample in training_samples] == lines.samples("train")
        assert [sample.clip for sample in tables.samples("test")] == [name for name in TGIF_TEST for _ in range(2)]
        assert {sample.clip for sample in lines.samples("val")} == set(TGIF_VAL)


def test_questions_have_types(folders):
    first, second, *_ = build_data(folders["frameqa", "csv"]).samples("train")
    assert first == ("tumblr_n0o1_250", "what is the man doing 0 ?", "red", "object", (), 0, "FRAMEQA0")
    assert (second.answer, second.type) == ("green", "number")


def test_candidates_and_correct_options_are_read(folders):
    samples = build_data(folders["action", "csv"], "action").samples("train")
    assert samples[1].options == tuple(ANSWERS[1:] + ANSWERS[:1])
    assert [sample.right for sample in samples[:6]] == [0, 1, 2, 3, 4, 0]
    assert {sample.type for sample in samples} == {""}


def test_validation_is_held_out_by_a_hash_of_the_clip_name(folders, caplog):
    caplog.set_level(logging.INFO)
    assert [name for name in TGIF_TRAIN if is_held_out(name)] == HELD_OUT
    data = build_data(folders["frameqa", "csv"])
    assert [sample.clip for sample in data.samples("val")] == [name for name in HELD_OUT for _ in range(2)]
    assert not {sample.clip for sample in data.samples("train")} & set(HELD_OUT)
    assert len(data.samples("train")) == 2 * (len(TGIF_TRAIN) - len(HELD_OUT))
    assert "held out 2 of 20 training GIFs by a hash of their name, with 4 of 40 questions" in caplog.text
    assert not find_shared_clips(data, ("train", "val", "test"))


def test_about_a_tenth_is_held_out():
    assert sum(is_held_out(f"tumblr_{number}") for number in range(10_000)) == 1025  # fails if the rule changes


def test_training_file_without_held_out_clips_is_refused(copy_folder):
    root = copy_folder()
    path = root / "Train_frameqa_question.csv"
    path.write_text("\n".join(line for line in path.read_text().split("\n") if not any(n in line for n in HELD_OUT)))
    with pytest.raises(DataError, match=r"no training GIF is in split val.*add frameqa_val\.jsonl"):
        build_data(root).samples("val")


@pytest.mark.parametrize("folder", ["dataset", "annotations"])
def test_annotations_are_found_in_subfolders(copy_folder, folder):
    root = copy_folder()
    for path in [*root.glob("*.csv")]:
        (root / folder).mkdir(exist_ok=True)
        path.rename(root / folder / path.name)
    assert len(build_data(root).samples("test")) == 8


def test_other_file_names_and_keys_are_accepted(copy_folder):
    root = copy_folder("action", "clipbert")
    for split, key in (("train", "video_id"), ("val", "clip_name")):
        path = root / f"action_{split}.jsonl"
        path.write_text(path.read_text().replace('"gif_name"', f'"{key}"'))
        path.rename(root / f"tgif_action_{split}.jsonl")
    data = build_data(root, "action")
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [40, 4, 8]


def test_vocabulary_includes_the_held_out_training_answers(copy_folder, caplog):
    root = copy_folder()
    held_out_row = "tumblr_n17o1_250\twhat is the man doing 1 ?\t"
    change(root / "Train_frameqa_question.csv", f"{held_out_row}dog", f"{held_out_row}owl")
    data = build_small(TGIFFrameQA, root, num_classes=7)
    answers = data.read_answers([sample.answer for sample in data.samples("train")])
    assert sorted(answers.words) == sorted([*ANSWERS, "owl"])
    assert "is absent" not in caplog.text  # every training answer is a class
    build_small(TGIFFrameQA, root, num_classes=6).read_answers([sample.answer for sample in data.samples("train")])
    assert "frameqa_trainval_ans2label.json is absent: the classes are the 5 most frequent of 6" in caplog.text
    (root / "dataset").mkdir()
    for name in ("train_ans2label.json", "frameqa_train_ans2label.json", "dataset/frameqa_trainval_ans2label.json"):
        (root / name).write_text(json.dumps({name: 1, "red": 0}))
    assert build_small(TGIFFrameQA, root, num_classes=3).read_answers([]).words == [
        "red",
        "frameqa_train_ans2label.json",
    ]


@pytest.mark.parametrize(
    ("part", "convention", "old", "new", "message"),
    [
        ("frameqa", "csv", "tumblr_t1o1_250\t", "", r"Test_frameqa_question\.csv, line 4: 6 fields where .* 7"),
        ("frameqa", "csv", "gif_name\t", "gif\t", r"Test_frameqa_question\.csv, line 1: no column gif_name"),
        (
            "frameqa",
            "csv",
            "\t0\tFRAMEQA40",
            "\t4\tFRAMEQA40",
            r"csv, line 2: type or answer_type is '4', not .* 0 to 3",
        ),
        ("frameqa", "csv", "tumblr_t1o1_250", "../t", r"csv, line 4: gif_name or video_id or clip_name is '\.\./t'"),
        ("frameqa", "clipbert", "tumblr_t1o1_250", "../t", r"jsonl, line 3: gif_name .*is '\.\./t'"),
        (
            "frameqa",
            "clipbert",
            '"answer": "red"',
            '"answer": 7',
            r"frameqa_test\.jsonl, line \d: answer is 7, not a text",
        ),
        ("frameqa", "clipbert", '"question"', '"frage"', r"frameqa_test\.jsonl, line 1: question is missing"),
        ("frameqa", "clipbert", '"color"', '"colour"', r"line 3: type or answer_type is 'colour'"),
        (
            "action",
            "csv",
            "\t0\tACTION40",
            "\t5\tACTION40",
            r"csv, line 2: answer is '5', not a whole number from 0 to 4",
        ),
        ("action", "csv", "\t0\tACTION40", "\t-1\tACTION40", r"csv, line 2: answer is '-1', not a whole number"),
        ("action", "csv", "\ta5\t", "\ta6\t", r"csv, line 1: no column a5"),
        ("transition", "clipbert", '"answer": 0', '"answer": 5', r"jsonl, line 1: answer is 5, not a whole number"),
        ("transition", "clipbert", '"dog"]', '"dog", "x"]', r"jsonl, line 1: options is .* not a list of 5 texts"),
    ],
)
def test_damaged_annotations_are_refused_with_file_and_line(copy_folder, part, convention, old, new, message):
    root = copy_folder(part, convention)
    name = f"Test_{part}_question.csv" if convention == "csv" else f"{part}_test.jsonl"
    change(root / name, old, new)
    with pytest.raises(DataError, match=message):
        build_data(root, part).samples("test")


def test_absent_files_are_named_with_the_remedy(copy_folder):
    root = copy_folder()
    (root / "Train_frameqa_question.csv").unlink()
    with pytest.raises(DataError, match=r"frameqa_train\.jsonl, Train_frameqa_question\.csv.*\n.*belongs below"):
        build_data(root).samples("train")
    shutil.rmtree(root / "gifs")
    with pytest.raises(DataError, match=r"gifs: no GIFs found\n.*non-commercial"):
        build_data(root).find_clips()


def test_gifs_or_converted_clips_are_found(copy_folder):
    root = copy_folder()
    write_clip(root / "gifs" / f"{TGIF_TEST[0]}.mp4")
    (root / "gifs" / f"{TGIF_TEST[1]}.gif").unlink()
    write_clip(root / "gifs" / f"{TGIF_TEST[1]}.mp4")
    clips = build_data(root).find_clips()
    assert clips.keys() == {*TGIF_TRAIN, *TGIF_TEST}
    assert [clips[name].suffix for name in TGIF_TEST[:2]] == [".gif", ".mp4"]


def test_real_files_are_read_at_their_published_counts(real, tmp_path):
    counts = {}
    for part, kind in KINDS.items():
        data = kind(str(real / "tgif"), str(tmp_path), 1541 if part == "frameqa" else None)
        samples = data.samples("test")
        counts[part] = len(samples)
        published = data.PUBLISHED["official"]["test"]["questions"]
        assert len(samples) == published
        assert {sample.right for sample in samples} == ({0} if part == "frameqa" else {0, 1, 2, 3, 4})
        assert len(data.find_clips()) == 2
        if part == "frameqa":
            assert {sample.type for sample in samples} == {"object", "number", "color", "location"}
        if part == "transition":
            assert sum('respond "no"' in sample.options for sample in samples) == 1
    assert counts == {"frameqa": 13_691, "action": 2_274, "transition": 6_232}
