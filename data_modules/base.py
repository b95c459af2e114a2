"""What every dataset of clips with texts shares: checks, frames, text, order, batches."""

import hashlib
import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdc_mmpg.data.batch import (
    SPLITS,
    UNKNOWN,
    Captions,
    EpochDataModule,
    Example,
    Origin,
    Sessions,
    Split,
    Task,
    VideoTextBatch,
    View,
    draw_text,
)
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import write_listing
from cdc_mmpg.media.frames import CANDIDATES, Frames, crop_place, middle_candidates
from cdc_mmpg.media.text import TextEncoder, pad
from cdc_mmpg.media.video import Decoder
from cdc_mmpg.processors import count_processors
from data_modules.annotations import Published, leads_out
from data_modules.cache import FrameCache
from data_modules.device_cache import DeviceCache, empty_frames
from data_modules.domains import Kind, Shift, unseen_domains

logger = logging.getLogger(__name__)

Texts = Sequence[Sequence[int]]  # of one sample: a question, candidates or captions, as WordPieces


class Sample(NamedTuple):
    """What a split has about a clip, as an annotation has it."""

    clip: str  # name of the clip in the annotation
    question: str  # "" where there is none
    answer: str = ""  # of an open-ended question
    type: str = ""  # of the question, where there are types
    options: tuple[str, ...] = ()  # candidates of a multiple choice, or the clip's captions
    right: int = 0  # which of the candidates is right


class ClipDataset(Dataset[VideoTextBatch]):
    """The samples of a split as batches; an item is fetched by (epoch, index), which decide its augmentation.

    Args:
        samples: the split.
        texts: each sample's texts.
        labels: (N,) each sample's class, or the place of the right candidate.
        cache: the clips' frames.
        augment: draw frames within their segments and a place for the crop; else the middles.
        draw: of several texts take one in training, another every epoch.
        seed: of the draws.
        shift: the clips' domains, which change what is read; None where there are none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        texts: Sequence[Texts],
        labels: Tensor,
        cache: FrameCache,
        augment: bool = False,
        draw: bool = False,
        seed: int = 0,
        shift: Shift | None = None,
    ) -> None:
        self.samples, self.texts, self.labels = samples, texts, labels
        self.cache, self.augment, self.draw, self.seed, self.shift = cache, augment, draw, seed, shift

    def augmented(self, augment: bool) -> "ClipDataset":
        """The same samples, augmented or not."""
        return type(self)(self.samples, self.texts, self.labels, self.cache, augment, self.draw, self.seed, self.shift)

    def __len__(self) -> int:
        return len(self.samples)

    def frames(self, epoch: int, index: int) -> Tensor:
        """(T, S, S, 3) uint8."""
        size = self.cache.image_size
        frames = empty_frames(self.cache.num_frames, size, size, 3)
        self._read(epoch, index, frames.numpy())
        return frames

    def _read(self, epoch: int, index: int, frames: Frames) -> None:
        """Read a sample's frames into their place (T, S, S, 3) in a batch: no more than is seen of them."""
        clip, size = self.samples[index].clip, self.cache.image_size
        kept = self.cache.array(clip)
        chosen, top, left = self._draw(epoch, index, kept.shape)
        if self.shift is not None and self.shift.effect(clip):
            frames[:] = self.shift.changed(clip, kept[chosen])[:, top : top + size, left : left + size]
            return
        for place, number in enumerate(chosen):
            frames[place] = kept[number, top : top + size, left : left + size]

    def _draw(self, epoch: int, index: int, shape: Sequence[int]) -> tuple[list[int], int, int]:
        """Draw which of a clip's kept frames (K, H, W, 3) a sample has, and row and column where its square begins."""
        generator, each = None, self.cache.candidates
        chosen = middle_candidates(self.cache.num_frames, each)
        if self.augment:
            generator = np.random.default_rng((self.seed, epoch, index))
            starts = range(0, self.cache.num_frames * each, each)
            drawn = generator.integers(each, size=len(starts)).tolist()
            chosen = [start + place for start, place in zip(starts, drawn, strict=True)]
        top, left = crop_place(shape[1], shape[2], self.cache.image_size, generator)
        return self.cache.indices(shape[0], chosen), top, left

    def _batch(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """Return the samples' frames, (B, T, S, S, 3), or where they lie on the device; see `DeviceCache.gather`."""
        number, size = self.cache.num_frames, self.cache.image_size
        if isinstance(self.cache, DeviceCache):
            return torch.tensor([self._crops(self.cache, epoch, index) for epoch, index in items])
        frames = empty_frames(len(items), number, size, size, 3)
        for (epoch, index), place in zip(items, frames.numpy(), strict=True):
            self._read(epoch, index, place)
        return frames

    def _crops(self, cache: DeviceCache, epoch: int, index: int) -> list[tuple[int, int]]:
        """Return where a sample's frames lie, (T, 2)."""
        offset, shape = cache.places[self.samples[index].clip]
        chosen, top, left = self._draw(epoch, index, shape)
        _, height, width, channels = shape
        row = width * channels
        return [(offset + (number * height + top) * row + left * channels, row) for number in chosen]

    def drawn(self, epoch: int, index: int) -> Texts:
        """A sample's texts, or in training the one that is this epoch's."""
        texts = self.texts[index]
        if not (self.draw and self.augment):
            return texts
        return [texts[draw_text(self.seed, epoch, index, len(texts))]]

    def collate(self, texts: Sequence[Texts]) -> tuple[Tensor, Tensor]:
        """Ids and mask of a batch's texts, (B, K, L): rows of zeros where a sample has fewer than K."""
        most = max(map(len, texts))
        ids, mask = pad([text for own in texts for text in [*own, *[[]] * (most - len(own))]])
        return torch.from_numpy(ids).unflatten(0, (-1, most)), torch.from_numpy(mask).unflatten(0, (-1, most))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> VideoTextBatch:
        where = torch.tensor([index for _, index in items])
        ids, mask = self.collate([self.drawn(epoch, i) for epoch, i in items])
        return VideoTextBatch(self._batch(items), ids, mask, self.labels[where], where)


class QADataset(ClipDataset):
    """Every sample has one text, its question."""

    def collate(self, texts: Sequence[Texts]) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask."""
        ids, mask = pad([text for (text,) in texts])
        return torch.from_numpy(ids), torch.from_numpy(mask)


class VideoTextDataModule(EpochDataModule):
    """Clips with texts: a subclass says what the task is (see `tasks`), a subclass of that reads annotations.

    Splits that share a clip are refused. Clips are decoded once, into the frame cache, before training; a clip that
    changed since is refused by name.

    Args:
        root: the dataset's folder.
        cache_dir: where frames and features are kept.
        num_classes: of open-ended questions: the known answers, plus one class for all others.
        protocol: which of the dataset's published splits; None is the first of `PROTOCOLS`.
        num_frames: T, frames that the model sees of a clip.
        image_size: pixels of a side of what it sees.
        resize: pixels to which the shorter side of a frame is resized before the crop; None is 268/224 of image_size.
        candidates: frames that the cache keeps of each of the T segments of a clip; training takes any of them.
        batch_size: samples of an optimizer step, over all devices and accumulated batches.
        per_device: most of them that a device holds at once; None is its whole share. The rest is accumulated.
        num_workers: processes that load batches; None is `EpochDataModule.loading_processes`.
        frame_cache: where batches are read from. "device" keeps the frames of all clips in the memory of the device
            that computes (a GPU's, or the machine's), where they fit, and needs no processes that load: the same
            frames, see `device_cache`.
        vocab: a local `vocab.txt`; None fetches bert-base-uncased's from the hub.
        text_length: most tokens in a text.
        decoder: see `cdc_mmpg.media.video`.
        max_missing: how many clips may be absent or unreadable; their samples are left out, and counted. More
            refuse the run, all named.
        only_present: take the samples whose clips are there and leave out the others: for partial copies.
        domains: what stands for devices, see `data_modules.domains`. A clip's domain is the same in all splits. Clips
            of domains that are held out leave training and validation; the test keeps all, and tells those unseen from
            those seen. Every domain's unlabelled clips are its training clips. The answer vocabulary stays the whole
            dataset's.
        held_out: names of the domains that training does not see; None is about a fifth, see `domains.HELD_OUT`.
        seed: of the order and the augmentation.
    """

    task: ClassVar[Task]
    views: ClassVar[frozenset[View]] = frozenset({"samples"})  # what methods can read of it
    DOMAINS: ClassVar[tuple[Kind, ...]] = ("casts", "corruptions")  # that it can be given; none where it knows devices
    PROTOCOLS: ClassVar[tuple[str, ...]] = ("official",)
    # Questions (or captions), clips and answers with a class of each split, by protocol; the questions and clips of
    # splits that were published together, such as "train+val", are added up.
    PUBLISHED: ClassVar[Published] = {}

    def __init__(
        self,
        root: str,
        cache_dir: str,
        num_classes: int | None = None,
        protocol: str | None = None,
        num_frames: int = 3,
        image_size: int = 224,
        resize: int | None = None,
        candidates: int = CANDIDATES,
        batch_size: int = 256,
        per_device: int | None = None,
        num_workers: int | None = None,
        frame_cache: Literal["disk", "device"] = "disk",
        vocab: str | None = None,
        text_length: int = 40,
        decoder: Decoder = "pyav",
        max_missing: int = 0,
        only_present: bool = False,
        domains: Kind | None = None,
        held_out: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, per_device)
        if resize is not None and resize < image_size:
            raise ConfigError(
                f"data.init_args.resize is {resize}, less than image_size ({image_size}), which is cut out"
            )
        for name, value, least in (
            ("num_frames", num_frames, 1), ("batch_size", batch_size, 1), ("candidates", candidates, 1),
            ("per_device", 1 if per_device is None else per_device, 1),
            ("num_workers", num_workers or 0, 0), ("max_missing", max_missing, 0), ("text_length", text_length, 3),
            ("num_classes", 2 if num_classes is None else num_classes, 2),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"data.init_args.{name} is {value}: at least {least}")
        if protocol not in (None, *self.PROTOCOLS):
            raise ConfigError(f"data.init_args.protocol is {protocol!r}: one of {', '.join(self.PROTOCOLS)}")
        if (num_classes is None) == (self.task == "open_ended"):
            raise ConfigError(
                f"data.init_args.num_classes is {num_classes}: open-ended questions have classes, the other tasks none"
            )
        if domains is not None and domains not in self.DOMAINS:
            raise ConfigError(
                f"data.init_args.domains is {domains!r}, but {type(self).__name__} "
                + (f"can be given {' or '.join(self.DOMAINS)}" if self.DOMAINS else "has devices of its own")
            )
        if domains is None and held_out is not None:
            raise ConfigError("data.init_args.held_out names domains, but data.init_args.domains gives none")
        if frame_cache == "device" and domains not in (None, "categories"):
            raise ConfigError(
                f"data.init_args.domains is {domains}, which change frames when they are read from the disk, and "
                "data.init_args.frame_cache is device, where nothing is read any more: leave them on the disk "
                "(FRAME_CACHE=disk)"
            )
        self.domains, self.held_out = domains, unseen_domains(domains, held_out) if domains else []
        self.root, self.cache_dir = Path(root).expanduser(), Path(cache_dir).expanduser()
        self.protocol, self.num_classes = protocol or self.PROTOCOLS[0], num_classes or 0
        self.num_workers = 0 if frame_cache == "device" else num_workers
        self.vocab, self.text_length = vocab, text_length
        self.max_missing, self.only_present = max_missing, only_present
        kind = DeviceCache if frame_cache == "device" else FrameCache
        self.cache = kind(self.cache_dir / "frames", num_frames, image_size, decoder, resize, candidates)
        self.notes: dict[Split, str] = {}  # where a split comes from, where that has to be said; `read_split` fills it
        self._annotated: dict[Split, list[Sample]] = {}
        self._kept: dict[Split, list[Sample]] = {}
        self._splits: dict[Split, ClipDataset] = {}
        self._left_out: Counter[Split] = Counter()

    @abstractmethod
    def read_split(self, split: Split) -> list[Sample]:
        """All samples of a split, from the annotations.

        Raises:
            DataError: an annotation is absent or damaged; names file and place.
        """

    @abstractmethod
    def find_clips(self) -> dict[str, Path]:
        """The clips on disk, by the name that annotations use."""

    @abstractmethod
    def remedy(self) -> str:
        """What to fetch, from where, under which terms, and where to put it."""

    @abstractmethod
    def build(self, samples: Sequence[Sample]) -> ClipDataset:
        """Samples whose clips are ready as a dataset, not augmented."""

    def read_vocabulary(self) -> None:
        """What the annotations say beside the samples, where the task needs something."""
        return

    def further_clips(self) -> set[str]:
        """Names of clips that no split asks about but that the dataset has a use for."""
        return set()

    def categories(self) -> dict[str, str]:
        """One of `domains.CATEGORIES` for every clip, of a dataset whose `DOMAINS` have "categories".

        Raises:
            DataError: no file says it.
        """
        raise ConfigError(f"{type(self).__name__} knows no categories of its clips")

    @cached_property
    def shift(self) -> Shift | None:
        """The clips' domains, where it was given some.

        Raises:
            DataError: see `categories`.
        """
        if self.domains is None:
            return None
        return Shift(self.domains, frozenset(self.held_out), self.categories() if self.domains == "categories" else {})

    def sessions(self) -> Sessions:
        """Unlabelled clips by device: of every domain its training clips, which of unseen ones nobody trains on.

        Raises:
            ConfigError: the dataset knows no devices and was given none.
        """
        if self.shift is None:
            raise ConfigError(
                f"{type(self).__name__} does not know its clips' devices, and sessions need them: give it some, "
                "ARGS=--data.init_args.domains=casts"
            )
        clips = dict.fromkeys(sample.clip for sample in self.samples("train") if self.is_ready(sample.clip))
        return self.pooled({clip: self.shift.domain(clip) for clip in clips}, self.shift.casts())

    def pooled(self, devices: Mapping[str, str], casts: Mapping[str, float]) -> Sessions:
        """Sessions of devices with unlabelled clips.

        Args:
            devices: whose each unlabelled clip is.
            casts: of every device in turn, in degrees, not a number where it is unknown.
        """
        anchors = self.build([Sample(clip, "", options=("",)) for clip in devices])  # one text, whatever the task
        anchors.texts = [[self.text.neutral()]] * len(devices)
        number = {device: place for place, device in enumerate(casts)}
        place = {clip: i for i, clip in enumerate(devices)}
        pools: list[list[int]] = [[] for _ in casts]
        for clip, device in devices.items():
            pools[number[device]].append(place[clip])
        return Sessions(
            anchors,
            pools,
            {split: [number[origin.device] for origin in self.origins(split)] for split in SPLITS},
            {split: [place.get(sample.clip, -1) for sample in self._splits[split].samples] for split in SPLITS},
            list(casts.values()),
            self.digest(anchors, frames=True),
        )

    def captions(self) -> Captions:
        """Captioned clips, of a dataset whose `views` have "captions".

        Raises:
            ConfigError: it has not.
        """
        raise ConfigError(f"{type(self).__name__} has no captions: encoder_pretraining needs them")

    def samples(self, split: Split) -> list[Sample]:
        """All samples of a split, read once.

        Raises:
            DataError: see `read_split`; also a clip's name that leads out of the clips' folder.
        """
        if split not in self._annotated:
            self._check_root()
            samples = self.read_split(split)
            if not samples:
                raise DataError(f"{self.root}: split {split} has no questions")
            self.check_samples(split, samples)
            for sample in samples:
                if leads_out(sample.clip):
                    raise DataError(
                        f"{self.root}, split {split}: the clip {sample.clip!r} would lie outside of the clips' "
                        "folder; refused"
                    )
            self._annotated[split] = samples
        return self._annotated[split]

    def _check_root(self) -> None:
        """Refuse a root that is no folder, or may not be read.

        Raises:
            DataError: names it.
        """
        try:
            if self.root.is_dir() and os.listdir(self.root):
                return
        except OSError as error:
            raise DataError(f"{self.root}: may not be read ({error.strerror}): mend that") from error
        raise DataError(f"{self.root}: {'an empty' if self.root.is_dir() else 'no such'} folder\n{self.remedy()}")

    def kept(self, split: Split) -> list[Sample]:
        """A split as a run sees it: without the samples of domains that are held out, which the test alone keeps.

        Raises:
            DataError: see `samples`; also a clip whose domain no file tells, and a split of which nothing is left.
        """
        if split not in self._kept:
            samples, shift = self.samples(split), self.shift
            if shift is not None:
                self._check_domains(split, shift)
                if split != "test":
                    samples = [sample for sample in samples if not shift.unseen(sample.clip)]
                    self._note_held_out(split, samples)
            self._kept[split] = samples
        return self._kept[split]

    def _check_domains(self, split: Split, shift: Shift) -> None:
        """Whether each clip of a split has a domain.

        Raises:
            DataError: one has not; names it.
        """
        clips = sorted({sample.clip for sample in self.samples(split)})
        if unknown := [clip for clip in clips if not shift.domain(clip)]:
            raise DataError(
                f"{self.root}, split {split}: of {len(clips)} clips {len(unknown)} have no category:"
                f"{write_listing(unknown, self.cache_dir / 'uncategorised.txt')}\nmend the file, or take "
                "ARGS=--data.init_args.domains=casts or corruptions"
            )

    def _note_held_out(self, split: Split, kept: Sequence[Sample]) -> None:
        """Say what left a split, and that it is another one than the published.

        Raises:
            DataError: everything has left.
        """
        gone, asked = self.gone(split, kept), "captions" if self.task == "retrieval" else "questions"
        named = f"{self.domains} {', '.join(self.held_out)}"
        if not kept:
            raise DataError(
                f"{self.root}: every clip of split {split} is of a domain that is held out ({named}): name others, "
                "ARGS=--data.init_args.held_out=[...]"
            )
        said = f"without {gone['questions']:,} {asked} about {gone['clips']:,} clips of unseen domains ({named})"
        self.notes[split] = "; ".join(filter(None, [self.notes.get(split), said]))
        logger.info("split %s: %s", split, said)

    def gone(self, split: Split, kept: Sequence[Sample]) -> dict[str, int]:
        """Questions and clips that left a split."""
        before, after = self._counts(self.samples(split)), self._counts(kept)
        return {what: before[what] - after[what] for what in before}

    def check_samples(self, split: Split, samples: Sequence[Sample]) -> None:
        """Whether samples are what the task needs.

        Raises:
            DataError: one is not; names it.
        """

    def check_answers(self, split: Split, samples: Sequence[Sample]) -> None:
        """Refuse samples of which none can be answered right, once the vocabulary is read.

        Raises:
            DataError: gives an example.
        """

    def unknown_answers(self, samples: Sequence[Sample]) -> int:
        """How many samples no method can get right."""
        return 0

    def shared_clips(self, splits: Sequence[Split]) -> dict[tuple[Split, Split], list[str]]:
        """Clips that two of the splits have in common."""
        clips = {split: {sample.clip for sample in self.samples(split)} for split in splits}
        pairs = [(first, second) for place, first in enumerate(splits) for second in splits[place + 1 :]]
        found = {(first, second): sorted(clips[first] & clips[second]) for first, second in pairs}
        return {pair: names for pair, names in found.items() if names}

    def check(self) -> dict[str, Any]:
        """Look at everything and fill the frame cache, clips that changed included; goes on where something is wrong.

        Returns:
            splits: questions and clips, answers outside the vocabulary and the ceiling, by split, what is ready, and
            of domains what is held out;
            published: the published counts beside those here; missing: names of absent clips; unreadable: reasons by
            name; shared_between_splits: names by pair; same_content_in_splits: other names of one file; problems:
            annotations that cannot be read; clips, ready: how many are named and have frames; cache: its folder and
            bytes; protocol and notes: see the class.
        """
        problems: list[str] = []

        def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
            try:
                return read()
            except DataError as error:
                problems.append(str(error))
                return otherwise

        def read_vocabulary() -> bool:
            self.read_vocabulary()
            return True

        tokenizer = True
        try:
            self.text = TextEncoder(self.vocab, self.text_length)
        except DataError as error:
            logger.warning("training will need a vocabulary: %s", error)
            tokenizer = False
        found = {split: attempt(partial(self.samples, split), None) for split in SPLITS}
        annotated: dict[Split, list[Sample]] = {split: samples for split, samples in found.items() if samples}
        kept = {split: attempt(partial(self.kept, split), None) for split in annotated}
        vocabulary = attempt(read_vocabulary, False)
        named = {sample.clip for samples in annotated.values() for sample in samples}
        named |= attempt(self.further_clips, set())
        paths: dict[str, Path] = attempt(self.find_clips, {})
        present = {name: paths[name] for name in sorted(named) if name in paths}
        unreadable = self.cache.fill(present, count_processors(), renew=True)
        splits: dict[Split, dict[str, Any]] = {}
        for split, samples in annotated.items():
            row = splits[split] = self._counts(samples)
            if vocabulary:
                row["unknown_answers"] = self.unknown_answers(samples)
                row["ceiling"] = 1 - row["unknown_answers"] / row["questions"]
            if self.domains and (seen := kept[split]) is not None:
                row["held_out"] = self.gone(split, seen)
            ready = present.keys() - unreadable.keys()
            row["ready"] = self._counts([sample for sample in samples if sample.clip in ready])
            if vocabulary and (seen := kept[split]) is not None:
                attempt(partial(self.check_answers, split, seen), None)
                left = [sample for sample in seen if sample.clip in ready]
                if present:
                    attempt(partial(self._check_split, split, left, paths), None)
                if left and tokenizer:
                    attempt(partial(self.build, left), None)
        if paths and named and not present:
            problems.append(self._nothing_found(sorted(named), paths))
        return {
            "protocol": self.protocol,
            "notes": self.notes,
            "splits": splits,
            "published": self._compare_with_published(splits),
            "clips": len(named),
            "ready": len(present) - len(unreadable),
            "missing": sorted(named - present.keys()),
            "unreadable": unreadable,
            "shared_between_splits": {
                " and ".join(pair): names for pair, names in self.shared_clips(list(annotated)).items()
            },
            "same_content_in_splits": self._same_content(annotated),
            "problems": list(dict.fromkeys(problems)),
            "cache": {
                "folder": str(self.cache.folder),
                "bytes": sum(path.stat().st_size for path in self.cache.folder.glob("*.npy")),
            },
        }

    def _counts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {"questions": self.questions(samples), "clips": len({sample.clip for sample in samples})}

    def _same_content(self, annotated: Mapping[Split, Sequence[Sample]]) -> list[list[str]]:
        """Clips of different splits that are the same file under different names."""
        owners: dict[str, dict[str, Split]] = {}
        for split, samples in annotated.items():
            for clip in {sample.clip for sample in samples} & self.cache.ready:
                owners.setdefault(self.cache.key(clip), {})[clip] = split
        return sorted(sorted(clips) for clips in owners.values() if len(set(clips.values())) > 1)

    def published(self) -> list[dict[str, Any]]:
        """Return every published count of `PUBLISHED` beside the number in the annotation files that are here.

        Absent clips and domains that are held out change nothing here: `summary` counts those.

        Returns:
            Rows of split ("test", or "train+val" where both were published together), what ("questions", "clips" or
            "answers"), published and here (numbers), same (whether they are equal), edition (its name where official
            editions differ, else ""). Figures of a paper compare with a run only where all rows are the same.

        Raises:
            DataError: see `samples`.
        """
        return self._compare_with_published({split: self._counts(self.samples(split)) for split in SPLITS})

    def _compare_with_published(self, splits: Mapping[Split, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows of `published` for the splits that are given with their counts."""
        rows = []
        for name, counts in self.PUBLISHED.get(self.protocol, {}).items():
            parts: list[Any] = name.split("+")
            if not all(part in splits for part in parts):
                continue
            for what, count in counts.items():
                editions = {count: ""} if isinstance(count, int) else count
                here = self.num_classes - 1 if what == "answers" else sum(splits[part][what] for part in parts)
                number = here if here in editions else next(iter(editions))
                row = {"split": name, "what": what, "published": number, "here": here}
                rows.append(row | {"same": here == number, "edition": editions[number]})
        return rows

    def questions(self, samples: Sequence[Sample]) -> int:
        """How many questions samples are."""
        return len(samples)

    def prepare_data(self) -> None:
        """Check the dataset and fill the frame cache (one process a machine).

        Raises:
            DataError: see the class.
        """
        for split in SPLITS:
            self.samples(split)
        for split in SPLITS:
            self.kept(split)
        for (first, second), names in self.shared_clips(SPLITS).items():
            raise DataError(
                f"{self.root}: {first} and {second} share {len(names)} clips, and a split must not be tested on what "
                f"another was trained on:{write_listing(names, self.cache_dir / 'shared.txt')}"
            )
        differing = [
            f"{row['split']} {row['here']:,} of {row['published']:,} {row['what']}"
            for row in self.published() if not row["same"]
        ]  # fmt: skip
        if differing:
            logger.warning(
                "%s: not the annotations that were published, so its figures do not compare with published ones: %s",
                self.root, "; ".join(differing),
            )  # fmt: skip
        self.read_vocabulary()
        for split in SPLITS:
            self.check_answers(split, self.kept(split))
        TextEncoder(self.vocab, self.text_length)
        paths = self.find_clips()
        named = self._named()
        absent = [name for name in named if name not in paths]
        present = {name: paths[name] for name in named if name in paths}
        if not present:
            raise DataError(self._nothing_found(named, paths))
        self._refuse(self.lost(absent, {}), len(named))
        lost = self.lost(absent, self.cache.fill(present, count_processors()))
        self._refuse(lost, len(named))
        for line in lost:
            logger.warning("left out with its questions: %s", line)
        if absent and self.only_present:
            logger.warning("a partial copy: %d of %d clips are here", len(present), len(named))

    def _nothing_found(self, named: Sequence[str], paths: Mapping[str, Path]) -> str:
        """Return what to say where none of the named clips is there: a name looked for, a name found."""
        looked_for = next((name for name in named if Path(name).stem in paths), named[0])
        suffix = Path(looked_for).suffix if Path(looked_for).stem in paths else ""
        found = looked_for.removesuffix(suffix) if suffix else next(iter(paths), "")
        there = f"found {found!r} ({paths[found]}), among {len(paths)}" if found else "found no clip"
        said = f"{self.root}: none of the {len(named)} clips is there: looked for {looked_for!r}, among others; {there}"
        if suffix:
            return f"{said}. Clips go by their names without suffix: remove {suffix!r} in the annotations"
        return f"{said}\n{self.remedy()}"

    def _check_split(self, split: Split, ready: Sequence[Sample], paths: Mapping[str, Path]) -> None:
        """Refuse a split of which no clip is ready, or nothing can be trained on.

        Raises:
            DataError: names a clip that is looked for and one that is there.
        """
        if not ready:
            looked_for, found = self.kept(split)[0].clip, next(iter(paths), "")
            raise DataError(
                f"{self.root}: no question of split {split} has its clip here: looked for {looked_for!r}, "
                "among others; "
                + (f"found {found!r}, among {len(paths)}" if found else "found no clip")
                + f"\n{self.remedy()}"
            )
        if split == "train":
            self.check_answers(split, ready)

    def _named(self) -> list[str]:
        """Every clip that the dataset has a use for."""
        return sorted({sample.clip for split in SPLITS for sample in self.samples(split)} | self.further_clips())

    def lost(self, absent: Sequence[str], unreadable: Mapping[str, str]) -> list[str]:
        """Clips that count towards `max_missing`, with what is wrong."""
        gone = [] if self.only_present else [f"{name}: absent" for name in absent]
        return gone + [f"{name}: {reason}" for name, reason in unreadable.items()]

    def _refuse(self, lost: Sequence[str], clips: int) -> None:
        """Whether too many clips are lost.

        Raises:
            DataError: names them; the whole list lies beside the cache.
        """
        if len(lost) > self.max_missing:
            raise DataError(self.refusal(lost, clips))

    def refusal(self, lost: Sequence[str], clips: int) -> str:
        """Return what to say of too many lost clips, of so many; write all of them into `missing.txt`."""
        return (
            f"{self.root}: of {clips} clips {len(lost)} are absent or unreadable, {self.max_missing} may be:"
            f"{write_listing(lost, self.cache_dir / 'missing.txt')}\n{self.remedy()}\nTo leave clips out: "
            "ARGS=--data.init_args.max_missing=<how many>, or, where the copy is a part of the dataset, "
            "ARGS=--data.init_args.only_present=true"
        )

    def setup(self, stage: str) -> None:
        """Build the splits from what `prepare_data` made ready."""
        if self._splits:
            return
        self.text = TextEncoder(self.vocab, self.text_length)
        self.read_vocabulary()
        self.cache.load()
        paths = self.find_clips()
        self._ready = self.cache.ready & paths.keys()
        named = self._named()
        bare = {name: "no frames are prepared" for name in named if name in paths and name not in self._ready}
        self._refuse(self.lost([name for name in named if name not in paths], bare), len(named))
        for split in SPLITS:
            kept = self.kept(split)
            samples = [sample for sample in kept if sample.clip in self._ready]
            self._check_split(split, samples, paths)
            self._left_out[split] = self.questions(kept) - self.questions(samples)
            self._splits[split] = self.build(samples)
        if isinstance(self.cache, DeviceCache):
            self.cache.clips = [name for name in named if self.is_ready(name)]

    def is_ready(self, clip: str) -> bool:
        """Whether a clip's frames are in the cache."""
        return clip in self._ready

    def dataset(self, split: Split, augment: bool) -> ClipDataset:
        """A split, its frames drawn anew for every epoch or always the same."""
        return self._splits[split].augmented(augment)

    def train_dataloader(self) -> DataLoader[VideoTextBatch]:
        """Augmented, in a new order every epoch."""
        return self.batches(self.dataset("train", augment=True), shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[VideoTextBatch]:
        """As annotated."""
        return self.batches(self.dataset("val", augment=False), shuffle=False, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[VideoTextBatch]:
        """As annotated."""
        return self.batches(self.dataset("test", augment=False), shuffle=False, num_workers=self.num_workers)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, as Lightning does; frames that are kept on the device are gathered there."""
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch._replace(frames=self.cache.gather(batch.frames)) if isinstance(self.cache, DeviceCache) else batch

    def labels(self, split: Split) -> Tensor:
        """(N,) the class of every sample, or the place of its right candidate."""
        return self._splits[split].labels

    def fingerprint(self, split: Split, frames: bool) -> str:
        """A digest of a split's clips by name, its texts and labels, and, if asked for, of its frames."""
        return self.digest(self._splits[split], frames)

    def digest(self, dataset: ClipDataset, frames: bool) -> str:
        """See `fingerprint`."""
        digest = hashlib.sha256()
        for sample, texts, label in zip(dataset.samples, dataset.texts, dataset.labels.tolist(), strict=True):
            clip = self.cache.key(sample.clip) if frames else sample.clip
            if frames and dataset.shift is not None:
                clip += dataset.shift.effect(sample.clip)
            digest.update(f"{clip} {texts} {label}\n".encode())
        return digest.hexdigest()

    def origins(self, split: Split) -> list[Origin]:
        """Where each sample comes from: of its clip's domain, or, without domains, of a device of its own."""
        return [
            Origin(sample.clip, *self._device(sample.clip), sample.type, sample.question, self.word(split, index))
            for index, sample in enumerate(self._splits[split].samples)
        ]

    def _device(self, clip: str) -> tuple[str, str]:
        """A clip's device and the device's group."""
        if self.shift is None:
            return clip, ""
        return self.shift.domain(clip), "unseen" if self.shift.unseen(clip) else "seen"

    def texts(self, split: Split, index: int) -> Sequence[str]:
        """A sample's candidates or captions; none of an open-ended question."""
        return self._splits[split].samples[index].options

    def word_counts(self, split: Split) -> Counter[int]:
        """How often each WordPiece is in a split's texts."""
        return Counter(word for texts in self._splits[split].texts for text in texts for word in text)

    @abstractmethod
    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """The right answer to a sample as an annotation has it, or what the prediction `label` says."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Questions, clips, questions left out, unknown answers and the ceiling of the accuracy, by split.

        Left out are those whose clips are not there; what left with unseen domains is counted apart, under held_out.
        """
        summary: dict[str, dict[str, float]] = {}
        for split, dataset in self._splits.items():
            questions, unknown = self.questions(dataset.samples), int((dataset.labels == UNKNOWN).sum())
            summary[split] = {
                "questions": questions,
                "clips": len({sample.clip for sample in dataset.samples}),
                "left_out": self._left_out[split],
                "unknown_answers": unknown,
                "ceiling": 1 - unknown / questions,
            }
            if self.domains:
                gone = self.gone(split, self.kept(split))
                summary[split] |= {"held_out": gone["questions"], "held_out_clips": gone["clips"]}
        return summary

    def example(self, split: Split, index: int) -> Example:
        """A sample to look at."""
        dataset = self._splits[split]
        sample = dataset.samples[index]
        return Example(sample.clip, dataset.frames(0, index).numpy(), sample.question, self.word(split, index))

    def answers(self) -> list[str]:
        """The word of every class but the last, which stands for all others; none where there are no classes."""
        return []
