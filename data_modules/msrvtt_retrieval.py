"""MSRVTT retrieval: the clip for a caption and the caption for a clip (Xu et al. 2016)."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import DataError
from data_modules.annotations import AnnotationRow, Published, choose_file, find_file, read_table
from data_modules.clip_dataset import Sample
from data_modules.msrvtt import GET_CAPTIONS, GET_CLIPS, MSRVTT, TERMS, read_clip_name
from data_modules.tasks import RetrievalDataModule

logger = logging.getLogger(__name__)

VALIDATION_CLIPS = 500
MIN_WHOLE_LIST_CLIPS = 5_000  # a training list with fewer clips is incomplete


class MSRVTTRetrieval(MSRVTT, RetrievalDataModule):
    """MSR-VTT's clips with their captions, in three protocols.

    Source: Xu et al. 2016, "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language"; the split 1k-A
    from Yu et al. 2018, "A Joint Sequence Fusion Model for Video Question Answering and Retrieval"; captions and lists
    from https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip, the full lists from
    https://github.com/CryhanFang/CLIP2Video, clips from
    https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip.

    Licence: for research; the clips remain YouTube's and their authors'.

    Splits, by `protocol`:
        full: 6,513 / 497 / 2,990 clips, from `MSRVTT_{train,val,test}.full.csv` or, if that is absent, by number
            (0-6512, 6513-7009, 7010-9999), each with all of its 20 captions.
        9k: the 9,000 clips of `MSRVTT_train.9k.csv`; test 1k-A: the 1,000 clips of `MSRVTT_JSFUSION_test.csv`, each
            with the one caption of that file.
        7k: the 7,010 clips of `MSRVTT_train.7k.csv`; test 1k-A.
    9k and 7k have no validation split: the 500 clips of the training list whose names have the smallest sha256 are held
    out for it (a tenth of a list with fewer than 5,000), so that training has 8,500 and 6,510.

    Files below `root`: the lists of the protocol (a column video_id; 1k-A: key, vid_key, video_id, sentence);
    `MSRVTT_data.json` (sentences: [{caption, video_id}]), or `MSR_VTT.json`, also in `annotation/` (annotations:
    [{caption, image_id}]), or `train_val_videodatainfo.json` and `test_videodatainfo.json` in the layout of the first;
    clips `video<N>.mp4` (or .webm, .avi, .mkv) in `videos/`, `videos/all/`, `TrainValVideo/` and
    `TestVideo/`, or `root` itself.

    Refused: a list with a clip twice, or with a clip without a caption (left out with `only_present`).
    """

    PROTOCOLS = ("full", "9k", "7k")
    PUBLISHED: ClassVar[Published] = {
        "full": {
            "train": {"questions": 130_260, "clips": 6_513},
            "val": {"questions": 9_940, "clips": 497},
            "test": {"questions": 59_800, "clips": 2_990},
        },
        "9k": {"train+val": {"questions": 180_000, "clips": 9_000}, "test": {"questions": 1_000, "clips": 1_000}},
        "7k": {"train+val": {"questions": 140_200, "clips": 7_010}, "test": {"questions": 1_000, "clips": 1_000}},
    }

    def remedy(self) -> str:
        """Return what to fetch, from where, under which terms, and where to put it."""
        lists = f"MSRVTT_train.{self.protocol}.csv, MSRVTT_JSFUSION_test.csv and " if self.protocol != "full" else ""
        return f"MSRVTT retrieval belongs below {self.root.absolute()}: {lists}{GET_CAPTIONS}; {GET_CLIPS}. {TERMS}"

    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split; see the base class."""
        if self.protocol == "full":
            path = find_file(self.files(f"MSRVTT_{split}.full.csv"))
            samples = self._attach_captions(
                [clip for clip, _ in _read_list(path)] if path else self.list_captioned_clips(split)
            )
            source = path.name if path else "the clips' numbers"
        elif split == "test":
            path = choose_file(self.files("MSRVTT_JSFUSION_test.csv"), self.remedy())
            samples = [Sample(clip, "", options=(_read_caption(row),)) for clip, row in _read_list(path, "sentence")]
            source = path.name
        else:
            path = choose_file(self.files(f"MSRVTT_train.{self.protocol}.csv"), self.remedy())
            listed = [clip for clip, _ in _read_list(path)]
            number = VALIDATION_CLIPS if len(listed) >= MIN_WHOLE_LIST_CLIPS else max(1, len(listed) // 10)
            held_out = set(sorted(listed, key=lambda clip: hashlib.sha256(clip.encode()).digest())[:number])
            samples = self._attach_captions([clip for clip in listed if (clip in held_out) == (split == "val")])
            source = f"{path.name}, of whose {len(listed)} clips {number} are held out for validation"
        if not samples:
            raise DataError(f"{self.root}: no clip of split {split} has a caption\n{self.remedy()}")
        logger.info(
            "protocol %s, split %s: %d clips with %d captions, by %s", self.protocol, split, len(samples),
            self.count_questions(samples), source,
        )  # fmt: skip
        self.notes[split] = f"protocol {self.protocol}, by {source}"
        return samples

    def _attach_captions(self, clips: Sequence[str]) -> list[Sample]:
        """Build the samples of clips with their captions in file order; refuse one without unless `only_present`."""
        captions = self.captioned.captions
        missing = [clip for clip in clips if clip not in captions]
        if missing and self.only_present:
            logger.warning("%d of %d clips have no caption: left out", len(missing), len(clips))
        elif missing:
            raise DataError(
                f"{self.root}: {len(missing)} of {len(clips)} clips have no caption, among them "
                f"{', '.join(missing[:5])}\n"
                f"{self.remedy()}"
            )
        return [Sample(clip, "", options=tuple(captions[clip])) for clip in clips if clip in captions]


def _read_list(path: Path, *columns: str) -> list[tuple[str, AnnotationRow]]:
    """Read the clips of a list with their rows; refuse a repeated clip."""
    rows: dict[str, AnnotationRow] = {}
    for row in read_table(path, ["video_id", *columns]):
        clip = read_clip_name(row, "video_id")
        if clip in rows:
            raise DataError(f"{row.place}: {clip} occurs a second time; fix the file, or fetch it again")
        rows[clip] = row
    return list(rows.items())


def _read_caption(row: AnnotationRow) -> str:
    """Return the caption of a row; refuse a blank one."""
    sentence = row.field(str, "sentence").strip()
    if not sentence:
        raise row.refusal(["sentence"], "a caption")
    return sentence
