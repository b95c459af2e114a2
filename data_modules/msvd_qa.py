"""MSVD-QA: open-ended questions about short YouTube clips (Xu et al. 2017)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import DataError
from data_modules.annotations import (
    PLAIN_NAME,
    Published,
    as_rows,
    choose_file,
    is_outside_folder,
    list_clips,
    read_json,
    read_question_type,
    read_text,
)
from data_modules.answers import Answers
from data_modules.clip_dataset import Sample
from data_modules.tasks import VideoQADataModule

CLIP_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")


class MSVDQA(VideoQADataModule):
    """MSVD-QA as distributed.

    Source: questions from Xu et al. 2017, "Video Question Answering via Gradually Refined Attention over Appearance
    and Motion" (https://github.com/xudejing/video-question-answering), made from the captions of MSVD (Chen and Dolan
    2011, "Collecting Highly Parallel Data for Paraphrase Evaluation"); clips from
    https://www.cs.utexas.edu/~ml/clamp/videoDescription/ (YouTubeClips.tar, 1.7 GB).

    Licence: for research; the clips remain YouTube's and their authors'.

    Splits: 30,933 / 6,415 / 13,157 questions on 1,161 / 245 / 504 of the 1,970 clips.

    Vocabulary: the 1,000 most frequent training answers, and one class for the rest: 1,001. 89.5 % of the validation
    and 90.8 % of the test answers are in it, the upper bound of any accuracy.

    Types: what, who, how, when, where, by the question's first word, or other.

    Files below `root`: `{train,val,test}_qa.json` (a list of {answer, id, question, video_id}), `youtube_mapping.txt`
    (`<clip> vid<video_id>` per line), `answer_set.txt` (one answer per line; counted from the training questions if it
    is absent) and `YouTubeClips/<clip>.avi` (or .mp4, .mkv, .webm).

    Refused: a question whose clip is not in the mapping; a clip name with a slash.

    If the same clip and question occur with several answers, they stay separate questions.
    """

    PUBLISHED: ClassVar[Published] = {
        "official": {
            "train": {"questions": 30_933, "clips": 1_161, "answers": 1_000},
            "val": {"questions": 6_415, "clips": 245},
            "test": {"questions": 13_157, "clips": 504},
        }
    }

    def remedy(self) -> str:
        """Return what to fetch, from where, under which terms, and where to put it."""
        return (
            f"MSVD-QA belongs below {self.root.absolute()}: train_qa.json, val_qa.json, test_qa.json, "
            "youtube_mapping.txt and answer_set.txt (questions: https://github.com/xudejing/video-question-answering) "
            "and YouTubeClips/*.avi (clips: https://www.cs.utexas.edu/~ml/clamp/videoDescription/); for research only"
        )

    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split; see the base class."""
        return self.read_questions(f"{split}_qa.json")

    def read_questions(self, name: str) -> list[Sample]:
        """Read all samples of an annotation file; other fields of its rows are ignored."""
        names = self._read_mapping()
        path = self.root / name
        samples = []
        for row in as_rows(self.read_json(path), path):
            question, answer, number = row.field(str, "question"), row.line("answer"), row.field(int, "video_id")
            if number not in names:
                raise row.refusal(["video_id"], "a clip in youtube_mapping.txt")
            kind = read_question_type(row, question)
            samples.append(Sample(names[number], question, answer, kind, id=row.question_id("id")))
        return samples

    def read_json(self, path: Path) -> Any:
        """Read the content of an annotation file."""
        return read_json(choose_file([path], self.remedy()))

    def read_answers(self, training_answers: Iterable[str]) -> Answers:
        """Read the 1,000 answers of `answer_set.txt`; see the class."""
        return Answers.read(self.root / "answer_set.txt", self.num_classes, training_answers)

    def find_clips(self) -> dict[str, Path]:
        """Return the clips on disk by name without suffix."""
        folder = self.root / "YouTubeClips"
        if not (found := list_clips(folder, CLIP_SUFFIXES)) and not folder.is_dir():
            raise DataError(f"{folder}: no such folder\n{self.remedy()}")
        return found

    def _read_mapping(self) -> dict[int, str]:
        """Read clip names by video id."""
        path = choose_file([self.root / "youtube_mapping.txt"], self.remedy())
        names: dict[int, str] = {}
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            parts = re.fullmatch(r"(.+) vid([0-9]{1,9})", line.strip())
            if not parts:
                raise DataError(f"{path}, line {number}: {line!r} is not '<clip> vid<number>'; fetch it again")
            name, vid = parts[1], int(parts[2])
            if is_outside_folder(name):
                raise DataError(f"{path}, line {number}: {name!r} is not {PLAIN_NAME}: fix the file, or fetch it again")
            if names.setdefault(vid, name) != name:
                raise DataError(f"{path}, line {number}: vid{vid} is {name!r}, but {names[vid]!r} above; fix the file")
        return names
