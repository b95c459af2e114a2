"""MSR-VTT's three tasks in every annotation format: files read, items generated, damage refused."""

import itertools
import json
import logging
import shutil

import pytest

from cdc_mmpg.errors import ConfigError, DataError
from communities import (
    CAPTIONS,
    CLIPS,
    build_small,
    list_captions,
    write_captions,
    write_msrvtt_choice,
    write_msrvtt_clips,
    write_msrvtt_qa,
    write_msrvtt_retrieval,
    write_table,
)
from conftest import ANSWERS
from data_modules.checks import find_shared_clips
from data_modules.msrvtt import get_official_split
from data_modules.msrvtt_choice import MSRVTTChoice
from data_modules.msrvtt_qa import MSRVTTQA
from data_modules.msrvtt_retrieval import MSRVTTRetrieval

SPLITS = ("train", "val", "test")
LAYOUTS = ("data", "annotations", "microsoft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a folder for each task and annotation format, not to be changed."""
    root = tmp_path_factory.mktemp("msrvtt")
    return {
        **{name: write_msrvtt_qa(root / name, name) for name in ("original", "clipbert")},
        "choice": write_msrvtt_choice(root / "choice"),
        "retrieval": write_msrvtt_retrieval(root / "retrieval"),
    }


@pytest.fixture
def copy_folder(folders, tmp_path):
    """Return a function that copies one of the folders, to be damaged."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def build_qa(root, **arguments):
    return build_small(MSRVTTQA, root, **{"num_classes": 5, **arguments})


# Clips


@pytest.mark.parametrize("folder", ["videos", "videos/all", "TrainValVideo", "TestVideo", "."])
def test_clips_are_found_wherever_they_are_distributed(tmp_path, folder):
    write_msrvtt_clips(tmp_path, folder, [3])
    assert build_small(MSRVTTRetrieval, tmp_path).find_clips() == {"video3": tmp_path / folder / "video3.mp4"}


def test_clips_of_several_folders_are_merged_and_logged_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for offset, folder in enumerate(["TrainValVideo", "TestVideo", "videos", "videos/all"]):
        write_msrvtt_clips(tmp_path, folder, [3 + offset, 9])
    (tmp_path / "videos" / "trailer.mp4").touch()
    (tmp_path / "videos" / "video8.txt").touch()
    data = build_small(MSRVTTRetrieval, tmp_path)
    clips = data.find_clips()
    assert clips.keys() == {f"video{number}" for number in (3, 4, 5, 6, 9)}
    assert clips["video9"] == tmp_path / "videos/all/video9.mp4"
    assert data.find_clips() == clips
    messages = [line.getMessage() for line in caplog.records if "clips: " in line.getMessage()]
    assert messages == [f"{tmp_path}: clips: 2 in videos/all, 2 in videos, 2 in TrainValVideo, 2 in TestVideo"]


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no clip video<N>\.mp4 in any of videos/all, videos.*\n.*MSRVTT\.zip"):
        build_small(MSRVTTRetrieval, tmp_path).find_clips()


# Questions


def test_both_formats_give_the_same_samples(folders):
    original, clipbert = build_qa(folders["original"]), build_qa(folders["clipbert"])
    for split in SPLITS:
        assert [sample[:3] for sample in original.samples(split)] == [sample[:3] for sample in clipbert.samples(split)]
        assert {sample.clip for sample in original.samples(split)} == {f"video{number}" for number in CLIPS[split]}
    assert original.samples("val")[0] == ("video6513", "what is the man doing?", "red", "what", (), 0, "40")
    assert [sample.type for sample in original.samples("val")[:4]] == ["what", "who", "how", "other"]
    assert {sample.type for sample in clipbert.samples("val")} == {"what"}  # as the file states


def test_splits_may_come_in_different_conventions(copy_folder, folders, caplog):
    caplog.set_level(logging.INFO)
    root = copy_folder("original")
    (root / "val_qa.json").unlink()
    shutil.copy(folders["clipbert"] / "val.jsonl", root / "msrvtt_qa_val.jsonl")
    data = build_qa(root)
    assert [len(data.samples(split)) for split in SPLITS] == [40, 24, 24]
    assert "reading " + str(root / "msrvtt_qa_val.jsonl") in caplog.text


@pytest.mark.parametrize("name", ["train_ans2label.json", "msrvtt_train_ans2label.json"])
def test_the_vocabulary_is_read_or_counted_from_training_answers(copy_folder, name, caplog):
    root = copy_folder("clipbert")
    (root / "train_ans2label.json").rename(root / name)
    assert build_qa(root).read_answers([]).words == sorted(ANSWERS[:4])
    assert "absent" not in caplog.text
    (root / name).unlink()
    assert build_qa(root).read_answers(["b", "c", "d", "c", "a", "e"]).words == ["c", "a", "b", "d"]
    assert "msrvtt_train_ans2label.json is absent" in caplog.text


def test_clips_in_two_splits_are_found(copy_folder):
    root = copy_folder("original")
    replace_text(root / "val_qa.json", '"video_id": 6513', '"video_id": 7')
    assert find_shared_clips(build_qa(root), SPLITS) == {("train", "val"): ["video7"]}


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("original", "val_qa.json", ": 6513", ': "../6513"', r"val_qa\.json: \[0\]\.video_id is '\.\./6513'"),
        ("original", "val_qa.json", ": 6513", ": -1", r"\[0\]\.video_id is -1, not the name of a clip"),
        ("original", "val_qa.json", ": 6513", ": 1.0", r"\[0\]\.video_id is 1\.0, not the name"),
        ("original", "val_qa.json", ": 6513", ": true", r"\[0\]\.video_id is True, not the name"),
        ("original", "val_qa.json", '"answer": "red"', '"answer": 2', r"\[0\]\.answer is 2, not a text"),
        ("original", "val_qa.json", '"question"', '"frage"', r"\[0\]\.question is missing"),
        ("original", "val_qa.json", "}, {", "}, {{", r"val_qa\.json, line 1, column \d+"),
        ("clipbert", "val.jsonl", '"video6514"', '"../video6514"', r"val\.jsonl, line 5: video_id is '\.\./video6514'"),
        ("clipbert", "val.jsonl", '"video6514"', '"video6514.mp4"', r"video_id is 'video6514\.mp4', not the name"),
        ("clipbert", "val.jsonl", "}\n", "\n", r"val\.jsonl, line 1, column \d+"),
        ("clipbert", "val.jsonl", '"what"', "null", r"val\.jsonl, line 1: answer_type is None"),
    ],
)  # fmt: skip
def test_damaged_questions_are_refused_with_the_place(copy_folder, name, file, old, new, message):
    root = copy_folder(name)
    replace_text(root / file, old, new)
    with pytest.raises(DataError, match=message):
        build_qa(root).samples("val")


def test_truncated_and_missing_files_are_refused(copy_folder):
    root = copy_folder("original")
    path = root / "test_qa.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(DataError, match=r"test_qa\.json, line 1, column \d+.*cut short"):
        build_qa(root).samples("test")
    path.unlink()
    with pytest.raises(
        DataError, match=r"test_qa\.json: no such file, nor msrvtt_qa_test\.jsonl, test\.jsonl\n.*belongs below"
    ):
        build_qa(root).samples("test")


# Captions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_in_every_layout(tmp_path, layout, caplog):
    caplog.set_level(logging.INFO)
    captions, categories = build_small(MSRVTTRetrieval, write_captions(tmp_path, layout)).captioned
    numbers = [number for split in CLIPS.values() for number in split]
    assert captions == {f"video{number}": list_captions(number) for number in numbers}
    assert categories == ({} if layout == "annotations" else {f"video{number}": number % 4 for number in numbers})
    assert f"{CAPTIONS * len(numbers)} captions of {len(numbers)} clips, {len(numbers)} blank left out" in caplog.text


def test_captions_are_found_in_the_folders_of_frozen_in_time(tmp_path):
    write_captions(tmp_path / "annotation", "annotations")
    assert "video0" in build_small(MSRVTTRetrieval, tmp_path).captioned.captions


def test_clips_after_number_9999_have_no_split(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    borders = [get_official_split(f"video{number}") for number in (6512, 6513, 7009, 7010, 9999, 10_000)]
    assert borders == ["train", "val", "val", "test", "test", None]
    write_captions(tmp_path, "annotations")
    replace_text(tmp_path / "MSR_VTT.json", '"video3"', '"video12727"')
    captions = build_small(MSRVTTRetrieval, tmp_path).captioned.captions
    assert "video12727" not in captions
    assert "1 of clips beyond video9999 left out" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"sentences"', '"phrases"', r"MSRVTT_data\.json: has neither sentences"),
        ('"caption": " the', '"text": " the', r"MSRVTT_data\.json: sentences\[0\]\.caption is missing"),
        ('"video_id": "video0", "sen', '"video_id": "/video0", "sen', r"sentences\[0\]\.video_id is '/video0'"),
        ('"category": 1', '"category": "sport"', r"json: videos\[1\]\.category is 'sport', not an integer"),
        ('"sen_id": 0}', "", r"MSRVTT_data\.json, line 1, column"),
    ],
)
def test_damaged_captions_are_refused_with_the_place(tmp_path, old, new, message):
    replace_text(write_captions(tmp_path) / "MSRVTT_data.json", old, new)
    with pytest.raises(DataError, match=message):
        build_small(MSRVTTRetrieval, tmp_path).samples("train")


# Multiple choice


def parse_clip_number(sample):
    return int(sample.clip.removeprefix("video"))


def parse_caption_number(caption):
    return int(caption.split()[-1])


def test_the_test_split_is_the_published_one(copy_folder):
    root = copy_folder("choice")
    samples = build_small(MSRVTTChoice, root).samples("test")
    assert [sample.options[sample.right] for sample in samples] == [list_captions(n)[0] for n in CLIPS["test"]]
    assert {(sample.question, sample.answer, len(sample.options)) for sample in samples} == {("", "", 5)}
    path = root / "msrvtt_mc_test.jsonl"
    path.write_text(path.read_text().replace("clip_name", "video_id"))
    path.rename(root / "msrvtt_retrieval_mc_test.jsonl")
    assert build_small(MSRVTTChoice, root).samples("test") == samples


@pytest.mark.parametrize("split", ["train", "val"])
def test_items_are_made_from_captions(folders, split):
    data = build_small(MSRVTTChoice, folders["choice"])
    samples = data.samples(split)
    assert len(samples) == MSRVTTChoice.ITEMS_PER_CLIP * len(CLIPS[split])
    positions = set()
    for sample in samples:
        assert parse_caption_number(sample.options[sample.right]) == parse_clip_number(sample)
        wrong = [
            parse_caption_number(option) for position, option in enumerate(sample.options) if position != sample.right
        ]
        assert len({*wrong, parse_clip_number(sample)}) == 5
        assert set(wrong) <= set(CLIPS[split])
        assert all(other % 4 != parse_clip_number(sample) % 4 for other in wrong)
        positions.add(sample.right)
    assert len(positions) == 5
    right = {(sample.clip, sample.options[sample.right]) for sample in samples}
    assert len(right) == len(samples)


def test_items_are_the_same_in_every_run_and_for_every_seed(folders, tmp_path):
    first = build_small(MSRVTTChoice, folders["choice"]).samples("train")
    assert build_small(MSRVTTChoice, folders["choice"], seed=7).samples("train") == first
    assert build_small(MSRVTTChoice, write_captions(tmp_path, "microsoft")).samples("train") == first
    assert first[0].options == (
        "the green man in it is doing 0 to 6",
        "the green man in it is doing 5 to 1",
        "the red man in it is doing 2 to 0",
        "the dog man in it is doing 0 to 9",
        "the blue man in it is doing 5 to 7",
    )  # changing these makes results incomparable


def test_without_categories_wrong_options_come_from_any_other_clip(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    samples = build_small(MSRVTTChoice, write_captions(tmp_path, "annotations")).samples("train")
    others = [
        (parse_clip_number(sample), parse_caption_number(option)) for sample in samples for option in sample.options
    ]
    assert any(clip % 4 == other % 4 and clip != other for clip, other in others)
    assert all(len({parse_caption_number(option) for option in sample.options}) == 5 for sample in samples)
    assert "10 have none and count as one each" in caplog.text


def write_captioned_clips(root, texts, categories):
    """Write the captions (a list for each clip) and the category of every clip; return the dataset."""
    videos = [{"video_id": f"video{number}", "category": category} for number, category in enumerate(categories)]
    rows = [
        {"video_id": f"video{number}", "caption": text} for number, captions in enumerate(texts) for text in captions
    ]
    (root / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": rows}))
    return build_small(MSRVTTChoice, root)


def test_wrong_options_never_match_a_right_one_in_another_case(tmp_path):
    texts = [
        ["a man", "A Man", "one"],
        ["A man", "two"],
        ["a MAN", "Two", "three"],
        *[[f"{n}", "One"] for n in range(6)],
    ]
    samples = write_captioned_clips(tmp_path, texts, range(9)).samples("train")
    for sample in samples:
        options = [option.lower() for option in sample.options]
        assert len(set(options)) == 5
        right = {text.lower() for text in texts[parse_clip_number(sample)]}
        assert {option for option in options if option in right} == {options[sample.right]}
    assert len([sample for sample in samples if sample.clip == "video1"]) == 2  # as many as it has captions


def test_too_few_clips_to_choose_from(tmp_path):
    with pytest.raises(DataError, match=r"for video0, only 3 of the 6 captioned clips of split train have another"):
        write_captioned_clips(tmp_path, [[str(n)] for n in range(6)], [1, 1, 1, 2, 3, 4]).samples("train")
    with pytest.raises(DataError, match=r"video0: 10000 draws of captions of other clips did not give 4 that"):
        write_captioned_clips(tmp_path, [[str(n % 4)] for n in range(6)], range(6)).samples("train")
    with pytest.raises(DataError, match=r"no clip of split val has a caption"):
        write_captioned_clips(tmp_path, [[str(n)] for n in range(6)], range(6)).samples("val")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"answer": 1', '"answer": 5', r"msrvtt_mc_test\.jsonl, line \d: answer is 5, not a whole number from 0 to 4"),
        ('"answer": 0', '"answer": null', r"msrvtt_mc_test\.jsonl, line 1: answer is None"),
        ('"options": [', '"options": ["x", ', r"line 1: options is .* not a list of 5 texts"),
        ('"video7010"', '"../../video7010"', r"line 1: clip_name or video_id is '\.\./\.\./video7010'"),
    ],
)
def test_damaged_choices_are_refused_with_the_place(copy_folder, old, new, message):
    root = copy_folder("choice")
    replace_text(root / "msrvtt_mc_test.jsonl", old, new)
    with pytest.raises(DataError, match=message):
        build_small(MSRVTTChoice, root).samples("test")


def test_a_test_clip_that_is_trained_on_is_found(copy_folder):
    root = copy_folder("choice")
    replace_text(root / "msrvtt_mc_test.jsonl", '"video7010"', '"video4"')
    assert find_shared_clips(build_small(MSRVTTChoice, root), SPLITS) == {("train", "test"): ["video4"]}


@pytest.mark.slow
def test_a_training_split_of_the_real_size_is_read(tmp_path):
    texts = [[f"{number} {place}" for place in range(20)] for number in range(6513)]
    data = write_captioned_clips(tmp_path, texts, [number % 20 for number in range(6513)])
    assert len(data.samples("train")) == 32_565


# Retrieval


@pytest.mark.parametrize("lists", [True, False])
def test_the_full_protocol_uses_split_lists_or_clip_numbers(copy_folder, lists):
    root = copy_folder("retrieval")
    if not lists:
        for path in root.glob("*.full.csv"):
            path.unlink()
    data = build_small(MSRVTTRetrieval, root)
    assert data.protocol == "full"
    for split in SPLITS:
        samples = data.samples(split)
        assert [sample.clip for sample in samples] == [f"video{number}" for number in CLIPS[split]]
        assert [sample.options for sample in samples] == [tuple(list_captions(number)) for number in CLIPS[split]]
        assert data.count_questions(samples) == CAPTIONS * len(samples)


def test_a_split_list_overrides_clip_numbers(copy_folder):
    root = copy_folder("retrieval")
    write_table(root / "MSRVTT_train.full.csv", [{"video_id": "video5"}, {"video_id": "video2"}])
    assert [sample.clip for sample in build_small(MSRVTTRetrieval, root).samples("train")] == ["video5", "video2"]


@pytest.mark.parametrize("protocol", ["9k", "7k"])
def test_the_9k_and_7k_protocols_hold_out_validation_clips_and_test_on_1k_a(folders, protocol, caplog):
    caplog.set_level(logging.INFO)
    data = build_small(MSRVTTRetrieval, folders["retrieval"], protocol=protocol)
    listed = {"9k": 20, "7k": 16}[protocol]
    clips = {split: [sample.clip for sample in data.samples(split)] for split in SPLITS}
    assert len(clips["train"]) == listed - len(clips["val"])
    assert clips["val"] == {"9k": ["video8", "video6513"], "7k": ["video6513"]}[protocol]  # must never change
    assert not set(clips["train"]) & set(clips["val"])
    assert data.samples("test") == [
        ("video7012", "", "", "", ("is 7012, the man, in it",), 0, ""),
        ("video7015", "", "", "", ("is 7015, the man, in it",), 0, ""),
    ]
    assert {sample.options for sample in data.samples("val")} == {
        tuple(list_captions(int(clip[5:]))) for clip in clips["val"]
    }
    assert f"protocol {protocol}, split val: {len(clips['val'])} clips" in caplog.text
    assert f"of whose {listed} clips {len(clips['val'])} are held out for validation" in caplog.text
    assert not find_shared_clips(data, SPLITS)


def test_another_protocol_is_refused(folders):
    with pytest.raises(ConfigError, match="full, 9k, 7k"):
        build_small(MSRVTTRetrieval, folders["retrieval"], protocol="1k")


def test_clips_without_captions_are_named(copy_folder):
    root = copy_folder("retrieval")
    rows = [{"video_id": f"video{number}"} for number in [*range(3), *range(100, 107)]]
    write_table(root / "MSRVTT_train.full.csv", rows)
    with pytest.raises(DataError, match=r"7 of 10 clips have no caption, among them video100, .*, video104\n"):
        build_small(MSRVTTRetrieval, root).samples("train")
    partial = build_small(MSRVTTRetrieval, root, only_present=True)
    assert [sample.clip for sample in partial.samples("train")] == ["video0", "video1", "video2"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"is 7012, the man, in it"', "is 7012, the man", r"JSFUSION_test\.csv, line 2: 5 fields"),
        ("is 7012, the man, in it", " ", r"JSFUSION_test\.csv, line 2: sentence is ' ', not a caption"),
        ("sentence", "text", r"line 1: no column sentence in the header"),
        ("video7015", "video7012", r"line 3: video7012 occurs a second time"),
        ("video7015", "../video7015", r"line 3: video_id is '\.\./video7015'"),
    ],
)  # fmt: skip
def test_damaged_lists_are_refused_with_the_place(copy_folder, old, new, message):
    root = copy_folder("retrieval")
    replace_text(root / "MSRVTT_JSFUSION_test.csv", old, new)
    with pytest.raises(DataError, match=message):
        build_small(MSRVTTRetrieval, root, protocol="9k").samples("test")


# Real files


def test_real_questions_at_their_published_counts(real, tmp_path):
    data = MSRVTTQA(str(real / "msrvtt"), str(tmp_path), 1501)
    samples = data.samples("val")
    assert len(samples) == data.PUBLISHED["official"]["val"]["questions"] == 12_278
    assert len({sample.clip for sample in samples}) == 497
    assert {get_official_split(sample.clip) for sample in samples} == {"val"}
    answers = data.read_answers([])
    unknown = sum(answers.label(sample.answer) < 0 for sample in samples)
    assert round(100 * (1 - unknown / len(samples)), 1) == 93.0
    assert len(data.samples("test")) == 99
    assert {sample.clip for sample in data.samples("test")} == data.find_clips().keys()


@pytest.fixture
def captioned_root(real, tmp_path):
    """Write the real lists with an invented caption for every clip; the real captions cover five clips only."""
    for path in (real / "msrvtt").glob("*.csv"):
        (tmp_path / path.name).symlink_to(path)
    rows = [{"image_id": f"video{number}", "caption": f"about {number}"} for number in range(10_000)]
    (tmp_path / "MSR_VTT.json").write_text(json.dumps({"annotations": rows}))
    return tmp_path


def test_real_lists_at_their_published_counts(captioned_root):
    counts = {}
    for protocol, split in itertools.product(MSRVTTRetrieval.PROTOCOLS, SPLITS):
        data = build_small(MSRVTTRetrieval, captioned_root, protocol=protocol)
        samples = data.samples(split)
        counts[protocol, split] = len(samples)
        if protocol == "full":
            assert {get_official_split(sample.clip) for sample in samples} == {split}
        assert not find_shared_clips(data, SPLITS)
    assert [counts["full", split] for split in SPLITS] == [6_513, 497, 2_990]
    assert [counts["9k", split] for split in SPLITS] == [8_500, 500, 1_000]
    assert [counts["7k", split] for split in SPLITS] == [6_510, 500, 1_000]


def test_real_captions_are_read(real, tmp_path):
    captions, categories = MSRVTTRetrieval(str(real / "msrvtt"), str(tmp_path)).captioned
    assert {clip: len(texts) for clip, texts in captions.items()} == {f"video{n}": 20 for n in range(7010, 7015)}
    assert categories["video7012"] == 5
    with pytest.raises(DataError, match="2985 of 2990 clips have no caption, among them video7015"):
        MSRVTTRetrieval(str(real / "msrvtt"), str(tmp_path)).samples("test")
    assert len(MSRVTTRetrieval(str(real / "msrvtt"), str(tmp_path), only_present=True).samples("test")) == 5
