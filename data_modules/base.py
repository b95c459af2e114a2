"""The base of all datasets of clips with texts: frame cache, text encoding, splits as batches."""

import itertools
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import SPLITS, UNKNOWN_LABEL, Split, VideoTextBatch
from cdc_mmpg.data.interface import ReadableSample, SampleOrigin, Sessions
from cdc_mmpg.data.sampling import Jitter
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import write_listing
from cdc_mmpg.media.frames import CANDIDATES
from cdc_mmpg.media.text import TextEncoder
from cdc_mmpg.media.video import Decoder
from cdc_mmpg.processors import count_processors
from data_modules.annotated_splits import AnnotatedSplits
from data_modules.cache import FrameCache
from data_modules.checks import (
    check_domains,
    check_minimums,
    check_split,
    check_task,
    compare_with_published,
    count_held_out,
    count_samples,
    describe_nothing_found,
    refuse_lost,
    refuse_shared_clips,
    run_all_checks,
    warn_of_unpublished,
)
from data_modules.clip_dataset import ClipDataset, Sample
from data_modules.device_cache import DeviceCache
from data_modules.domains import DomainKind, Shift

logger = logging.getLogger(__name__)


class VideoTextDataModule(AnnotatedSplits):
    """Clips with texts: a subclass per task (see `tasks`), and a subclass of that which reads the annotations.

    Splits that share a clip are refused. Clips are decoded once, into the frame cache, before training; a clip that
    has changed since then is refused by name.

    Args:
        root: folder of the dataset.
        cache_dir: folder for frames and features.
        num_classes: classes of open-ended questions: the known answers, plus one class for all others.
        protocol: name of one of the dataset's published splits; None is the first of `PROTOCOLS`.
        num_frames: T, frames of a clip that the model sees.
        image_size: side of the square that the model sees, in pixels.
        resize: pixels to which the shorter side of a frame is resized before the crop; None is 268/224 of image_size.
        candidates: frames that the cache keeps for each of the T segments of a clip; training uses any of them.
        batch_size: samples of an optimizer step, over all devices and accumulated batches.
        per_device: maximum number of samples that a device holds at once, the rest is accumulated; None is its share.
        num_workers: processes that load batches; None is `EpochDataModule.count_loading_processes`.
        frame_cache: where batches are read from. "device" keeps the frames of all clips in the memory of the computing
            device (GPU or host), if they fit, and needs no loading processes; the frames are the same, see
            `device_cache`.
        vocab: a local `vocab.txt`; None downloads bert-base-uncased's from the hub.
        text_length: maximum number of tokens in a text.
        decoder: see `cdc_mmpg.media.video`.
        max_missing: number of clips that may be absent or unreadable; their samples are left out and counted. With
            more, the run is refused and the error lists them.
        only_present: use the samples whose clips are present and leave out the others: for partial copies.
        domains: kind of domain that stands for devices, see `data_modules.domains`. A clip's domain is the same in all
            splits. Clips of held-out domains leave training and validation; the test keeps them as group "unseen".
            Every domain's unlabelled clips are its training clips. The answer vocabulary is still counted on the
            entire dataset.
        held_out: names of the domains that training does not see; None is about a fifth, see `domains`.
        seed: seed of the sample order and the augmentation.
    """

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
        domains: DomainKind | None = None,
        held_out: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        if resize is not None and resize < image_size:
            raise ConfigError(
                f"data.init_args.resize is {resize}, less than image_size ({image_size}), the size of the crop"
            )
        check_minimums(
            {
                "num_frames": (num_frames, 1),
                "batch_size": (batch_size, 1),
                "candidates": (candidates, 1),
                "per_device": (1 if per_device is None else per_device, 1),
                "num_workers": (num_workers or 0, 0),
                "max_missing": (max_missing, 0),
                "text_length": (text_length, 3),
                "num_classes": (2 if num_classes is None else num_classes, 2),
            }
        )
        check_task(type(self), num_classes, protocol)
        check_domains(type(self), domains, held_out, frame_cache)
        super().__init__(root, cache_dir, protocol, num_classes, domains, held_out, batch_size, seed, per_device)
        self.num_workers = 0 if frame_cache == "device" else num_workers
        self.vocab, self.text_length = vocab, text_length
        self.max_missing, self.only_present = max_missing, only_present
        kind = DeviceCache if frame_cache == "device" else FrameCache
        self.cache = kind(self.cache_dir / "frames", num_frames, image_size, decoder, resize, candidates)
        self._splits: dict[Split, ClipDataset] = {}
        self._left_out: Counter[Split] = Counter()
        self.virtual = 0  # virtual devices of each training device, in batches of frames; set by the method

    @abstractmethod
    def build(self, samples: Sequence[Sample]) -> ClipDataset:
        """Build an unaugmented dataset from samples whose clips are ready."""

    def prepare_data(self) -> None:
        """Check the dataset and fill the frame cache (in one process per machine).

        Raises:
            DataError: see the class.
        """
        for split in SPLITS:
            self.samples(split)
        for split in SPLITS:
            self.select_samples(split)
        refuse_shared_clips(self)
        warn_of_unpublished(self)
        self.read_vocabulary()
        for split in SPLITS:
            self.check_answers(split, self.select_samples(split))
        TextEncoder(self.vocab, self.text_length)
        paths = self.find_clips()
        named = self.list_named_clips()
        absent = [name for name in named if name not in paths]
        present = {name: paths[name] for name in named if name in paths}
        if not present:
            raise DataError(describe_nothing_found(self, named, paths))
        refuse_lost(self, self.list_lost(absent, {}), len(named))
        lost = self.list_lost(absent, self.cache.fill(present, count_processors()))
        refuse_lost(self, lost, len(named))
        for line in lost:
            logger.warning("left out with its questions: %s", line)
        if absent and self.only_present:
            logger.warning("partial copy: %d of %d clips are present", len(present), len(named))

    def check(self) -> dict[str, Any]:
        """Check everything and fill the frame cache; return the report, see `checks.run_all_checks`."""
        return run_all_checks(self)

    def published(self) -> list[dict[str, Any]]:
        """Compare every count in `PUBLISHED` with the count in the local annotation files.

        Absent clips and held-out domains do not change these counts: `summary` counts those.

        Returns:
            Rows of split ("test", or "train+val" if both were published together), what ("questions", "clips" or
            "answers"), published and here (numbers), same (whether they are equal), edition (its name if official
            editions differ, else ""). A paper's figures are comparable with a run only if all rows are the same.

        Raises:
            DataError: see `samples`.
        """
        return compare_with_published(self, {split: count_samples(self, self.samples(split)) for split in SPLITS})

    def list_lost(self, absent: Sequence[str], unreadable: Mapping[str, str]) -> list[str]:
        """Return the clips that count towards `max_missing`, each with the reason."""
        lost = [] if self.only_present else [f"{name}: absent" for name in absent]
        return lost + [f"{name}: {reason}" for name, reason in unreadable.items()]

    def describe_lost(self, lost: Sequence[str], clips: int) -> str:
        """Return the error message for too many lost clips out of `clips`; write all of them into `missing.txt`."""
        return (
            f"{self.root}: {len(lost)} of {clips} clips are absent or unreadable, max_missing is {self.max_missing}:"
            f"{write_listing(lost, self.cache_dir / 'missing.txt')}\n{self.remedy()}\nTo leave clips out: "
            "ARGS=--data.init_args.max_missing=<number>, or, for a partial copy of the dataset, "
            "ARGS=--data.init_args.only_present=true"
        )

    def setup(self, stage: str) -> None:
        """Build the splits from the clips that `prepare_data` has decoded."""
        if self._splits:
            return
        self.text = TextEncoder(self.vocab, self.text_length)
        self.read_vocabulary()
        self.cache.load()
        paths = self.find_clips()
        self._ready = self.cache.ready & paths.keys()
        named = self.list_named_clips()
        bare = {name: "no frames are prepared" for name in named if name in paths and name not in self._ready}
        refuse_lost(self, self.list_lost([name for name in named if name not in paths], bare), len(named))
        for split in SPLITS:
            selected = self.select_samples(split)
            samples = [sample for sample in selected if sample.clip in self._ready]
            check_split(self, split, samples, paths)
            self._left_out[split] = self.count_questions(selected) - self.count_questions(samples)
            self._splits[split] = self.build(samples)
        if isinstance(self.cache, DeviceCache):
            self.cache.clips = [name for name in named if self.is_ready(name)]

    def sessions(self) -> Sessions:
        """Return unlabelled clips by device: the training clips of every domain, also of unseen domains.

        Raises:
            ConfigError: the dataset does not know its devices, and `domains` is None.
        """
        shift = self.require_domains("sessions")
        clips = dict.fromkeys(sample.clip for sample in self.samples("train") if self.is_ready(sample.clip))
        return self.pool_sessions({clip: shift.domain(clip) for clip in clips}, shift.casts())

    def require_domains(self, purpose: str) -> Shift:
        """Return the domains of the clips.

        Args:
            purpose: what needs devices, in the plural, for the message.

        Raises:
            ConfigError: the dataset does not know its devices, and `domains` is None.
        """
        if self.shift is None:
            raise ConfigError(
                f"{type(self).__name__} does not know its clips' devices, but {purpose} need devices: define domains, "
                "ARGS=--data.init_args.domains=casts"
            )
        return self.shift

    def pool_sessions(
        self, devices: Mapping[str, str], casts: Mapping[str, float], backgrounds: Mapping[str, float] | None = None
    ) -> Sessions:
        """Group unlabelled clips by device.

        Args:
            devices: device of each unlabelled clip.
            casts: hue cast of every device, in degrees; NaN if unknown. Its order numbers the devices.
            backgrounds: hue of every clip's background in degrees; None if unknown.
        """
        anchors = self.build([Sample(clip, "", options=("",)) for clip in devices])  # one text for every task
        anchors.texts = [[self.text.neutral()]] * len(devices)
        number = {device: place for place, device in enumerate(casts)}
        place = {clip: i for i, clip in enumerate(devices)}
        pools: list[list[int]] = [[] for _ in casts]
        for clip, device in devices.items():
            pools[number[device]].append(place[clip])
        alike = None
        if backgrounds is not None:
            hues = np.array([backgrounds[clip] for clip in devices])
            alike = [find_alike(hues, pool) for pool in pools]
        return Sessions(
            anchors,
            pools,
            {split: [number[origin.device] for origin in self.origins(split)] for split in SPLITS},
            {split: [place.get(sample.clip, -1) for sample in self._splits[split].samples] for split in SPLITS},
            list(casts.values()),
            anchors.digest(frames=True),
            alike,
        )

    def is_ready(self, clip: str) -> bool:
        """Return whether a clip's frames are in the cache."""
        return clip in self._ready

    def dataset(self, split: Split, augment: bool) -> ClipDataset:
        """Return a split; with `augment` its frames are drawn anew in every epoch."""
        return self._splits[split].with_augmentation(augment)

    def rotate(self, dataset: ClipDataset, degrees: Sequence[float]) -> tuple[ClipDataset, str]:
        """Return a dataset of this module with the hues of each sample's clip rotated, and its digest."""
        rotated = dataset.rotate(degrees)
        return rotated, rotated.digest(frames=True)

    def jitter(self, dataset: ClipDataset, jitters: Sequence[Jitter]) -> tuple[ClipDataset, str]:
        """Return a dataset of this module with the colours of each sample's clip jittered, and its digest."""
        jittered = dataset.jitter(jitters)
        return jittered, jittered.digest(frames=True)

    def train_dataloader(self) -> DataLoader[VideoTextBatch]:
        """Return training batches: augmented, in a new order every epoch."""
        devices = [origin.device for origin in self.origins("train")] if self.virtual else []
        dataset = self.dataset("train", augment=True).with_virtual_devices(self.virtual, devices)
        return self.batches(dataset, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[VideoTextBatch]:
        """Return validation batches, unaugmented and in annotation order."""
        return self.batches(self.dataset("val", augment=False), shuffle=False, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[VideoTextBatch]:
        """Return test batches, unaugmented and in annotation order."""
        return self.batches(self.dataset("test", augment=False), shuffle=False, num_workers=self.num_workers)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device; frames of a `DeviceCache` are gathered there."""
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch._replace(frames=self.cache.gather(batch.frames)) if isinstance(self.cache, DeviceCache) else batch

    def labels(self, split: Split) -> Tensor:
        """Return the class of every sample, or the index of its right candidate, (N,)."""
        return self._splits[split].labels

    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return a digest of a split's clip names, texts and labels; with `frames` also of its frames."""
        return self._splits[split].digest(frames)

    def origins(self, split: Split) -> list[SampleOrigin]:
        """Return the origin of each sample; its device is the clip's domain, or without domains the clip itself."""
        return [
            SampleOrigin(
                sample.clip, *self._find_device(sample.clip), sample.type, sample.question, self.word(split, index)
            )
            for index, sample in enumerate(self._splits[split].samples)
        ]

    def locate_test_questions(self) -> dict[str, int | None]:
        """Return the position of every annotated test question by its id; None if it is left out with its clip.

        A question whose annotation has no id has the number of its place in the file, from 0.

        Raises:
            DataError: two questions have the same id.
        """
        positions: dict[str, int | None] = {}
        kept = itertools.count()
        for place, sample in enumerate(self.samples("test")):
            identity = sample.id or str(place)
            if identity in positions:
                raise DataError(
                    f"{self.root}, split test: several questions have the id {identity!r:.80}, so predictions by id "
                    "are ambiguous: fix the annotation file, or fetch it again"
                )
            positions[identity] = next(kept) if self.is_ready(sample.clip) else None
        return positions

    def _find_device(self, clip: str) -> tuple[str, str]:
        """Return a clip's device and the device's group."""
        if self.shift is None:
            return clip, ""
        return self.shift.domain(clip), "unseen" if self.shift.is_unseen(clip) else "seen"

    def texts(self, split: Split, index: int) -> Sequence[str]:
        """Return a sample's candidates or captions; empty for an open-ended question."""
        return self._splits[split].samples[index].options

    def word_counts(self, split: Split) -> Counter[int]:
        """Count how often each WordPiece occurs in a split's texts."""
        return Counter(word for texts in self._splits[split].texts for text in texts for word in text)

    @abstractmethod
    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return the right answer to a sample as annotated, or the word for a predicted `label`."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Return for each split: questions, clips, questions left out, unknown answers and the maximum accuracy.

        A question is left out if its clip is absent; those of held-out domains are counted separately, in held_out.
        """
        summary: dict[str, dict[str, float]] = {}
        for split, dataset in self._splits.items():
            questions, unknown = self.count_questions(dataset.samples), int((dataset.labels == UNKNOWN_LABEL).sum())
            summary[split] = {
                "questions": questions,
                "clips": len({sample.clip for sample in dataset.samples}),
                "left_out": self._left_out[split],
                "unknown_answers": unknown,
                "ceiling": 1 - unknown / questions,
            }
            if self.domains:
                left = count_held_out(self, split, self.select_samples(split))
                summary[split] |= {"held_out": left["questions"], "held_out_clips": left["clips"]}
        return summary

    def example(self, split: Split, index: int) -> ReadableSample:
        """Return a sample in a form that a person can read."""
        dataset = self._splits[split]
        sample = dataset.samples[index]
        return ReadableSample(sample.clip, dataset.frames(0, index).numpy(), sample.question, self.word(split, index))

    def answers(self) -> list[str]:
        """Return the word of every class except the last, which stands for all others; empty without classes."""
        return []


def find_alike(hues: NDArray[np.float64], clips: Sequence[int], number: int = 8) -> list[int]:
    """Find the `number` clips of a device whose hues (of all clips, (C,)) lie in the smallest arc, in arc order."""
    order = sorted(clips, key=lambda clip: hues[clip] % 360)
    turns = [order[start:] + order[:start] for start in range(len(order))]
    return min(
        (turn[:number] for turn in turns),
        key=lambda part: (hues[part[-1]] - hues[part[0]]) % 360,
        default=[],
    )
