"""MSRVTT multiple choice: select the caption of a clip among five (Yu et al. 2018)."""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import DataError
from data_modules.annotations import Published, choose_file, read_json_lines
from data_modules.clip_dataset import Sample
from data_modules.msrvtt import GET_CAPTIONS, GET_CLIPS, MSRVTT, TERMS, read_clip_name
from data_modules.tasks import MultipleChoiceDataModule

logger = logging.getLogger(__name__)

CHOICES = 5
MAX_CAPTION_DRAWS = 10_000  # draws until the captions of other clips count as too few or too similar


def draw_numbers(name: str) -> Iterator[int]:
    """Yield integers that depend on the name alone: random generators may change between library versions."""
    for number in itertools.count():
        yield int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:8], "big")


class MSRVTTChoice(MSRVTT, MultipleChoiceDataModule):
    """MSRVTT multiple choice as distributed, with training and validation items made from captions.

    Source: the test from Yu et al. 2018, "A Joint Sequence Fusion Model for Video Question Answering and Retrieval", as
    a jsonl file from Lei et al. 2021, ClipBERT (https://github.com/jayleicn/ClipBERT, scripts/download_msrvtt.sh), made
    from the captions of MSR-VTT (Xu et al. 2016, "MSR-VTT: A Large Video Description Dataset for Bridging Video and
    Language"); captions from https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip, clips from
    https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip.

    Licence: for research; the clips remain YouTube's and their authors'.

    Splits: only the test is distributed, 2,990 items on as many clips. For each of the 6,513 training clips (0-6512)
    and 497 validation clips (6513-7009), `ITEMS_PER_CLIP` captions become one item each, 32,565 and 2,485 in total
    (fewer if clips have fewer distinct captions). The wrong candidates are four captions of four other clips of the
    same split and of other categories, none of them equal to one of the clip's captions; a clip without a category
    counts as a category, and the log says so. The draws depend on the clip's name and the captions alone (and, with
    `domains`, on the held-out domains: unseen clips give no wrong candidates), so they are the same on every machine
    and in every run. The question is empty.

    Deviation: the paper takes negatives with other "activity-phrase labels", which MSR-VTT does not have; training and
    validation items take captions of clips of other categories.

    Files below `root`: `msrvtt_mc_test.jsonl` or `msrvtt_retrieval_mc_test.jsonl` (one {clip_name or video_id, options:
    [5], answer: 0 to 4} a line); `MSRVTT_data.json` (sentences: [{caption, video_id}], videos: [{video_id, category}]),
    or `MSR_VTT.json`, also in `annotation/` (annotations: [{caption, image_id}], no categories), or
    `train_val_videodatainfo.json` and `test_videodatainfo.json` in the layout of the first; clips `video<N>.mp4` (or
    .webm, .avi, .mkv) in `videos/`, `videos/all/`, `TrainValVideo/` and `TestVideo/`, or `root` itself.

    Refused: an answer that is no index of a candidate; other than five candidates; too few clips of other categories.
    """

    # An item takes five passes through the encoder: an epoch takes about as many as one of MSRVTT-QA.
    ITEMS_PER_CLIP: ClassVar[int] = 5
    PUBLISHED: ClassVar[Published] = {
        "official": {"train": {"clips": 6_513}, "val": {"clips": 497}, "test": {"questions": 2_990, "clips": 2_990}}
    }

    def remedy(self) -> str:
        """Return what to fetch, from where, under which terms, and where to put it."""
        return (
            f"MSRVTT multiple choice belongs below {self.root.absolute()}: msrvtt_retrieval_mc_test.jsonl "
            f"(https://github.com/jayleicn/ClipBERT, scripts/download_msrvtt.sh); {GET_CAPTIONS}; {GET_CLIPS}. {TERMS}"
        )

    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split; see the base class."""
        if split != "test":
            return self._draw_items(split)
        paths = self.files("msrvtt_mc_test.jsonl", "msrvtt_retrieval_mc_test.jsonl")
        rows = read_json_lines(choose_file(paths, self.remedy()))
        return [
            Sample(
                read_clip_name(row, "clip_name", "video_id"), "",
                options=row.texts(CHOICES, "options"), right=row.index_below(CHOICES, "answer"),
                id=row.question_id("qid"),
            )
            for row in rows
        ]  # fmt: skip

    def _draw_items(self, split: Split) -> list[Sample]:
        """Draw the items of a split from captions, see the class; refuse too few captions or categories."""
        clips, categories = self.list_captioned_clips(split), self.captioned.categories
        if not clips:
            raise DataError(f"{self.root}: no clip of split {split} has a caption\n{self.remedy()}")
        unknown = sum(clip not in categories for clip in clips)
        categories = {clip: categories.get(clip, -place) for place, clip in enumerate(clips, start=1)}
        # Captions of unseen domains would be wrong in every item, and training would learn that.
        sources = [clip for clip in clips if self.shift is None or not self.shift.is_unseen(clip)]
        sizes = Counter(categories[clip] for clip in sources)
        for clip, category in categories.items():
            if (fitting := len(sources) - sizes[category]) < CHOICES - 1:
                raise DataError(
                    f"{self.root}: for {clip}, only {fitting} of the {len(sources)} captioned clips of split {split} "
                    f"have another category, but an item needs {CHOICES - 1}\n{self.remedy()}"
                )
        samples = [sample for clip in clips for sample in self._draw_clip_items(clip, sources, categories)]
        others = "clips of other categories" + (f"; {unknown} have none and count as one each" if unknown else "")
        logger.info(
            "split %s: made %d items from the captions of %d clips, their wrong candidates from %s",
            split, len(samples), len(clips), others,
        )  # fmt: skip
        return samples

    def _draw_clip_items(self, clip: str, clips: list[str], categories: dict[str, int]) -> list[Sample]:
        """Draw the items of one clip, with wrong candidates from `clips`."""
        captions, draw, items = self.captioned.captions, draw_numbers(clip), []
        remaining = list(dict.fromkeys(captions[clip]))
        # Texts that differ only in case are equal in an uncased vocabulary.
        fitting = {caption.lower() for caption in remaining}
        for _ in range(min(self.ITEMS_PER_CLIP, len(remaining))):
            right = remaining.pop(next(draw) % len(remaining))
            options: dict[str, str] = {}  # by clip
            taken = set(fitting)
            for _ in range(MAX_CAPTION_DRAWS):
                other = clips[next(draw) % len(clips)]
                caption = captions[other][next(draw) % len(captions[other])]
                if other in options or categories[other] == categories[clip] or caption.lower() in taken:
                    continue
                options[other] = caption
                taken.add(caption.lower())
                if len(options) == CHOICES - 1:
                    break
            else:
                raise DataError(
                    f"{self.root}: {clip}: {MAX_CAPTION_DRAWS} draws of captions of other clips did not give "
                    f"{CHOICES - 1} that differ from the clip's captions and from each other\n{self.remedy()}"
                )
            place, texts = next(draw) % CHOICES, list(options.values())
            items.append(Sample(clip, "", options=(*texts[:place], right, *texts[place:]), right=place))
        return items
