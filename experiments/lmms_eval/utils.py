"""MSVD-QA, MSRVTT-QA and TGIF-QA as tasks of lmms-eval: questions, videos, prompts, scores and predictions files.

Annotation files and videos are those that `data_modules` reads, below `data/` of the checkout. Scores are those of
`cdc_mmpg.evaluation.predictions`, which is not needed here: lmms-eval has an environment of its own.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "data"
# Folders and suffixes of videos by folder of `DATA`. Few models read GIFs, so a video of the same name has priority.
PLACES = {
    "msvd": (("YouTubeClips",), (".avi", ".mp4", ".mkv", ".webm")),
    "msrvtt": (("videos/all", "videos", "TrainValVideo", "TestVideo", "."), (".mp4", ".webm", ".avi", ".mkv")),
    "tgif": (("gifs",), (".mp4", ".webm", ".gif")),
}
LETTERS = "ABCDE"  # of options in a prompt
OPTIONS = ("a1", "a2", "a3", "a4", "a5")  # columns of TGIF-QA


def normalize_answer(text: str) -> str:
    """Return an answer in the form in which it is compared, as `cdc_mmpg.evaluation.predictions` does."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def prepare_msvd(docs: Any) -> Any:
    """Return MSVD-QA's questions with the names of their clips, which are in `youtube_mapping.txt`."""
    lines = (DATA / "msvd" / "youtube_mapping.txt").read_text(encoding="utf-8-sig").split("\n")
    names = {number: name for name, _, number in (line.strip().rpartition(" vid") for line in lines) if name}
    return _prepare(docs, "msvd", lambda row: names[str(row["video_id"])], "id")


def prepare_msrvtt(docs: Any) -> Any:
    """Return MSRVTT-QA's questions; the original files have a clip's number, ClipBERT's its name and no ids."""
    return _prepare(docs, "msrvtt", lambda row: "video" + str(row["video_id"]).removeprefix("video"), "id")


def prepare_frameqa(docs: Any) -> Any:
    """Return the questions of TGIF-QA's FrameQA."""
    return _prepare(docs, "tgif", lambda row: _unquote(row["gif_name"]), "vid_id")


def prepare_action(docs: Any) -> Any:
    """Return the questions of TGIF-QA's action task."""
    return _prepare(docs, "tgif_action", lambda row: _unquote(row["gif_name"]), "vid_id")


def prepare_transition(docs: Any) -> Any:
    """Return the questions of TGIF-QA's transition task."""
    return _prepare(docs, "tgif_transition", lambda row: _unquote(row["gif_name"]), "vid_id")


def _prepare(docs: Any, dataset: str, name_clip: Callable[[Mapping[str, Any]], str], key: str) -> Any:
    """Return the rows of an annotation file as documents: dataset, id, clip, question, answer, options.

    Args:
        docs: rows, a `datasets.Dataset`.
        dataset: name of the dataset in `experiments/datasets`; with rows for ids it gets the ending "_rows".
        name_clip: function that returns the name of a row's clip.
        key: column of the question's id; without it the id is the row's number, from 0.
    """

    def convert(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        options = [_unquote(row[column]) for column in OPTIONS if column in row]
        named = dataset if key in row else f"{dataset}_rows"
        return {
            "dataset": named, "id": str(row.get(key, number)), "clip": name_clip(row),
            "question": _unquote(row["question"]), "answer": _unquote(str(row["answer"])), "options": options,
        }  # fmt: skip

    return docs.map(convert, with_indices=True, remove_columns=docs.column_names)


def _unquote(field: str) -> str:
    """Return a TAB-separated field without the quotes around it, as `data_modules.annotations` reads it."""
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def find_video(doc: Mapping[str, Any]) -> list[str]:
    """Return the path of a question's video, in a list.

    Raises:
        FileNotFoundError: it is in none of the dataset's folders.
    """
    family = doc["dataset"].partition("_")[0]
    folders, suffixes = PLACES[family]
    for folder in folders:
        for suffix in suffixes:
            path = DATA / family / folder / (doc["clip"] + suffix)
            if path.is_file():
                return [str(path)]
    raise FileNotFoundError(
        f"{DATA / family}: no video {doc['clip']} with one of the suffixes {', '.join(suffixes)} in "
        f"{', '.join(folders)}: put it there, or make {DATA / family} a link to the dataset's folder"
    )


def write_prompt(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """Return the question, with its options by letter, and the instruction of the task."""
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"], strict=False)]
    lines = "\n".join([doc["question"], *options])
    return lmms_eval_specific_kwargs["pre_prompt"] + lines + lmms_eval_specific_kwargs["post_prompt"]


def score_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return whether the model's answer is right, and its line of the predictions file."""
    options = doc["options"]
    given = choose_option(results[0], options) if options else results[0]
    answer = options[int(given)] if options and given else given
    truth = options[int(doc["answer"])] if options else str(doc["answer"])
    right = normalize_answer(answer) != "" and normalize_answer(answer) == normalize_answer(truth)
    return {"exact_match": float(right), "predictions": {"dataset": doc["dataset"], "id": doc["id"], "answer": given}}


def choose_option(response: str, options: Sequence[str]) -> str:
    """Return the number, from 0, of the option that a response names by its text or letter; "" if it names none."""
    texts = [normalize_answer(option) for option in options]
    if normalize_answer(response) in texts:
        return str(texts.index(normalize_answer(response)))
    letter = re.fullmatch(rf"\(?([{LETTERS}])(?:[.:)].*)?", response.strip(), re.DOTALL)
    return str(LETTERS.index(letter[1])) if letter else ""


def write_predictions(items: Sequence[Mapping[str, str]], args: Any = None) -> None:
    """Write the answers for `make table PREDICTIONS=`: `<output_path>/<dataset>/<model>[-<arguments>].csv`."""
    folder = Path(getattr(args, "output_path", None) or ".") / items[0]["dataset"]
    folder.mkdir(parents=True, exist_ok=True)
    named = [str(value) for name in ("model", "model_args") if (value := getattr(args, name, None))]
    name = re.sub(r"[^A-Za-z0-9_.+]+", "-", "-".join(named))[:150].strip("-.") or "model"
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "answer"), *((item["id"], item["answer"]) for item in items)])
    print(f"PREDICTIONS={file.name}")
