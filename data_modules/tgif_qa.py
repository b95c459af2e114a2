"""Three tasks of TGIF-QA: questions about animated GIFs (Jang et al. 2017, 2019)."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import DataError
from data_modules.annotations import (
    AnnotationRow,
    Published,
    choose_file,
    find_file,
    list_clips,
    read_json_lines,
    read_table,
)
from data_modules.answers import Answers
from data_modules.base import VideoTextDataModule
from data_modules.clip_dataset import Sample
from data_modules.tasks import MultipleChoiceDataModule, VideoQADataModule

logger = logging.getLogger(__name__)

CLIP_SUFFIXES = (".gif", ".mp4", ".webm")
ANNOTATION_FOLDERS = (".", "dataset", "annotations")
CLIP_NAME_KEYS = ("gif_name", "video_id", "clip_name")
QUESTION_TYPES = ("object", "number", "color", "location")
OPTIONS = ("a1", "a2", "a3", "a4", "a5")


def is_held_out(clip: str) -> bool:
    """Return whether a training GIF is held out for validation: a tenth, by a hash of the name, on every machine."""
    return int(hashlib.sha256(clip.encode()).hexdigest(), 16) % 10 == 0


class TGIF(VideoTextDataModule):
    """TGIF-QA as distributed; its tasks are `TGIFFrameQA`, `TGIFAction` and `TGIFTransition`.

    Source: Jang et al. 2019, "Video Question Answering with Spatio-Temporal Reasoning" (IJCV; 2017 at CVPR),
    https://github.com/YunseokJANG/tgif-qa, on GIFs of Li et al. 2016, "TGIF: A New Dataset and Benchmark on Animated
    GIF Description", https://github.com/raingo/TGIF-Release; the jsonl files from Lei et al. 2021, ClipBERT
    (https://github.com/jayleicn/ClipBERT, scripts/download_tgif_qa.sh).

    Licence: questions for academic purposes, GIFs for non-commercial research; the GIFs remain Tumblr's and their
    authors'.

    Splits: there is no official validation split. If a file for it exists, it is read; otherwise the training GIFs
    whose name's sha256 is a multiple of 10 are held out, with all their questions.

    Deviation: the split that the paper describes (80K, 11K and 11K) is that of TGIF's captions; its 1,541 classes are
    TGIF-QA's FrameQA, which is read here.

    Files below `root`, in `dataset/` or in `annotations/`, each split in the first of these that exists:
    `tgif_<task>_{split}.jsonl`, `<task>_{split}.jsonl` (one object per line; the GIF is gif_name, video_id or
    clip_name), `{Train,Val,Test}_<task>_question.csv` (TAB-separated); `gifs/<gif_name>.gif` (or .mp4, .webm).
    `<task>` is frameqa, action or transition.

    Refused: names with a slash; an answer that is no index of a candidate; a type that is not one of the
    four.

    Args:
        see `VideoTextDataModule`.
    """

    part: ClassVar[str]  # name of the task in file names
    columns: ClassVar[tuple[str, ...]]  # columns of the csv files that are read

    def remedy(self) -> str:
        """Return what to fetch, from where, under which terms, and where to put it."""
        return (
            f"TGIF-QA belongs below {self.root.absolute()}: Train_{self.part}_question.csv and "
            f"Test_{self.part}_question.csv (https://github.com/YunseokJANG/tgif-qa, folder dataset; academic purposes "
            f"only), or {self.part}_train.jsonl, {self.part}_val.jsonl and {self.part}_test.jsonl "
            "(https://github.com/jayleicn/ClipBERT, scripts/download_tgif_qa.sh); gifs/<gif_name>.gif (linked from "
            "https://github.com/YunseokJANG/tgif-qa, dataset/README.md; non-commercial research only)"
        )

    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split; see the base class."""
        if split == "test" or find_file(self._paths("val")):
            return self._read(split)
        samples = self._read("train")
        chosen = [sample for sample in samples if is_held_out(sample.clip) == (split == "val")]
        if not chosen:
            raise DataError(
                f"{self.root}: no training GIF is in split {split}, by the hash of the names: add "
                f"{self.part}_val.jsonl\n{self.remedy()}"
            )
        if split == "val":
            logger.info(
                "%s: no validation file: held out %d of %d training GIFs by a hash of their name, with %d of %d "
                "questions", self.root, len({sample.clip for sample in chosen}),
                len({sample.clip for sample in samples}), len(chosen), len(samples),
            )  # fmt: skip
            self.notes["val"] = "a tenth of the training GIFs, held out by a hash of their name"
        return chosen

    def find_clips(self) -> dict[str, Path]:
        """Return the GIFs on disk by name."""
        gifs = list_clips(self.root / "gifs", CLIP_SUFFIXES)
        if not gifs:
            raise DataError(f"{self.root / 'gifs'}: no GIFs found\n{self.remedy()}")
        return gifs

    @abstractmethod
    def sample(self, row: AnnotationRow) -> Sample:
        """Return the sample of a row of either file format."""

    def _paths(self, split: Split) -> list[Path]:
        names = (
            f"tgif_{self.part}_{split}.jsonl",
            f"{self.part}_{split}.jsonl",
            f"{split.capitalize()}_{self.part}_question.csv",
        )
        return [self.root / folder / name for folder in ANNOTATION_FOLDERS for name in names]

    def _read(self, split: Split) -> list[Sample]:
        path = choose_file(self._paths(split), self.remedy())
        rows = read_json_lines(path) if path.suffix == ".jsonl" else read_table(path, self.columns, "\t")
        return [self.sample(row) for row in rows]


class TGIFFrameQA(TGIF, VideoQADataModule):
    """Open-ended questions that a single frame can answer; source, licence, files: see `TGIF`.

    Splits: 39,392 training questions (about a tenth of them held out for validation), 13,691 test.

    Vocabulary: `frameqa_trainval_ans2label.json`, `frameqa_train_ans2label.json` or `train_ans2label.json` ({answer:
    class}); otherwise the 1,540 answers of all training questions, including those held out for validation and those
    of a validation file. One class for the rest: 1,541. 98.2 % of the test answers are in it, the upper bound of any
    accuracy.

    Types: object, number, color, location (0 to 3 in the csv files).
    """

    part = "frameqa"
    columns = ("gif_name", "question", "answer", "type")
    PUBLISHED: ClassVar[Published] = {
        "official": {"train+val": {"questions": 39_392, "answers": 1_540}, "test": {"questions": 13_691}}
    }

    def sample(self, row: AnnotationRow) -> Sample:
        """Return the sample of a row; see `TGIF`."""
        clip, question, answer = row.clip(*CLIP_NAME_KEYS), row.field(str, "question"), row.line("answer")
        return Sample(clip, question, answer, self._type(row), id=row.question_id("vid_id"))

    def read_answers(self, training_answers: Iterable[str]) -> Answers:
        """Read the vocabulary; see the class."""
        names = ("frameqa_trainval_ans2label.json", "frameqa_train_ans2label.json", "train_ans2label.json")
        paths = [self.root / folder / name for folder in ANNOTATION_FOLDERS for name in names]
        if path := find_file(paths):
            return Answers.read(path, self.num_classes, training_answers)
        held_out = [sample.answer for sample in self.samples("val")]
        return Answers.read(paths[0], self.num_classes, [*training_answers, *held_out])

    def _type(self, row: AnnotationRow) -> str:
        """Return the type of a question; "" if a jsonl file states none."""
        stated = row.value("type", "answer_type")
        if stated is None:
            return ""
        if stated in QUESTION_TYPES:
            return str(stated)
        return QUESTION_TYPES[row.index_below(len(QUESTION_TYPES), "type", "answer_type")]


class TGIFChoice(TGIF, MultipleChoiceDataModule):
    """Questions with five candidates: `TGIFAction` and `TGIFTransition`."""

    columns = ("gif_name", "question", *OPTIONS, "answer")

    def sample(self, row: AnnotationRow) -> Sample:
        """Return the sample of a row; see `TGIF`."""
        has_list = "options" in row.fields
        options = row.texts(5, "options") if has_list else tuple(row.field(str, key) for key in OPTIONS)
        return Sample(
            row.clip(*CLIP_NAME_KEYS), row.field(str, "question"), options=options, right=row.index_below(5, "answer"),
            id=row.question_id("vid_id"),
        )  # fmt: skip


class TGIFAction(TGIFChoice):
    """Questions about the action that is done a given number of times; source, licence, files: see `TGIF`.

    Splits: 20,475 training questions (about a tenth of them held out for validation), 2,274 test; five candidates.
    The authors' repository has 20,471 training questions today: both editions are official, and `make data` reports
    which one is present.
    """

    part = "action"
    PUBLISHED: ClassVar[Published] = {
        "official": {
            "train+val": {"questions": {20_475: "as the paper counts", 20_471: "the authors' repository"}},
            "test": {"questions": 2_274},
        }
    }


class TGIFTransition(TGIFChoice):
    """Questions about what happens before or after something else; source, licence, files: see `TGIF`.

    Splits: 52,704 training questions (about a tenth of them held out for validation), 6,232 test; five candidates.
    """

    part = "transition"
    PUBLISHED: ClassVar[Published] = {"official": {"train+val": {"questions": 52_704}, "test": {"questions": 6_232}}}
