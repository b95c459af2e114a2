"""MSRVTT-QA: open-ended questions about web video clips (Xu et al. 2017)."""

from collections.abc import Iterable
from typing import ClassVar

from cdc_mmpg.data.batch import Split
from data_modules.annotations import (
    Published,
    choose_file,
    find_file,
    read_json_lines,
    read_json_list,
    read_question_type,
)
from data_modules.answers import Answers
from data_modules.clip_dataset import Sample
from data_modules.msrvtt import GET_CLIPS, MSRVTT, TERMS, read_clip_name
from data_modules.tasks import VideoQADataModule


class MSRVTTQA(MSRVTT, VideoQADataModule):
    """MSRVTT-QA as distributed, in either of two file formats.

    Source: questions from Xu et al. 2017, "Video Question Answering via Gradually Refined Attention over Appearance
    and Motion" (https://github.com/xudejing/video-question-answering), made from the captions of MSR-VTT (Xu et al.
    2016, "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language"); the jsonl files from Lei et al.
    2021, ClipBERT (https://github.com/jayleicn/ClipBERT, scripts/download_msrvtt.sh); clips from
    https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip.

    Licence: for research; the clips remain YouTube's and their authors'.

    Splits: 158,581 / 12,278 / 72,821 questions on the clips 0-6512 / 6513-7009 / 7010-9999 (6,513 / 497 / 2,990).

    Vocabulary: the 1,500 most frequent training answers, and one class for the rest: 1,501. 93.0 % of the validation
    and 93.1 % of the test answers are in it, the upper bound of any accuracy.

    Types: what, who, how, when, where, as stated in the jsonl files or by the question's first word, or other.

    Files below `root`, each split in the first of these that exists: `{train,val,test}_qa.json` (a list of {answer,
    category_id, id, question, video_id: 7010}), `msrvtt_qa_{split}.jsonl` or `{split}.jsonl` ({answer, question,
    video_id: "video7010", answer_type} per line); `msrvtt_train_ans2label.json` or `train_ans2label.json` ({answer:
    class}; counted from the training questions if both are absent); clips `video<N>.mp4` (or .webm, .avi, .mkv) in
    `videos/`, `videos/all/`, `TrainValVideo/` and `TestVideo/`, or `root` itself; for `domains: categories` also
    `MSRVTT_data.json`.

    Refused: a video_id that is not a clip name; a vocabulary whose classes are not 0, 1, 2 and so on, each once.

    If the same clip and question occur with several answers, they stay separate questions.
    """

    PUBLISHED: ClassVar[Published] = {
        "official": {
            "train": {"questions": 158_581, "clips": 6_513, "answers": 1_500},
            "val": {"questions": 12_278, "clips": 497},
            "test": {"questions": 72_821, "clips": 2_990},
        }
    }

    def remedy(self) -> str:
        """Return what to fetch, from where, under which terms, and where to put it."""
        return (
            f"MSRVTT-QA belongs below {self.root.absolute()}: train_qa.json, val_qa.json and test_qa.json "
            "(https://github.com/xudejing/video-question-answering), or train.jsonl, val.jsonl, test.jsonl and "
            "train_ans2label.json (https://github.com/jayleicn/ClipBERT, scripts/download_msrvtt.sh); "
            f"{GET_CLIPS}. {TERMS}"
        )

    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split; see the base class."""
        names = (f"{split}_qa.json", f"msrvtt_qa_{split}.jsonl", f"{split}.jsonl")
        path = choose_file(self.files(*names), self.remedy())
        samples = []
        for row in read_json_lines(path) if path.suffix == ".jsonl" else read_json_list(path):
            clip, question, answer = read_clip_name(row, "video_id"), row.field(str, "question"), row.line("answer")
            kind = read_question_type(row, question)
            samples.append(Sample(clip, question, answer, kind, id=row.question_id("id")))
        return samples

    def read_answers(self, training_answers: Iterable[str]) -> Answers:
        """Read the 1,500 answers of the vocabulary file; see the class."""
        paths = self.files("msrvtt_train_ans2label.json", "train_ans2label.json")
        return Answers.read(find_file(paths) or paths[0], self.num_classes, training_answers)
