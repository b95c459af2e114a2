"""MSVD-QA in its published layout: annotations and clips read, left out or refused; batches and their order."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cdc_mmpg.data.batch import UNKNOWN_LABEL, normalise
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import HOST_TAG
from conftest import write_clip
from data_modules.clip_dataset import Sample
from data_modules.msvd_qa import MSVDQA


def build_module(root: Path, out: Path, **arguments) -> MSVDQA:
    return MSVDQA(
        str(root),
        cache_dir=str(out),
        **{"num_classes": 5, "image_size": 32, "batch_size": 4, "num_workers": 0, "vocab": str(root / "vocab.txt")}
        | arguments,
    )


def prepare_module(root: Path, out: Path, **arguments) -> MSVDQA:
    data = build_module(root, out, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())


def test_the_summary_counts_questions_clips_and_known_answers(msvd, tmp_path):
    data = prepare_module(msvd, tmp_path)
    summary = data.summary()
    assert {split: row["questions"] for split, row in summary.items()} == {"train": 12, "val": 4, "test": 8}
    assert {split: row["clips"] for split, row in summary.items()} == {"train": 3, "val": 1, "test": 2}
    for split in ("train", "val", "test"):
        labels = data.labels(split)
        answers = [sample.answer for sample in data.dataset(split, augment=False).samples]
        assert [data.answers()[label] if label >= 0 else "dog" for label in labels.tolist()] == answers
        assert summary[split]["ceiling"] == pytest.approx(1 - (labels == UNKNOWN_LABEL).float().mean().item())


def test_the_batch_holds_the_annotated_frames(msvd, tmp_path):
    data = prepare_module(msvd, tmp_path)
    batch = next(iter(data.test_dataloader()))
    assert batch.frames.shape == (4, 3, 32, 32, 3)
    assert batch.frames.dtype == torch.uint8
    greys = (batch.frames[0].float().mean((1, 2, 3)) - 4) / 6
    assert greys.round().tolist() == [2, 6, 10]  # the middles of three segments of the clip's 12 frames
    assert batch.text_ids.shape == batch.text_mask.shape
    assert batch.text_ids[:, 0].tolist() == [2] * 4
    assert batch.indices.tolist() == [0, 1, 2, 3]
    assert normalise(batch.frames).shape == (4, 3, 3, 32, 32)


def test_normalisation_uses_the_statistics_of_imagenet():
    frames = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    expected = (np.array([0, 128, 255]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalise(frames).flatten().numpy(), expected, rtol=1e-5)


def test_training_order_and_augmentation_follow_from_seed_epoch_and_index(msvd, tmp_path):
    def load_epochs(seed: int) -> list[torch.Tensor]:
        loader = prepare_module(msvd, tmp_path, seed=seed).train_dataloader()
        batches = []
        for epoch in range(2):
            loader.batch_sampler.sampler.set_epoch(epoch)
            batches += [torch.cat([batch.frames.flatten(), batch.indices]) for batch in loader]
        return batches

    first, repeated, other_seed = load_epochs(0), load_epochs(0), load_epochs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))
    assert not torch.equal(first[0], first[3])
    assert not torch.equal(first[0], other_seed[0])


def test_after_the_preparation_nothing_is_decoded(writable_msvd, tmp_path):
    """A second preparation and two epochs succeed although the clips can no longer be decoded."""
    prepare_module(writable_msvd, tmp_path)
    for clip in (writable_msvd / "YouTubeClips").iterdir():
        stat = clip.stat()
        clip.write_bytes(b"?" * stat.st_size)
        os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    loader = prepare_module(writable_msvd, tmp_path).train_dataloader()
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        assert sum(len(batch.labels) for batch in loader) == 12


def test_a_changed_clip_is_refused_until_the_data_are_checked_again(writable_msvd, tmp_path):
    before = prepare_module(writable_msvd, tmp_path).fingerprint("test", frames=True)
    write_clip(writable_msvd / "YouTubeClips" / "t_0_1.avi", frames=30)
    with pytest.raises(DataError, match=r"1 clips changed.*\n  t_0_1 .*\n.*make data"):
        prepare_module(writable_msvd, tmp_path)
    assert build_module(writable_msvd, tmp_path).check()["ready"] == 6
    data = prepare_module(writable_msvd, tmp_path)
    assert data.fingerprint("test", frames=True) != before
    greys = (next(iter(data.test_dataloader())).frames[0].float().mean((1, 2, 3)) - 4) / 6
    assert greys.round().tolist() == [5, 15, 25]


def test_a_half_written_array_is_never_read(writable_msvd, tmp_path):
    data = prepare_module(writable_msvd, tmp_path)
    (path,) = data.cache.folder.glob("t_0_1.*.npy")
    leftover = path.with_name(f".{path.name}.{HOST_TAG}.999999999.tmp")  # left by a killed process
    leftover.write_bytes(path.read_bytes()[:100])
    path.unlink()
    prepare_module(writable_msvd, tmp_path)
    assert path.exists()
    assert not leftover.exists()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="delete the file"):
        next(iter(prepare_module(writable_msvd, tmp_path).test_dataloader()))


def test_missing_clips_are_named_and_counted(writable_msvd, tmp_path):
    (writable_msvd / "YouTubeClips" / "c d_1_2.avi").unlink()
    with pytest.raises(DataError, match=r"1 of 6 clips are absent or unreadable, max_missing is 0") as error:
        build_module(writable_msvd, tmp_path).prepare_data()
    assert "c d_1_2: absent" in str(error.value)
    for allowed in ({"max_missing": 1}, {"only_present": True}):
        summary = prepare_module(writable_msvd, tmp_path, **allowed).summary()
        assert (summary["train"]["questions"], summary["train"]["left_out"]) == (8, 4)


def test_unreadable_clips_are_refused_even_where_missing_ones_are_allowed(writable_msvd, tmp_path):
    (writable_msvd / "YouTubeClips" / "e_3_4.avi").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"e_3_4\.avi.*cannot decode"):
        build_module(writable_msvd, tmp_path, only_present=True).prepare_data()
    assert prepare_module(writable_msvd, tmp_path, max_missing=1).summary()["train"]["questions"] == 8


def test_clips_without_prepared_frames_are_refused(writable_msvd, tmp_path):
    data = build_module(writable_msvd, tmp_path)
    data.prepare_data()
    next(data.cache.folder.glob("t_0_1.*.npy")).unlink()
    with pytest.raises(DataError, match="t_0_1: no frames are prepared"):
        data.setup("fit")


def test_clips_may_be_mp4(writable_msvd, tmp_path):
    clips = writable_msvd / "YouTubeClips"
    (clips / "t_0_1.avi").unlink()
    write_clip(clips / "t_0_1.mp4", codec="libx264")
    assert prepare_module(writable_msvd, tmp_path).summary()["test"]["questions"] == 8


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train_qa.json", '"}]', "", r"train_qa\.json, line 1, column \d+"),
        ("train_qa.json", '"video_id": 1}]', '"video_id": 1', r"train_qa\.json, line 1"),
        ("val_qa.json", '"question"', '"frage"', r"val_qa\.json: \[0\]\.question is missing"),
        ("val_qa.json", '"video_id": 3', '"video_id": "3"', r"val_qa\.json: \[0\]\.video_id is '3', not an integer"),
        ("test_qa.json", '"video_id": 4', '"video_id": 44', r"test_qa\.json: \[0\]\.video_id is 44.*mapping"),
        ("test_qa.json", "[", '{"rows": [', r"test_qa\.json, line 1"),
        ("youtube_mapping.txt", "v_0_1 vid3", "v_0_1", r"youtube_mapping\.txt, line 4"),
        ("youtube_mapping.txt", "v_0_1 vid3", "v_0_1 vid2", r"line 4: vid2 is 'v_0_1', but 'e_3_4' above"),
        ("youtube_mapping.txt", "v_0_1", "../../v_0_1", r"youtube_mapping\.txt, line 4.*not a plain file name"),
        ("youtube_mapping.txt", "v_0_1", "t_0_1", r"val and test share 1 clips, but splits must not(.|\n)*t_0_1"),
        ("answer_set.txt", "green\n", "", r"answer_set\.txt: 3 different answers.*num_classes=4"),
        ("answer_set.txt", "green\n", "red\n", r"answer_set\.txt: 3 different answers in 4 lines"),
        ("vocab.txt", "[SEP]\n", "", r"vocab\.txt: not a WordPiece vocabulary, it lacks \[SEP\]"),
    ],
)
def test_damaged_annotations_are_refused_with_the_place(writable_msvd, tmp_path, file, old, new, message):
    if old in ('"}]', '"video_id": 1}]'):  # cut short
        text = (writable_msvd / file).read_text()
        (writable_msvd / file).write_text(text[: len(text) // 2])
    else:
        replace_text(writable_msvd / file, old, new)
    with pytest.raises(DataError, match=message):
        prepare_module(writable_msvd, tmp_path)


@pytest.mark.parametrize("name", ["train_qa.json", "youtube_mapping.txt", "YouTubeClips", "vocab.txt"])
def test_absent_files_are_named_with_the_remedy(writable_msvd, tmp_path, name):
    path = writable_msvd / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=name) as error:
        prepare_module(writable_msvd, tmp_path)
    assert "VOCAB=" in str(error.value) if name == "vocab.txt" else "belongs below" in str(error.value)


def test_a_byte_order_mark_is_accepted_and_utf_16_is_refused(writable_msvd, tmp_path):
    path = writable_msvd / "val_qa.json"
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert prepare_module(writable_msvd, tmp_path).summary()["val"]["questions"] == 4
    for name in ("val_qa.json", "youtube_mapping.txt", "answer_set.txt", "vocab.txt"):
        content = (writable_msvd / name).read_bytes()
        (writable_msvd / name).write_bytes(text.encode("utf-16"))
        with pytest.raises(DataError, match=rf"{name}, byte 0: not UTF-8"):
            prepare_module(writable_msvd, tmp_path)
        (writable_msvd / name).write_bytes(content)


def test_many_missing_clips_do_not_bury_the_message(writable_msvd, tmp_path):
    with (writable_msvd / "youtube_mapping.txt").open("a") as file:
        file.writelines(f"gone{number}_0_1 vid{number}\n" for number in range(100, 130))
    rows = json.loads((writable_msvd / "train_qa.json").read_text())
    rows += [{"answer": "red", "id": n, "question": "what?", "video_id": n} for n in range(100, 130)]
    (writable_msvd / "train_qa.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="30 of 36 clips are absent") as error:
        build_module(writable_msvd, tmp_path).prepare_data()
    assert "and 10 more" in str(error.value)
    assert str(error.value).count("absent\n") == 20
    assert len((tmp_path / "missing.txt").read_text().splitlines()) == 30
    assert "ARGS=--data.init_args.only_present=true" in str(error.value)
    assert not (tmp_path / "frames").exists(), "nothing is decoded for a run that is refused"


def test_without_a_distributed_vocabulary_training_answers_are_counted(writable_msvd, tmp_path, caplog):
    (writable_msvd / "answer_set.txt").unlink()
    data = prepare_module(writable_msvd, tmp_path)
    assert data.answers() == ["green", "red", "blue", "dog"]  # 3, 3, 2, 2 and 2: ties by alphabet
    assert "answer_set.txt is absent" in caplog.text


def test_types_are_first_words_unless_stated(writable_msvd, tmp_path):
    rows = json.loads((writable_msvd / "train_qa.json").read_text())
    for row, question in zip(rows, ["Who is it?", "how many?", "is it?"], strict=False):
        row["question"] = question
    rows[3]["type"] = "colour"
    (writable_msvd / "train_qa.json").write_text(json.dumps(rows))
    types = [sample.type for sample in build_module(writable_msvd, tmp_path).samples("train")]
    assert types == ["who", "how", "other", "colour", *["what"] * 8]


def test_the_same_question_may_have_several_answers(writable_msvd, tmp_path):
    rows = json.loads((writable_msvd / "train_qa.json").read_text())
    rows[1] = {**rows[1], "question": rows[0]["question"], "video_id": rows[0]["video_id"]}
    (writable_msvd / "train_qa.json").write_text(json.dumps(rows))
    assert prepare_module(writable_msvd, tmp_path).summary()["train"]["questions"] == 12


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_frames": 0}, {"num_workers": -1}, {"num_classes": 1}])
def test_impossible_arguments_are_refused(msvd, tmp_path, arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        build_module(msvd, tmp_path, **arguments)


def test_real_files_are_read_at_their_published_counts(real, tmp_path):
    data = MSVDQA(str(real / "msvd"), str(tmp_path), 1001, vocab=str(real.parent / "vocab" / "vocab.txt"),
                  only_present=True, num_workers=2)  # fmt: skip
    samples = {split: data.read_split(split) for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in samples.items()} == {"train": 30_933, "val": 6_415, "test": 13_157}
    clips = {split: len({row.clip for row in rows}) for split, rows in samples.items()}
    assert clips == {"train": 1_161, "val": 245, "test": 504}
    published = data.PUBLISHED["official"]
    assert {split: (len(rows), clips[split]) for split, rows in samples.items()} == {
        split: (row["questions"], row["clips"]) for split, row in published.items()
    }
    answers = data.read_answers([])
    assert len(answers.words) == 1_000
    known = {split: np.mean([answers.label(row.answer) >= 0 for row in rows]) for split, rows in samples.items()}
    assert round(100 * known["val"], 1) == 89.5
    assert round(100 * known["test"], 1) == 90.8
    data.prepare_data()
    data.setup("fit")
    assert {split: row["questions"] for split, row in data.summary().items()} == {"train": 103, "val": 22, "test": 57}


def rewrite(path: Path, **fields: object) -> None:
    """Set fields in all rows of an annotation file."""
    path.write_text(json.dumps([row | fields for row in json.loads(path.read_text())]))


def test_answers_with_line_feeds_are_refused_before_anything_is_decoded(writable_msvd, tmp_path):
    """A vocabulary has one answer per line: a line feed in an answer would shift every later class."""
    for answer in ("red\nblue", "red\u2028", "\x1b[31mred"):
        rewrite(writable_msvd / "val_qa.json", answer=answer)
        with pytest.raises(DataError, match=r"val_qa\.json: \[0\]\.answer is .*, not a text on one line"):
            build_module(writable_msvd, tmp_path).prepare_data()
    assert not (tmp_path / "frames").exists()
    data = build_module(writable_msvd, tmp_path)
    with pytest.raises(DataError, match=r"split val: the answer of sample 1, of clip c, is 'a\\nb'"):
        data.check_samples("val", [Sample("c", "what?", answer) for answer in ("a", "a\nb")])
    for question, answer, lacking in (("what?", " ", "answer"), ("", "a", "question")):
        with pytest.raises(DataError, match=f"sample 1, of clip d, has no {lacking}"):
            data.check_samples("train", [Sample("c", "what?", "a"), Sample("d", question, answer)])


def test_a_split_without_any_known_answer_is_refused_with_an_example(writable_msvd, tmp_path):
    path = writable_msvd / "train_qa.json"
    text = path.read_text()
    path.write_text(text.replace('", "id"', ' ", "id"'))
    message = r"split train: none of 12 answers is in the vocabulary: an annotation has 'red ', the vocabulary 'red', "
    with pytest.raises(DataError, match=message + "which differ in whitespace or case"):
        build_module(writable_msvd, tmp_path).prepare_data()
    assert not (tmp_path / "frames").exists(), "nothing is decoded for a run that is refused"
    assert any("'red '" in problem for problem in build_module(writable_msvd, tmp_path).check()["problems"])
    rewrite(path, answer="owl")
    with pytest.raises(DataError, match=r"an annotation has 'owl', the vocabulary 'red'\. Fix"):
        build_module(writable_msvd, tmp_path).prepare_data()


def test_a_partial_copy_that_leaves_nothing_to_learn_is_refused(writable_msvd, tmp_path):
    """No answer in the rest of the training split is in the vocabulary."""
    rows = json.loads((writable_msvd / "train_qa.json").read_text())
    for row in rows:
        row["answer"] = "red" if row["video_id"] == 0 else "owl"
    (writable_msvd / "train_qa.json").write_text(json.dumps(rows))
    prepare_module(writable_msvd, tmp_path)
    (writable_msvd / "YouTubeClips" / "-aB_0_5.avi").unlink()
    data = build_module(writable_msvd, tmp_path, only_present=True)
    data.prepare_data()
    with pytest.raises(DataError, match=r"split train: none of 8 answers is in the vocabulary"):
        data.setup("fit")
    assert any(
        "none of 8 answers" in problem
        for problem in build_module(writable_msvd, tmp_path, only_present=True).check()["problems"]
    )


def test_mismatched_clip_names_are_reported_with_one_example_of_each(writable_msvd, tmp_path):
    path = writable_msvd / "youtube_mapping.txt"
    path.write_text(path.read_text().replace(" vid", ".avi vid"))
    data = build_module(writable_msvd, tmp_path, only_present=True)
    message = r"none of the 6 clips exists: looked for '-aB_0_5\.avi', among others; found '-aB_0_5' .*remove '\.avi'"
    with pytest.raises(DataError, match=message):
        data.prepare_data()
    problems = build_module(writable_msvd, tmp_path, only_present=True).check()["problems"]
    assert len(problems) == 1
    assert "remove '.avi' in the annotations" in problems[0]
    for number, clip in enumerate(sorted((writable_msvd / "YouTubeClips").iterdir())):
        clip.rename(clip.with_name(f"other{number}.avi"))
    with pytest.raises(DataError, match=r"looked for '-aB_0_5\.avi', among others; found 'other\d' .*, among 6\nMSVD"):
        build_module(writable_msvd, tmp_path, only_present=True).prepare_data()


def test_circular_links_count_as_missing_clips(writable_msvd, tmp_path):
    clip = writable_msvd / "YouTubeClips" / "e_3_4.avi"
    clip.unlink()
    clip.symlink_to(clip)
    with pytest.raises(DataError, match=r"1 of 6 clips are absent or unreadable, max_missing is 0:\n  e_3_4: absent"):
        build_module(writable_msvd, tmp_path).prepare_data()


def test_a_root_may_begin_with_a_tilde(writable_msvd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(writable_msvd.parent))
    data = build_module(writable_msvd, tmp_path)
    assert MSVDQA("~/msvd", "~/cache", num_classes=5).root == data.root


def test_a_root_of_a_long_name_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"x: cannot be read \(File name too long\)"):
        MSVDQA("x" * 300, str(tmp_path), num_classes=5).samples("train")
