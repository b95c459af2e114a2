"""MSVD-QA: open-ended questions about short YouTube clips (Xu et al. 2017)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdc_mmpg.batch import Split
from cdc_mmpg.errors import DataError
from data_modules.answers import Answers, read_text
from data_modules.base import Sample, VideoQADataModule

SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")


class MSVDQA(VideoQADataModule):
    """MSVD-QA as people have it on disk.

    Source: questions from Xu et al. 2017, "Video Question Answering via Gradually Refined Attention over Appearance
    and Motion" (https://github.com/xudejing/video-question-answering), made from the captions of MSVD (Chen and Dolan
    2011, "Collecting Highly Parallel Data for Paraphrase Evaluation"); clips from
    https://www.cs.utexas.edu/~ml/clamp/videoDescription/ (YouTubeClips.tar, 1.7 GB).

    Licence: for research; the clips remain YouTube's and their authors'.

    Splits: 30,933 / 6,415 / 13,157 questions on 1,161 / 245 / 504 of the 1,970 clips.

    Vocabulary: the 1,000 most frequent training answers, and one class for the rest: 1,001. 89.5 % of the validation
    and 90.8 % of the test answers are in it, the ceiling of any accuracy.

    Files below `root`: `{train,val,test}_qa.json` (a list of {answer, id, question, video_id}), `youtube_mapping.txt`
    (`<clip> vid<video_id>` a line), `answer_set.txt` (an answer a line; counted from the training questions where it
    is absent) and `YouTubeClips/<clip>.avi` (or .mp4, .mkv, .webm).

    The same clip and question occur with several answers: they stay separate questions.
    """

    def remedy(self) -> str:
        """What to fetch, from where, and where to put it."""
        return (
            f"MSVD-QA belongs below {self.root.absolute()}: train_qa.json, val_qa.json, test_qa.json, "
            "youtube_mapping.txt and answer_set.txt (questions: https://github.com/xudejing/video-question-answering) "
            "and YouTubeClips/*.avi (clips: https://www.cs.utexas.edu/~ml/clamp/videoDescription/)"
        )

    def read_split(self, split: Split) -> list[Sample]:
        """All samples of a split; see the base class."""
        return self.read_questions(f"{split}_qa.json")

    def read_questions(self, name: str) -> list[Sample]:
        """All samples of an annotation file; what its rows have beside, such as their id, is left unread."""
        names = self._read_mapping()
        path = self.root / name
        rows = self.read_json(path)
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{path}: holds a {type(rows).__name__}, not a list of questions; fetch it again")
        samples = []
        for number, row in enumerate(rows):
            where = f"{path}: [{number}]"
            if not isinstance(row, dict):
                raise DataError(f"{where} is a {type(row).__name__}, not a question {{answer, question, video_id}}")
            for key, kind in (("question", str), ("answer", str), ("video_id", int)):
                if not isinstance(row.get(key), kind):
                    raise DataError(f"{where}.{key} is {row.get(key)!r}, not a {kind.__name__}")
            if row["video_id"] not in names:
                raise DataError(f"{where}.video_id is {row['video_id']}, which youtube_mapping.txt does not name")
            samples.append(Sample(names[row["video_id"]], row["question"], row["answer"], str(row.get("type", ""))))
        return samples

    def read_json(self, path: Path) -> Any:
        """The content of an annotation file."""
        try:
            return json.loads(self._read(path))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}, column {error.colno}: {error.msg}: the file is damaged or cut short; "
                "fetch it again"
            ) from error

    def read_answers(self, training_answers: Sequence[str]) -> Answers:
        """The 1,000 answers of `answer_set.txt`; see the class."""
        return Answers.read(self.root / "answer_set.txt", self.num_classes, training_answers)

    def find_clips(self) -> dict[str, Path]:
        """The clips on disk by their name without suffix."""
        folder = self.root / "YouTubeClips"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder\n{self.remedy()}")
        files = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)  # .avi goes before .mp4
        return {path.stem: path for path in files if path.suffix.lower() in SUFFIXES}

    def _read_mapping(self) -> dict[int, str]:
        """Clip names by video id."""
        path = self.root / "youtube_mapping.txt"
        names: dict[int, str] = {}
        for number, line in enumerate(self._read(path).splitlines(), start=1):
            if not line.strip():
                continue
            name, _, vid = line.strip().rpartition(" ")
            if not name or not vid.startswith("vid") or not vid[3:].isdigit():
                raise DataError(f"{path}, line {number}: {line!r} is not '<clip> vid<number>'")
            if "/" in name or "\\" in name or name in (".", ".."):
                raise DataError(f"{path}, line {number}: {name!r} would lead out of the clips' folder; refused")
            names[int(vid[3:])] = name
        return names

    def _read(self, path: Path) -> str:
        """The text of an annotation file."""
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder\n{self.remedy()}")
        if not path.is_file():
            raise DataError(f"{path}: no such file\n{self.remedy()}")
        return read_text(path)
