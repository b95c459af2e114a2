"""The interface of a DataModule for methods, results, logs and controls."""

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
    """A sample in a form that a person can read."""

    clip: str
    frames: Frames  # (T, H, W, 3)
    question: str
    answer: str


class SampleOrigin(NamedTuple):
    """The origin of a sample: accuracies are broken down and resampled by it."""

    clip: str
    device: str  # device, or the domain that stands for it; the clip's name if devices are unknown
    group: str  # "seen" or "unseen" in training; "" if devices are unknown
    type: str  # type of the question; "" if it has none
    question: str
    answer: str


class Sessions(NamedTuple):
    """Unlabelled clips of devices, from which sessions are drawn."""

    anchors: Dataset[VideoTextBatch]  # every such clip once, with the neutral prompt as its question
    pools: list[list[int]]  # by device: indices of its anchors; never a validation or test clip
    devices: dict[Split, list[int]]  # by split: the device of each sample
    own_anchors: dict[Split, list[int]]  # by split: the anchor that is the sample's clip itself, -1 if there is none
    casts: list[float]  # by device: its true hue cast in degrees, NaN if unknown
    fingerprint: str  # digest of the anchors' frames
    alike: list[list[int]] | None = None  # by device: its anchors with the most similar backgrounds, if known


class Captions(NamedTuple):
    """Captioned clips with one question each, for pretraining."""

    train: Dataset[CaptionBatch]
    val: Dataset[CaptionBatch]
    clips: int  # number of training clips
    questions: int  # number of answered questions about them
    fingerprint: str


class DeviceLabels(NamedTuple):
    """Questions with answers about clips that are unlabelled for every method: for controls only."""

    questions: Dataset[VideoTextBatch]
    origins: list[SampleOrigin]


class Content(NamedTuple):
    """The content of an unlabelled clip: for controls only."""

    seen: bool  # whether its device trains
    shapes: tuple[str, ...]  # shapes of its objects
    colors: tuple[str, ...]  # their true colours
    seen_colors: tuple[str, ...]  # their colours as the device sees them
    background: float  # hue in degrees as the device sees it


@runtime_checkable
class LabelsDevices(Protocol):
    """Dataset that can label the devices' unlabelled clips, which no method reads: for controls only."""

    def device_labels(self) -> DeviceLabels:
        """Return questions with answers about unlabelled clips of test devices."""


@runtime_checkable
class DescribesClips(Protocol):
    """Dataset that knows what its clips show: for controls only."""

    def contents(self) -> dict[str, Content]:
        """Return the content of every anchor of `VideoTextData.sessions`, by clip."""


class VideoTextData(Protocol):
    """The DataModule that the feature cache, the results and the logs use."""

    task: ClassVar[Task]
    views: ClassVar[frozenset[View]]
    DOMAINS: ClassVar[tuple[str, ...]]  # kinds of domains that can stand for devices
    protocol: str
    domains: str | None  # kind of domains in use
    held_out: list[str]  # domains that training does not see
    notes: dict[Split, str]  # how a split was made, if worth reporting
    cache_dir: Path
    batch_size: int
    per_device: int | None
    even: bool
    num_workers: int | None
    seed: int
    virtual: int  # virtual devices of each training device, in batches of frames

    def check(self) -> dict[str, Any]:
        """Check everything and fill the frame cache; report what is present, ready, absent or wrong."""

    def prepare_data(self) -> None:
        """Check the dataset and fill the frame cache."""

    def setup(self, stage: str) -> None:
        """Build the splits."""

    def dataset(self, split: Split, augment: bool) -> Dataset[VideoTextBatch]:
        """Return a split; with `augment` its frames are drawn anew in every epoch."""

    def rotate(self, dataset: Any, degrees: Sequence[float]) -> tuple[Dataset[VideoTextBatch], str]:
        """Return a dataset of this module with the hues of each sample's clip rotated, and its digest."""

    def jitter(self, dataset: Any, jitters: Sequence[Jitter]) -> tuple[Dataset[VideoTextBatch], str]:
        """Return a dataset of this module with the colours of each sample's clip jittered, and its digest."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device, with its frames."""

    def labels(self, split: Split) -> Tensor:
        """Return the class of every sample, (N,)."""

    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return a digest of a split's clip names, questions and labels; with `frames` also of its frames."""

    def published(self) -> list[dict[str, Any]]:
        """Compare every published count with the local one; see `VideoTextDataModule.published`."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Return for each split: questions, clips, questions left or held out, unknown answers, maximum accuracy."""

    def example(self, split: Split, index: int) -> ReadableSample:
        """Return a sample in a form that a person can read."""

    def answers(self) -> list[str]:
        """Return the word of every class except the last, which stands for all others; empty without classes."""

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return the right answer to a sample as annotated, or the word for a predicted `label`."""

    def texts(self, split: Split, index: int) -> Sequence[str]:
        """Return a sample's candidates or captions; empty for an open-ended question."""

    def origins(self, split: Split) -> list[SampleOrigin]:
        """Return the origin of each sample."""

    def locate_test_questions(self) -> dict[str, int | None]:
        """Return the position of every annotated test question by its id; None if it is left out with its clip."""

    def word_counts(self, split: Split) -> Counter[int]:
        """Count how often each WordPiece occurs in a split's texts."""

    def sessions(self) -> Sessions:
        """Return unlabelled clips by device, if `views` contains "sessions" or domains are in use."""

    def captions(self) -> Captions:
        """Return captioned clips, if `views` contains "captions"."""
