"""The parts of MSR-VTT that its three tasks share: clips, captions, categories, splits."""

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
from data_modules.annotations import AnnotationRow, as_rows, choose_file, find_file, is_file, list_clips, read_json
from data_modules.base import VideoTextDataModule
from data_modules.domains import CATEGORIES, DomainKind

logger = logging.getLogger(__name__)

CLIP_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv")
CLIP_FOLDERS = ("videos/all", "videos", "TrainValVideo", "TestVideo", ".")
CLIP = re.compile(r"video([0-9]{1,9})")
CAPTION_FILES = ("MSRVTT_data.json", "MSR_VTT.json", "annotation/MSR_VTT.json")
MICROSOFT_CAPTION_FILES = ("train_val_videodatainfo.json", "test_videodatainfo.json")  # the same layout in two files

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


class CaptionedClips(NamedTuple):
    """The content of the caption files."""

    captions: dict[str, list[str]]  # by clip, in the files' order
    categories: dict[str, int]  # by clip; empty if the files have none


def read_clip_name(row: AnnotationRow, *keys: str) -> str:
    """Return the clip name `video<N>`; one file format has the name, the other N.

    Raises:
        DataError: it is anything else, such as a name that points outside the clips' folder.
    """
    name = row.value(*keys)
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"video{name}"
    if not isinstance(name, str) or not CLIP.fullmatch(name):
        raise row.refusal(keys, "the name of a clip, such as video7010")
    return name


def parse_clip_number(clip: str) -> int:
    """Return the number N of a clip `video<N>`."""
    return int(clip.removeprefix("video"))


def get_official_split(clip: str) -> Split | None:
    """Return the official split of a clip; None for clips of a later edition."""
    number = parse_clip_number(clip)
    if number < 7010:
        return "train" if number < 6513 else "val"
    return "test" if number < 10_000 else None


class MSRVTT(VideoTextDataModule):
    """MSR-VTT's clips and captions; its tasks are `MSRVTTQA`, `MSRVTTChoice` and `MSRVTTRetrieval`.

    Args:
        see `VideoTextDataModule`.
    """

    DOMAINS: ClassVar[tuple[DomainKind, ...]] = ("casts", "corruptions", "categories")
    _counted = ""

    def find_clips(self) -> dict[str, Path]:
        """Return the clips on disk by name; a clip in several folders is taken from the first."""
        found: dict[str, Path] = {}
        counts = []
        for folder in CLIP_FOLDERS:
            clips = list_clips(self.root / folder, CLIP_SUFFIXES)
            clips = {name: path for name, path in clips.items() if CLIP.fullmatch(name)}
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
    def captioned(self) -> CaptionedClips:
        """All captions, stripped of surrounding whitespace; blank ones are left out and counted."""
        path = find_file(self.files(*CAPTION_FILES))
        paths = [path] if path else [path for path in self.files(*MICROSOFT_CAPTION_FILES) if is_file(path)]
        if not paths:
            paths = [choose_file(self.files(*CAPTION_FILES, *MICROSOFT_CAPTION_FILES), self.remedy())]
        captions: dict[str, list[str]] = {}
        categories: dict[str, int] = {}
        left_out: Counter[str] = Counter()
        for path in paths:
            content = read_json(path)
            for clip, caption in self._read_captions(content, path):
                if get_official_split(clip) is None:
                    left_out["of clips beyond video9999"] += 1
                elif text := caption.strip():
                    captions.setdefault(clip, []).append(text)
                else:
                    left_out["blank"] += 1
            categories |= self._read_category_numbers(content, path)
        logger.info(
            "%s: %d captions of %d clips%s", " and ".join(path.name for path in paths),
            sum(map(len, captions.values())), len(captions),
            "".join(f", {number} {reason} left out" for reason, number in left_out.items()),
        )  # fmt: skip
        return CaptionedClips(captions, categories)

    def read_categories(self) -> dict[str, str]:
        """Read the category of every clip from the caption files; see the base class."""
        caption_file = find_file(self.files(*CAPTION_FILES, *MICROSOFT_CAPTION_FILES))
        numbers = self.captioned.categories if caption_file else {}
        if not numbers:
            raise DataError(
                f"{self.root}: no file has the categories of clips, which domains=categories needs. Get "
                f"{GET_CAPTIONS}. Or use ARGS=--data.init_args.domains=casts or corruptions"
            )
        if wrong := [f"{clip}: {number}" for clip, number in numbers.items() if not 0 <= number < len(CATEGORIES)]:
            raise DataError(
                f"{self.root}: clips whose category is not from 0 to {len(CATEGORIES) - 1}:"
                f"{write_listing(wrong, self.cache_dir / 'categories.txt')}\nfetch the caption file again"
            )
        return {clip: CATEGORIES[number] for clip, number in numbers.items()}

    def _read_captions(self, content: Any, path: Path) -> list[tuple[str, str]]:
        """Read pairs of clip and caption from the content of a caption file."""
        for key, clip_key in (("sentences", "video_id"), ("annotations", "image_id")):
            if isinstance(content, dict) and key in content:
                rows = as_rows(content[key], path, key)
                return [(read_clip_name(row, clip_key), row.field(str, "caption")) for row in rows]
        raise DataError(
            f"{path}: has neither sentences: [{{caption, video_id}}] nor annotations: [{{caption, image_id}}]: "
            "unsupported format"
        )

    def _read_category_numbers(self, content: dict[str, Any], path: Path) -> dict[str, int]:
        """Read the category by clip, for clips that have one."""
        rows = as_rows(content["videos"], path, "videos") if "videos" in content else []
        return {read_clip_name(row, "video_id"): row.field(int, "category") for row in rows if "category" in row.fields}

    def list_captioned_clips(self, split: Split) -> list[str]:
        """List the captioned clips of an official split, in the order of their numbers."""
        clips = (clip for clip in self.captioned.captions if get_official_split(clip) == split)
        return sorted(clips, key=parse_clip_number)

    def files(self, *names: str) -> Sequence[Path]:
        """Return the paths of files below root."""
        return [self.root / name for name in names]
