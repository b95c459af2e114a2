"""Small datasets in the formats of their publishers, with real clips whose frames encode their number."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from conftest import ANSWERS, WORDS, write_clip

# Numbers of MSR-VTT's clips by official split; every split has enough categories for multiple choice.
CLIPS = {"train": range(10), "val": range(6513, 6519), "test": range(7010, 7016)}
CAPTIONS = 6  # captions per clip, besides a blank one
TGIF_TRAIN = [f"tumblr_n{number}o1_250" for number in range(20)]  # n17 and n18 are held out by their hash
TGIF_VAL = [f"tumblr_v{number}o1_250" for number in range(2)]
TGIF_TEST = [f"tumblr_t{number}o1_250" for number in range(4)]
VOCAB = dict.fromkeys([*WORDS, *ANSWERS, "how", "many", "to", *"0123456789", *(f"##{digit}" for digit in range(10))])

Module = TypeVar("Module")


def build_small(kind: type[Module], root: Path, **arguments: Any) -> Module:
    """Return a data module of the folder `root` with tiny settings and a cache next to the folder."""
    tiny = {"image_size": 32, "batch_size": 4, "num_workers": 0, "vocab": str(root / "vocab.txt")}
    return kind(str(root), cache_dir=str(root.parent / f"{root.name}-cache"), **(tiny | arguments))


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path: Path, rows: Iterable[dict[str, object]], delimiter: str = ",", end: str = "\n") -> Path:
    """Write a CSV file with a header."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_vocabulary(root: Path) -> Path:
    """Write a vocabulary with the WordPieces of all texts in this file."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return root


def write_msrvtt_clips(root: Path, folder: str = "videos", numbers: Iterable[int] | None = None) -> Path:
    """Write small clips of MSR-VTT."""
    for number in [number for split in CLIPS.values() for number in split] if numbers is None else numbers:
        write_clip(root / folder / f"video{number}.mp4", frames=6 + number % 5, size=(48, 32))
    return root


def list_captions(number: int) -> list[str]:
    """Return the captions that `write_captions` writes for a clip, without the blank one."""
    return [f"the {ANSWERS[number % 5]} man in it is doing {position} to {number}" for position in range(CAPTIONS)]


def write_captions(root: Path, layout: Literal["data", "annotations", "microsoft"] = "data") -> Path:
    """Write captions as MSRVTT_data.json, MSR_VTT.json or Microsoft's two files; padded, and with a blank one."""

    def sentences(key: str, numbers: Iterable[int]) -> list[dict[str, object]]:
        texts = [(number, text) for number in numbers for text in [*list_captions(number), ""]]
        return [{"caption": f" {text} ", key: f"video{number}", "sen_id": i} for i, (number, text) in enumerate(texts)]

    def data(*splits: str) -> dict[str, object]:
        numbers = [number for split in splits for number in CLIPS[split]]
        videos = [
            {"category": number % 4, "video_id": f"video{number}", "split": "unread", "id": number}
            for number in numbers
        ]
        return {"info": {}, "videos": videos, "sentences": sentences("video_id", numbers)}

    files: dict[str, dict[str, object]] = {
        "data": {"MSRVTT_data.json": data(*CLIPS)},
        "annotations": {"MSR_VTT.json": {"annotations": sentences("image_id", [n for s in CLIPS.values() for n in s])}},
        "microsoft": {
            "train_val_videodatainfo.json": data("train", "val"),
            "test_videodatainfo.json": data("test"),
        },
    }[layout]
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    return root


def write_msrvtt_qa(root: Path, convention: Literal["original", "clipbert"] = "original") -> Path:
    """Write a small MSRVTT-QA: four questions per clip, and five answers, four of which are in the vocabulary."""
    write_msrvtt_clips(write_vocabulary(root))
    questions = ["what is the man doing?", "who is in it?", "how many?", "is it a man?"]
    identifier = 0
    for split, numbers in CLIPS.items():
        rows: list[dict[str, object]] = []
        for number in numbers:
            for question in questions:
                row = {"answer": ANSWERS[identifier % 5], "question": question}
                if convention == "original":
                    rows.append(row | {"category_id": number % 4, "id": identifier, "video_id": number})
                else:
                    rows.append(row | {"video_id": f"video{number}", "answer_type": "what"})
                identifier += 1
        if convention == "original":
            (root / f"{split}_qa.json").write_text(json.dumps(rows))
        else:
            write_lines(root / f"{split}.jsonl", rows)
    if convention == "clipbert":
        labels = {answer: label for label, answer in enumerate(sorted(ANSWERS[:4]))}
        (root / "train_ans2label.json").write_text(json.dumps(labels))
    return root


def write_msrvtt_choice(root: Path, layout: Literal["data", "annotations", "microsoft"] = "data") -> Path:
    """Write a small MSRVTT multiple choice: the published test file, and captions for the other splits."""
    write_captions(write_msrvtt_clips(write_vocabulary(root)), layout)
    numbers = CLIPS["test"]
    rows = []
    for position, number in enumerate(numbers):
        options = [list_captions(numbers[(position + step) % len(numbers)])[0] for step in range(5)]
        correct = number % 5
        options[0], options[correct] = options[correct], options[0]
        rows.append({"qid": position, "clip_name": f"video{number}", "options": options, "answer": correct})
    write_lines(root / "msrvtt_mc_test.jsonl", rows)
    return root


def write_msrvtt_retrieval(root: Path, layout: Literal["data", "annotations", "microsoft"] = "data") -> Path:
    """Write a small MSRVTT retrieval: the clip lists of all protocols; the 1k-A test has two clips."""
    write_captions(write_msrvtt_clips(write_vocabulary(root)), layout)
    test = [7012, 7015]
    lists = {f"{split}.full": [*numbers] for split, numbers in CLIPS.items()}
    lists["train.7k"] = [*CLIPS["train"], *CLIPS["val"]]
    lists["train.9k"] = [number for split in CLIPS.values() for number in split if number not in test]
    for name, numbers in lists.items():
        write_table(root / f"MSRVTT_{name}.csv", [{"video_id": f"video{number}"} for number in numbers])
    write_table(
        root / "MSRVTT_JSFUSION_test.csv",
        [
            {"key": f"ret{i}", "vid_key": f"msr{n}", "video_id": f"video{n}", "sentence": f"is {n}, the man, in it"}
            for i, n in enumerate(test)
        ],
    )
    return root


def write_tgif(
    root: Path,
    part: Literal["frameqa", "action", "transition"] = "frameqa",
    convention: Literal["csv", "clipbert"] = "csv",
) -> Path:
    """Write a small TGIF-QA task with two questions per GIF: tables without validation, or jsonl files with it."""
    splits = {"train": TGIF_TRAIN, "test": TGIF_TEST} | ({"val": TGIF_VAL} if convention == "clipbert" else {})
    write_vocabulary(root)
    identifier = 0
    for split, names in splits.items():
        rows: list[dict[str, object]] = []
        for name in names:
            write_clip(root / "gifs" / f"{name}.gif", frames=5, size=(40, 30), codec="gif")
            for _ in range(2):
                rows.append(_build_tgif_row(name, identifier, part, convention))
                identifier += 1
        if convention == "csv":
            path = root / f"{split.capitalize()}_{part}_question.csv"
            write_table(path, rows, "\t", "\r\n")
        else:
            write_lines(root / f"{part}_{split}.jsonl", rows)
    return root


def _build_tgif_row(name: str, identifier: int, part: str, convention: str) -> dict[str, object]:
    row: dict[str, object] = {"gif_name": name, "question": f"what is the man doing {identifier % 3} ?"}
    if part == "frameqa":
        kinds, answer = ("object", "number", "color", "location"), ANSWERS[identifier % 5]
        if convention == "clipbert":
            return row | {"answer": answer, "answer_type": kinds[identifier % 4]}
        return row | {"answer": answer, "type": identifier % 4, "vid_id": f"FRAMEQA{identifier}", "key": 7,
                      "description": "a man ."}  # fmt: skip
    options = ANSWERS[identifier % 5 :] + ANSWERS[: identifier % 5]
    if convention == "clipbert":
        return row | {"options": options, "answer": identifier % 5}
    columns = {f"a{number}": option for number, option in enumerate(options, start=1)}
    return row | columns | {"answer": identifier % 5, "vid_id": f"{part.upper()}{identifier}", "key": 7}
