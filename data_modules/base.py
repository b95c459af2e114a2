"""What every video question-answering dataset shares: checks, frames, text, order, batches."""

import hashlib
import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdc_mmpg.batch import (
    SPLITS,
    UNKNOWN,
    Captions,
    EpochDataModule,
    Example,
    Origin,
    Sessions,
    Split,
    VideoTextBatch,
)
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.frames import CANDIDATES, crop, middle_candidates
from cdc_mmpg.text import TextEncoder, pad
from cdc_mmpg.video import Decoder
from data_modules.answers import Answers
from data_modules.cache import FrameCache

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """A question about a clip, as an annotation has it."""

    clip: str  # name of the clip in the annotation
    question: str
    answer: str
    type: str = ""  # of the question, where the annotation has one


class QADataset(Dataset[VideoTextBatch]):
    """The samples of a split as batches; an item is fetched by (epoch, index), which decide its augmentation.

    Args:
        samples: the split.
        paths: where each sample's clip lies.
        text_ids: each sample's question as WordPieces.
        labels: (N,) each sample's class.
        cache: the clips' frames.
        augment: draw frames within their segments and a place for the crop; else the middles.
        seed: of the draws.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        paths: Sequence[Path],
        text_ids: Sequence[Sequence[int]],
        labels: Tensor,
        cache: FrameCache,
        augment: bool,
        seed: int,
    ) -> None:
        self.samples, self.paths, self.text_ids, self.labels = samples, paths, text_ids, labels
        self.cache, self.augment, self.seed = cache, augment, seed

    def augmented(self, augment: bool) -> "QADataset":
        """The same samples, augmented or not."""
        return QADataset(self.samples, self.paths, self.text_ids, self.labels, self.cache, augment, self.seed)

    def __len__(self) -> int:
        return len(self.samples)

    def frames(self, epoch: int, index: int) -> Tensor:
        """(T, S, S, 3) uint8."""
        chosen, generator = middle_candidates(self.cache.num_frames), None
        if self.augment:
            generator = np.random.default_rng((self.seed, epoch, index))
            starts = np.arange(self.cache.num_frames) * CANDIDATES
            chosen = list(starts + generator.integers(CANDIDATES, size=len(starts)))
        return torch.from_numpy(crop(self.cache.read(self.paths[index], chosen), self.cache.image_size, generator))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> VideoTextBatch:
        index = [index for _, index in items]
        ids, mask = pad([self.text_ids[i] for i in index])
        frames = torch.stack([self.frames(epoch, i) for epoch, i in items])
        where = torch.tensor(index)
        return VideoTextBatch(frames, torch.from_numpy(ids), torch.from_numpy(mask), self.labels[where], where)


class VideoQADataModule(EpochDataModule):
    """Open-ended questions about clips: a subclass reads annotations, the rest is here.

    An answer outside the vocabulary is left out of the training loss and wrong in validation and test. Splits that
    share a clip are refused. Clips are decoded once, into the frame cache, before training.

    Args:
        root: the dataset's folder.
        num_classes: answers known in training + 1.
        cache_dir: where frames and features are kept.
        num_frames: T, frames that the model sees of a clip.
        image_size: pixels of a side of what it sees.
        resize: pixels to which the shorter side of a frame is resized before the crop; None is 268/224 of image_size.
        batch_size: samples a step on each device, before gradient accumulation.
        num_workers: processes that load batches; None is one a processor, at most 4.
        vocab: a local `vocab.txt`; None fetches bert-base-uncased's from the hub.
        text_length: most tokens in a question.
        decoder: see `cdc_mmpg.video`.
        max_missing: how many clips may be absent or unreadable; their questions are left out, and counted. More
            refuse the run, all named.
        only_present: take the questions whose clips are there and leave out the others: for partial copies.
        seed: of the order and the augmentation.
    """

    def __init__(
        self,
        root: str,
        num_classes: int,
        cache_dir: str,
        num_frames: int = 3,
        image_size: int = 224,
        resize: int | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        vocab: str | None = None,
        text_length: int = 40,
        decoder: Decoder = "pyav",
        max_missing: int = 0,
        only_present: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if resize is not None and resize < image_size:
            raise ConfigError(
                f"data.init_args.resize is {resize}, less than image_size ({image_size}), which is cut out"
            )
        for name, value, least in (
            ("num_classes", num_classes, 2), ("num_frames", num_frames, 1), ("batch_size", batch_size, 1),
            ("num_workers", num_workers or 0, 0), ("max_missing", max_missing, 0), ("text_length", text_length, 3),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"data.init_args.{name} is {value}: at least {least}")
        self.root, self.cache_dir = Path(root), Path(cache_dir)
        self.num_classes = num_classes
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self.vocab, self.text_length = vocab, text_length
        self.max_missing, self.only_present = max_missing, only_present
        self.cache = FrameCache(self.cache_dir / "frames", num_frames, image_size, decoder, resize)
        self._frame_names: dict[Path, str] = {}
        self._splits: dict[Split, QADataset] = {}
        self._left_out: Counter[Split] = Counter()

    @abstractmethod
    def read_split(self, split: Split) -> list[Sample]:
        """All samples of a split, from the annotations.

        Raises:
            DataError: an annotation is absent or damaged; names file and place.
        """

    @abstractmethod
    def read_answers(self, training_answers: Sequence[str]) -> Answers:
        """The answer vocabulary."""

    @abstractmethod
    def find_clips(self) -> dict[str, Path]:
        """The clips on disk, by the name that annotations use."""

    def further_clips(self) -> set[str]:
        """Names of clips that no split asks about but that the dataset has a use for."""
        return set()

    def sessions(self) -> Sessions:
        """Unlabelled clips by device.

        Raises:
            ConfigError: the dataset does not say which device recorded a clip.
        """
        raise ConfigError(f"{type(self).__name__} does not know its clips' devices: sessions need them")

    def captions(self) -> Captions:
        """Captioned clips.

        Raises:
            ConfigError: there are none.
        """
        raise ConfigError(f"{type(self).__name__} has no captions: encoder_pretraining needs them")

    def prepare_data(self) -> None:
        """Check the dataset and fill the frame cache (one process a machine).

        Raises:
            DataError: see the class.
        """
        samples = {split: self.read_split(split) for split in SPLITS}
        clips = {split: {sample.clip for sample in samples[split]} for split in SPLITS}
        for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
            if shared := sorted(clips[first] & clips[second]):  # type: ignore[index]
                raise DataError(
                    f"{self.root}: {first} and {second} share {len(shared)} clips, among them {', '.join(shared[:5])}: "
                    "a split must not be tested on what another was trained on"
                )
        TextEncoder(self.vocab, self.text_length)
        paths = self.find_clips()
        named = sorted(set().union(*clips.values(), self.further_clips()))
        absent = [name for name in named if name not in paths]
        present = [paths[name] for name in named if name in paths]
        if not present:
            raise DataError(f"{self.root}: none of the {len(named)} clips is there\n{self.remedy()}")
        problems = [] if self.only_present else [f"{name}: absent" for name in absent]
        if len(problems) <= self.max_missing:
            problems += self.cache.fill(present, os.cpu_count() or 1).values()
        if len(problems) > self.max_missing:
            raise self._missing(problems, len(named))
        for line in problems:
            logger.warning("left out with its questions: %s", line)

    def _missing(self, problems: Sequence[str], clips: int) -> DataError:
        """The refusal that names the clips; the whole list lies beside the cache."""
        path, shown = self.cache_dir / "missing.txt", 20
        with atomic_write(path) as file:
            file.write("\n".join(problems).encode())
        more = f"\n  and {len(problems) - shown} more, all named in {path}" if len(problems) > shown else ""
        return DataError(
            f"{self.root}: of {clips} clips {len(problems)} are absent or unreadable, {self.max_missing} may be:\n  "
            + "\n  ".join(problems[:shown])
            + f"{more}\n{self.remedy()}\nTo leave clips out: ARGS=--data.init_args.max_missing=<how many>, or, where "
            "the copy is a part of the dataset, ARGS=--data.init_args.only_present=true"
        )

    @abstractmethod
    def remedy(self) -> str:
        """What to fetch, from where, and where to put it."""

    def setup(self, stage: str) -> None:
        """Build the splits from what `prepare_data` made ready."""
        if self._splits:
            return
        self._text = TextEncoder(self.vocab, self.text_length)
        self._paths = self.find_clips()
        ready = {path.name for path in self.cache.folder.iterdir()}
        annotated = {split: self.read_split(split) for split in SPLITS}
        self._answers = self.read_answers([sample.answer for sample in annotated["train"]])
        used = {sample.clip for everything in annotated.values() for sample in everything} | self.further_clips()
        clips = [self._paths[name] for name in used if name in self._paths]
        names = {clip: self.cache.path(clip).name for clip in clips}
        self._frame_names = {clip: name for clip, name in names.items() if name in ready}
        for split, everything in annotated.items():
            samples = [sample for sample in everything if self._paths.get(sample.clip) in self._frame_names]
            if not samples:
                raise DataError(f"{self.root}: no question of split {split} has its clip here\n{self.remedy()}")
            self._left_out[split] = len(everything) - len(samples)
            self._splits[split] = self.build(samples)

    def build(self, samples: Sequence[Sample]) -> QADataset:
        """Samples whose clips are ready as a dataset, not augmented."""
        return QADataset(
            samples,
            [self._paths[sample.clip] for sample in samples],
            self._text([sample.question for sample in samples]),
            torch.tensor([self._answers.label(sample.answer) for sample in samples]),
            self.cache,
            augment=False,
            seed=self.seed,
        )

    def is_ready(self, clip: str) -> bool:
        """Whether a clip's frames are in the cache."""
        return self._paths.get(clip) in self._frame_names

    def dataset(self, split: Split, augment: bool) -> QADataset:
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

    def labels(self, split: Split) -> Tensor:
        """(N,) the class of every sample."""
        return self._splits[split].labels

    def fingerprint(self, split: Split, frames: bool) -> str:
        """A digest of a split's clips by name, its questions and labels, and, if asked for, of its frames."""
        return self.digest(self._splits[split], frames)

    def digest(self, dataset: QADataset, frames: bool) -> str:
        """See `fingerprint`."""
        digest = hashlib.sha256()
        for path, ids, label in zip(dataset.paths, dataset.text_ids, dataset.labels.tolist(), strict=True):
            digest.update(f"{self._frame_names[path] if frames else path.stem} {ids} {label}\n".encode())
        return digest.hexdigest()

    def origins(self, split: Split) -> list[Origin]:
        """Where each sample comes from: of its clip, which counts as a device of its own."""
        return [
            Origin(sample.clip, sample.clip, "", sample.type, sample.question, sample.answer)
            for sample in self._splits[split].samples
        ]

    def summary(self) -> dict[str, dict[str, float]]:
        """Questions, clips, questions left out, unknown answers and the ceiling of the accuracy, by split."""
        summary: dict[str, dict[str, float]] = {}
        for split, dataset in self._splits.items():
            unknown = int((dataset.labels == UNKNOWN).sum())
            summary[split] = {
                "questions": len(dataset),
                "clips": len(set(dataset.paths)),
                "left_out": self._left_out[split],
                "unknown_answers": unknown,
                "ceiling": 1 - unknown / len(dataset),
            }
        return summary

    def example(self, split: Split, index: int) -> Example:
        """A sample to look at."""
        dataset = self._splits[split]
        sample = dataset.samples[index]
        return Example(sample.clip, dataset.frames(0, index).numpy(), sample.question, sample.answer)

    def answers(self) -> list[str]:
        """The word of every class but the last, which stands for all others."""
        return self._answers.words
