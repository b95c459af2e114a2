"""The interface of a DataModule: what methods, results, logs and controls ask of a dataset."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cdc_mmpg.data.batch import CaptionBatch, Split, Task, VideoTextBatch, View
from cdc_mmpg.data.sampling import Jitter
from cdc_mmpg.media.frames import Frames


class ReadableSample(NamedTuple):
    """A sample as a person looks at it."""

    clip: str
    frames: Frames  # (T, H, W, 3)
    question: str
    answer: str


class SampleOrigin(NamedTuple):
    """Where a sample comes from: what accuracies are broken down by, and resampled by."""

    clip: str
    device: str  # or the domain that stands for one; the clip's own name where devices are unknown
    group: str  # "seen" or "unseen" in training; "" where devices are unknown
    type: str  # of the question; "" where there are none
    question: str
    answer: str


class Sessions(NamedTuple):
    """Unlabelled clips of devices: what a session can be drawn from."""

    anchors: Dataset[VideoTextBatch]  # every such clip once, with the neutral prompt for a question
    pools: list[list[int]]  # by device: its anchors; never a validation or test clip
    devices: dict[Split, list[int]]  # by split: the device of each sample
    own: dict[Split, list[int]]  # by split: the anchor that is the sample's own clip, -1 where none is
    casts: list[float]  # by device: its true hue cast in degrees, not a number where it is unknown
    fingerprint: str  # of the anchors' frames
    alike: list[list[int]] | None = None  # by device: as of one room, its anchors of most alike backgrounds, if known


class Captions(NamedTuple):
    """Captioned clips with a question each, for pretraining."""

    train: Dataset[CaptionBatch]
    val: Dataset[CaptionBatch]
    clips: int  # number of clips in training
    questions: int  # number of answered questions about them
    fingerprint: str


class DeviceLabels(NamedTuple):
    """Questions with answers about clips that are unlabelled to every method: for controls only."""

    questions: Dataset[VideoTextBatch]
    origins: list[SampleOrigin]


class Content(NamedTuple):
    """What an unlabelled clip shows: for controls only."""

    seen: bool  # whether its device trains
    shapes: tuple[str, ...]  # of its objects
    colors: tuple[str, ...]  # theirs in truth
    looks: tuple[str, ...]  # theirs as the device sees them
    background: float  # hue in degrees as the device sees it


@runtime_checkable
class Controls(Protocol):
    """A dataset that also knows labels of the devices' unlabelled clips, which no method reads: for controls only."""

    def device_labels(self) -> DeviceLabels:
        """Return questions with answers about unlabelled clips of test devices."""

    def contents(self) -> dict[str, Content]:
        """Return what every anchor of `VideoTextData.sessions` shows, by clip."""


class VideoTextData(Protocol):
    """A DataModule, as the feature cache, the results and the logs use it."""

    task: ClassVar[Task]
    views: ClassVar[frozenset[View]]
    DOMAINS: ClassVar[tuple[str, ...]]  # kinds of domains that it can be given in place of devices
    protocol: str
    domains: str | None  # which of these it was given
    held_out: list[str]  # domains that training does not see
    notes: dict[Split, str]  # where a split comes from, where that has to be said
    cache_dir: Path
    batch_size: int
    per_device: int | None
    even: bool
    num_workers: int | None
    seed: int
    virtual: int  # virtual devices of each device that trains, in batches of frames

    def check(self) -> dict[str, Any]:
        """Return what is here, ready, absent or wrong, after filling the caches; go on past what is wrong."""

    def prepare_data(self) -> None:
        """Check everything and fill the caches."""

    def setup(self, stage: str) -> None:
        """Build the splits."""

    def dataset(self, split: Split, augment: bool) -> Dataset[VideoTextBatch]:
        """Return a split, its frames drawn anew for every epoch or always the same."""

    def rotate(self, dataset: Any, degrees: Sequence[float]) -> tuple[Dataset[VideoTextBatch], str]:
        """Return one of its datasets with the hues of each sample's clip rotated, and a digest of it."""

    def jitter(self, dataset: Any, jitters: Sequence[Jitter]) -> tuple[Dataset[VideoTextBatch], str]:
        """Return one of its datasets with the colours of each sample's clip jittered, and a digest of it."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a batch of its datasets on a device, with its frames."""

    def labels(self, split: Split) -> Tensor:
        """Return the class of every sample, (N,)."""

    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return a digest of a split's clips by name, its questions and labels, and with `frames` of its frames."""

    def published(self) -> list[dict[str, Any]]:
        """Return every published count of the dataset beside the number here; see `VideoTextDataModule.published`."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Return by split questions, clips, questions left out or held out, unknown answers, the accuracy's ceiling."""

    def example(self, split: Split, index: int) -> ReadableSample:
        """Return a sample to look at."""

    def answers(self) -> list[str]:
        """Return the word of every class but the last, which stands for all others; none where there are no classes."""

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return the right answer to a sample as an annotation has it, or the word of the prediction `label`."""

    def texts(self, split: Split, index: int) -> Sequence[str]:
        """Return a sample's candidates or captions; none of an open-ended question."""

    def origins(self, split: Split) -> list[SampleOrigin]:
        """Return where each sample comes from."""

    def word_counts(self, split: Split) -> Counter[int]:
        """Count how often each WordPiece is in a split's texts."""

    def sessions(self) -> Sessions:
        """Return unlabelled clips by device, of a dataset whose `views` have "sessions", or that was given domains."""

    def captions(self) -> Captions:
        """Return captioned clips, of a dataset whose `views` have "captions"."""
