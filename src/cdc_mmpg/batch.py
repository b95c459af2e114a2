"""The contract between datasets and methods: what a batch holds, in which order samples come, what a dataset offers."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.frames import MEAN, STD, Frames
from cdc_mmpg.signals import ignore_stop_signals

Task = Literal["open_ended", "multiple_choice", "retrieval"]
View = Literal["samples", "sessions", "captions"]  # how a method reads a dataset
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
TRIES = 64  # to find a sample of another device
UNKNOWN_ANSWER = "(unknown)"  # the word of the class that stands for all other answers
UNKNOWN = -100  # label of an answer outside the vocabulary: no loss in training, wrong in evaluation


class VideoTextBatch(NamedTuple):
    """Clips with a question each, or with K texts: candidates of a multiple choice, captions."""

    frames: Tensor  # (B, T, S, S, 3) uint8 RGB
    text_ids: Tensor  # (B, L) or (B, K, L) int64, padded with 0 at the end
    text_mask: Tensor  # the same, 1 where there is a token; of K texts those without any are not there
    labels: Tensor  # (B,) int64, `UNKNOWN` for an answer outside the vocabulary; which candidate is right
    indices: Tensor  # (B,) int64, place of the sample in its split


class FeatureBatch(NamedTuple):
    """The same samples as the encoder sees them."""

    # (B, T, 192) of clips with their questions (`Encoded.frame_features`), or of clips alone in retrieval;
    # (B, K, T, 192) of clips with each of K candidates
    frame_features: Tensor
    labels: Tensor  # (B,)
    indices: Tensor  # (B,)
    texts: Tensor | None = None  # (B, K, 192) captions by themselves, in retrieval
    there: Tensor | None = None  # (B, K) which of them are there


class SessionBatch(NamedTuple):
    """The same samples, each with what its device uploads in several cases (training knows one)."""

    samples: FeatureBatch
    uploads: Tensor  # (B, C, 192) means of the anchor features of n other clips of a device
    anchors: Tensor  # (B, C) n, 0 where nothing is uploaded
    casts: (
        Tensor  # (B, 2) cosine and sine of the device's true hue cast, for the oracle; not numbers where it is unknown
    )

    @property
    def labels(self) -> Tensor:
        """(B,)."""
        return self.samples.labels

    @property
    def indices(self) -> Tensor:
        """(B,)."""
        return self.samples.indices


class CaptionBatch(NamedTuple):
    """Clips with a caption and a question each, for pretraining."""

    frames: Tensor  # (B, T, S, S, 3) uint8 RGB
    caption_ids: Tensor  # (B, L) int64, padded with 0 at the end
    caption_mask: Tensor  # (B, L)
    text_ids: Tensor  # (B, L') the question
    text_mask: Tensor  # (B, L')
    neutral: Tensor  # (P,) the neutral prompt: [CLS], [MASK] as often as it likes, [SEP]
    labels: Tensor  # (B,) the answers, as WordPieces
    indices: Tensor  # (B,)


def normalise(frames: Tensor) -> Tensor:
    """uint8 frames (B, T, H, W, 3) as the encoder takes them: (B, T, 3, H, W) floats, ImageNet mean and deviation."""
    mean = torch.tensor(MEAN, device=frames.device) * 255
    std = torch.tensor(STD, device=frames.device) * 255
    return ((frames - mean) / std).movedim(-1, 2)


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) pairs of one process: an order that depends on seed and epoch alone.

    Training pads the last round by samples from the start, so that all processes take as many steps; evaluation does
    not, so that every sample counts once.

    Args:
        size: samples in the split.
        seed: of the order.
        shuffle: draw a new order every epoch (training).
        rank, world: this process among all.
        skip: samples of this process to leave out in the first epoch that is drawn: those that a run has seen
            before it was stopped in the middle of an epoch.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, rank: int = 0, world: int = 1, skip: int = 0) -> None:
        self.size, self.seed, self.shuffle, self.rank, self.world, self.skip = size, seed, shuffle, rank, world, skip
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return (self.size + self.world - 1) // self.world
        return len(range(self.rank, self.size, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
            order = np.resize(order, len(self) * self.world)
        own = order[self.rank :: self.world][self.skip :]
        self.skip = 0
        return iter([(self.epoch, int(index)) for index in own])


def draw_text(seed: int, epoch: int, index: int, number: int) -> int:
    """Which of a sample's texts, of so many, is this epoch's in training: the same from frames and from features."""
    return int(np.random.default_rng((seed, epoch, index, 1)).integers(number))


class EpochDataModule(LightningDataModule):
    """A DataModule whose order is a function of seed and epoch, and which can go on in the middle of an epoch.

    Its datasets fetch whole batches: `__getitems__` takes (epoch, index) pairs.

    Args:
        batch_size: samples a step on each device, before gradient accumulation.
        seed: of the order.
    """

    TIMEOUT_SECONDS = 30  # for a batch; a worker that hangs longer is reported

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        self._epoch = self._seen_batches = 0

    def batches(self, dataset: Dataset[Any], shuffle: bool, num_workers: int = 0) -> DataLoader[Any]:
        """This process's share of a dataset as batches."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world = torch.distributed.get_world_size() if distributed else 1
        size = len(dataset)  # type: ignore[arg-type]
        if size < world:
            raise ConfigError(
                f"a split of {size} samples cannot be shared out to {world} processes: take fewer devices"
            )
        skip = self._seen_batches * self.batch_size if shuffle else 0
        sampler = EpochSampler(size, self.seed, shuffle, rank, world, skip)
        sampler.set_epoch(self._epoch)  # Lightning does so too, but after worker processes have begun to fetch
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_stop_signals,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            timeout=self.TIMEOUT_SECONDS if num_workers else 0,
        )

    @abstractmethod
    def fingerprint(self, split: Split, frames: bool) -> str:
        """A digest of a split's clips, questions and labels, and of what decides its frames."""

    def state_dict(self) -> dict[str, Any]:
        """The epoch to go on with, its batches that were trained on, and which data they were of."""
        trainer = self.trainer
        assert trainer is not None
        finished, seen = divmod(
            trainer.fit_loop.epoch_loop.batch_progress.current.processed, int(trainer.num_training_batches)
        )
        return {
            "epoch": trainer.current_epoch + finished,
            "seen_batches": seen,
            "fingerprints": {split: self.fingerprint(split, frames=False) for split in SPLITS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """When training goes on: begin with that epoch, after these batches.

        Raises:
            ConfigError: the run was of other data; names the splits.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        before = state_dict.get("fingerprints", {})
        changed = [split for split in SPLITS if before.get(split) != self.fingerprint(split, frames=False)]
        if changed:
            raise ConfigError(
                f"this run began on other data: {', '.join(changed)} differ (questions, labels, vocabulary or clips). "
                "Give it the data it began with, or delete or rename its folder"
            )
        self._epoch, self._seen_batches = state_dict["epoch"], state_dict["seen_batches"]


def _as_it_is(batch: Any) -> Any:
    return batch


class Example(NamedTuple):
    """A sample as a person looks at it."""

    clip: str
    frames: Frames  # (T, H, W, 3)
    question: str
    answer: str


class Origin(NamedTuple):
    """Where a sample comes from: what accuracies are broken down by, and resampled by."""

    clip: str
    device: str  # or the domain that stands for one; the clip's own name where devices are unknown
    group: str  # "seen" or "unseen" in training; "" where devices are unknown
    type: str  # of the question; "" where there are none
    question: str
    answer: str


def others(origins: Sequence[Origin], seed: int) -> dict[str, list[int]]:
    """For every sample another one, whose anchor it is given in a control: any, or of the same question elsewhere.

    Returns:
        shuffled: any other sample; shuffled_device: one of another device with the same type of question, or of another
        device where there is none with that type.
    """
    generator = np.random.default_rng(seed)
    circle = generator.permutation(len(origins))
    following = dict(zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True))
    types: dict[str, list[int]] = {}
    for index, origin in enumerate(origins):
        types.setdefault(origin.type, []).append(index)
    elsewhere = []
    for index, origin in enumerate(origins):
        for pool in (types[origin.type], range(len(origins))):
            tried = (pool[place] for place in generator.integers(len(pool), size=TRIES).tolist())
            other = next((i for i in tried if origins[i].device != origin.device), None)
            if other is not None:
                break
        elsewhere.append(following[index] if other is None else other)
    return {"shuffled": [following[index] for index in range(len(origins))], "shuffled_device": elsewhere}


class Sessions(NamedTuple):
    """Unlabelled clips of devices: what a session can be drawn from."""

    anchors: Dataset[VideoTextBatch]  # every such clip once, with the neutral prompt for a question
    pools: list[list[int]]  # by device: its anchors; never a validation or test clip
    devices: dict[Split, list[int]]  # by split: the device of each sample
    own: dict[Split, list[int]]  # by split: the anchor that is the sample's own clip, -1 where none is
    casts: list[float]  # by device: its true hue cast in degrees, not a number where it is unknown
    fingerprint: str  # of the anchors' frames


class Case(NamedTuple):
    """What is uploaded when a session is evaluated."""

    anchors: int  # n, 0 for no upload
    shuffled: bool  # another device's


# Evaluated one by one; the first decides the best epoch.
CASES = {
    "n16": Case(16, False),
    "n8": Case(8, False),
    "n4": Case(4, False),
    "n1": Case(1, False),
    "n0": Case(0, False),
    "shuffled_n8": Case(8, True),
    "shuffled_n16": Case(16, True),
}


class Captions(NamedTuple):
    """Captioned clips with a question each, for pretraining."""

    train: Dataset[CaptionBatch]
    val: Dataset[CaptionBatch]
    clips: int  # in training
    questions: int  # answered questions about them
    fingerprint: str


class DeviceLabels(NamedTuple):
    """Questions with answers about clips that are unlabelled to every method: for controls only."""

    questions: Dataset[VideoTextBatch]
    origins: list[Origin]


class Content(NamedTuple):
    """What an unlabelled clip shows: for controls only."""

    seen: bool  # whether its device trains
    shapes: tuple[str, ...]  # of its objects
    colors: tuple[str, ...]  # theirs in truth
    looks: tuple[str, ...]  # theirs as the device sees them
    background: float  # hue in degrees as the device sees it


@runtime_checkable
class Controls(Protocol):
    """What a dataset knows that no method may: labels of the devices' unlabelled clips, for controls only."""

    def device_labels(self) -> DeviceLabels:
        """Of test devices."""

    def contents(self) -> dict[str, Content]:
        """Of every anchor of `VideoTextData.sessions`, by clip."""


class VideoTextData(Protocol):
    """What the feature cache, the results and the logs ask of a DataModule."""

    task: ClassVar[Task]
    views: ClassVar[frozenset[View]]
    DOMAINS: ClassVar[tuple[str, ...]]  # kinds of domains that it can be given in place of devices
    protocol: str
    domains: str | None  # which of these it was given
    held_out: list[str]  # domains that training does not see
    notes: dict[Split, str]  # where a split comes from, where that has to be said
    cache_dir: Path
    batch_size: int
    num_workers: int
    seed: int

    def check(self) -> dict[str, Any]:
        """What is here, ready, absent or wrong, after the caches were filled; does not stop at what is wrong."""

    def prepare_data(self) -> None:
        """Check everything and fill the caches."""

    def setup(self, stage: str) -> None:
        """Build the splits."""

    def dataset(self, split: Split, augment: bool) -> Dataset[VideoTextBatch]:
        """A split, its frames drawn anew for every epoch or always the same."""

    def labels(self, split: Split) -> Tensor:
        """(N,) the class of every sample."""

    def fingerprint(self, split: Split, frames: bool) -> str:
        """A digest of a split's clips by name, its questions and labels, and, if asked for, of its frames."""

    def published(self) -> list[dict[str, Any]]:
        """Return every published count of the dataset beside the number here; see `VideoTextDataModule.published`."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Questions, clips, questions left out and held out, unknown answers and the accuracy's ceiling, by split."""

    def example(self, split: Split, index: int) -> Example:
        """A sample to look at."""

    def answers(self) -> list[str]:
        """The word of every class but the last, which stands for all others; none where there are no classes."""

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """The right answer to a sample as an annotation has it, or what the prediction `label` says."""

    def texts(self, split: Split, index: int) -> Sequence[str]:
        """A sample's candidates or captions; none of an open-ended question."""

    def origins(self, split: Split) -> list[Origin]:
        """Where each sample comes from."""

    def word_counts(self, split: Split) -> Counter[int]:
        """How often each WordPiece is in a split's texts."""

    def sessions(self) -> Sessions:
        """Unlabelled clips by device, of a dataset whose `views` have "sessions", or that was given domains."""

    def captions(self) -> Captions:
        """Captioned clips, of a dataset whose `views` have "captions"."""
