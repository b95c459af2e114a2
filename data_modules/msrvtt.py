"""MSR-VTT, what its three tasks share: clips, captions, categories, the split of a clip."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from cdc_mmpg.data.batch import Split
from cdc_mmpg.errors import DataError
from cdc_mmpg.files import write_listing
from data_modules.annotations import AnnotationRow, as_rows, choose_file, clips_in, find_file, is_file, read_json
from data_modules.base import VideoTextDataModule
from data_modules.domains import CATEGORIES, DomainKind

logger = logging.getLogger(__name__)

CLIP_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv")
CLIP_FOLDERS = ("videos/all", "videos", "TrainValVideo", "TestVideo", ".")
CLIP = re.compile(r"video([0-9]{1,9})")
CAPTION_FILES = ("MSRVTT_data.json", "MSR_VTT.json", "annotation/MSR_VTT.json")
MICROSOFTS = ("train_val_videodatainfo.json", "test_videodatainfo.json")  # the same layout in two files

GET_CLIPS = (
    "the clips video<N>.mp4 in videos/, videos/all/, or TrainValVideo/ and TestVideo/ "
    "(https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip)"
)
GET_CAPTIONS = (
    "the captions MSRVTT_data.json (https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip), or "
    "MSR_VTT.json (beside the clips in MSRVTT.zip; knows no categories), or Microsoft's train_val_videodatainfo.json "
    "and test_videodatainfo.json"
)
TERMS = "MSR-VTT is for research only; the clips remain YouTube's and their authors'"


class Captioned(NamedTuple):
    """What the caption files say."""

    captions: dict[str, list[str]]  # by clip, in the files' order
    categories: dict[str, int]  # by clip; empty where the files know none


def clip_name(row: AnnotationRow, *keys: str) -> str:
    """Return `video<N>`, which one convention writes out and the other as N.

    Raises:
        DataError: anything else, so also a name that leads out of the clips' folder.
    """
    name = row.value(*keys)
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"video{name}"
    if not isinstance(name, str) or not CLIP.fullmatch(name):
        raise row.refusal(keys, "the name of a clip, such as video7010")
    return name


def clip_number(clip: str) -> int:
    """Return N of `video<N>`."""
    return int(clip.removeprefix("video"))


def split_of(clip: str) -> Split | None:
    """Return the official split of a clip; None for those of a later edition."""
    number = clip_number(clip)
    if number < 7010:
        return "train" if number < 6513 else "val"
    return "test" if number < 10_000 else None


class MSRVTT(VideoTextDataModule):
    """MSR-VTT's clips and captions; see the tasks, `MSRVTTQA`, `MSRVTTChoice` and `MSRVTTRetrieval`.

    Args:
        see `VideoTextDataModule`.
    """

    DOMAINS: ClassVar[tuple[DomainKind, ...]] = ("casts", "corruptions", "categories")
    _counted = ""

    def find_clips(self) -> dict[str, Path]:
        """Return the clips on disk by their name; where several folders have one, that of the first."""
        found: dict[str, Path] = {}
        counts = []
        for folder in CLIP_FOLDERS:
            clips = {
                name: path for name, path in clips_in(self.root / folder, CLIP_SUFFIXES).items() if CLIP.fullmatch(name)
            }
            if clips:
                counts.append(f"{len(clips)} in {folder}")
            found = clips | found
        if not found:
            raise DataError(f"{self.root}: no clip video<N>.mp4 in any of {', '.join(CLIP_FOLDERS)}\n{self.remedy()}")
        if self._counted != str(counts):
            self._counted = str(counts)
            logger.info("%s: clips: %s", self.root, ", ".join(counts))
        return found

    @cached_property
    def captioned(self) -> Captioned:
        """All captions, without blanks around them; those that are nothing else are left out, and counted."""
        path = find_file(self.files(*CAPTION_FILES))
        paths = [path] if path else [path for path in self.files(*MICROSOFTS) if is_file(path)]
        if not paths:
            paths = [choose_file(self.files(*CAPTION_FILES, *MICROSOFTS), self.remedy())]
        captions: dict[str, list[str]] = {}
        categories: dict[str, int] = {}
        left_out: Counter[str] = Counter()
        for path in paths:
            content = read_json(path)
            for clip, caption in self._sentences(content, path):
                if split_of(clip) is None:
                    left_out["of clips beyond video9999"] += 1
                elif text := caption.strip():
                    captions.setdefault(clip, []).append(text)
                else:
                    left_out["blank"] += 1
            categories |= self._categories(content, path)
        logger.info(
            "%s: %d captions of %d clips%s", " and ".join(path.name for path in paths),
            sum(map(len, captions.values())), len(captions),
            "".join(f", {number} {reason} left out" for reason, number in left_out.items()),
        )  # fmt: skip
        return Captioned(captions, categories)

    def read_categories(self) -> dict[str, str]:
        """Read the category of every clip from the captions' files; see the base class."""
        there = find_file(self.files(*CAPTION_FILES, *MICROSOFTS))
        numbers = self.captioned.categories if there else {}
        if not numbers:
            raise DataError(
                f"{self.root}: no file says of which category a clip is, for domains=categories. It needs "
                f"{GET_CAPTIONS}. Or take ARGS=--data.init_args.domains=casts or corruptions"
            )
        if wrong := [f"{clip}: {number}" for clip, number in numbers.items() if not 0 <= number < len(CATEGORIES)]:
            raise DataError(
                f"{self.root}: clips whose category is none of 0 to {len(CATEGORIES) - 1}:"
                f"{write_listing(wrong, self.cache_dir / 'categories.txt')}\nfetch the captions' file again"
            )
        return {clip: CATEGORIES[number] for clip, number in numbers.items()}

    def _sentences(self, content: Any, path: Path) -> list[tuple[str, str]]:
        """Read clips and their captions."""
        for key, clip in (("sentences", "video_id"), ("annotations", "image_id")):
            if isinstance(content, dict) and key in content:
                return [(clip_name(row, clip), row.field(str, "caption")) for row in as_rows(content[key], path, key)]
        raise DataError(
            f"{path}: has neither sentences: [{{caption, video_id}}] nor annotations: [{{caption, image_id}}]: another "
            "convention than those that are read here"
        )

    def _categories(self, content: dict[str, Any], path: Path) -> dict[str, int]:
        """Read categories by clip, of those that have one."""
        rows = as_rows(content["videos"], path, "videos") if "videos" in content else []
        return {clip_name(row, "video_id"): row.field(int, "category") for row in rows if "category" in row.fields}

    def clips_by_number(self, split: Split) -> list[str]:
        """Return the captioned clips of an official split, in the order of their numbers."""
        return sorted((clip for clip in self.captioned.captions if split_of(clip) == split), key=clip_number)

    def files(self, *names: str) -> Sequence[Path]:
        """Return files below root."""
        return [self.root / name for name in names]
