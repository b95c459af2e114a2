"""Typed batches: what a dataset hands to a method, and the names of tasks, views and splits."""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cdc_mmpg.media.frames import MEAN, STD

Task = Literal["open_ended", "multiple_choice", "retrieval"]
View = Literal["samples", "sessions", "captions"]  # how a method reads a dataset
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
UNKNOWN_ANSWER = "(unknown)"  # the word of the class that stands for all other answers
UNKNOWN_LABEL = -100  # label of an answer outside the vocabulary: no loss in training, wrong in evaluation


class VideoTextBatch(NamedTuple):
    """Clips with a question each, or with K texts: candidates of a multiple choice, captions."""

    frames: Tensor  # (B, T, S, S, 3) uint8 RGB
    text_ids: Tensor  # (B, L) or (B, K, L) int64, padded with 0 at the end
    text_mask: Tensor  # the same, 1 where there is a token; of K texts those without any are not there
    labels: Tensor  # (B,) int64, `UNKNOWN_LABEL` for an answer outside the vocabulary; which candidate is right
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
    # (B, 2) cosine and sine of the device's true hue cast, for the oracle; NaN where it is unknown
    casts: Tensor
    sets: Tensor | None = None  # (B, C, S, 192) the anchors themselves, the first `anchors` of them, where asked for

    @property
    def labels(self) -> Tensor:
        """Labels of the samples, (B,)."""
        return self.samples.labels

    @property
    def indices(self) -> Tensor:
        """Places of the samples in their split, (B,)."""
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


IMAGENET_LEVELS = torch.tensor([MEAN, STD]) * 255  # (2, 3) mean and standard deviation of ImageNet's RGB levels, of 255


def normalise(frames: Tensor) -> Tensor:
    """Return uint8 frames (B, T, H, W, 3) as the encoder reads them: (B, T, 3, H, W) float32, ImageNet-normalised."""
    mean, std = IMAGENET_LEVELS if frames.device.type == "cpu" else _levels_on(frames.device)
    return ((frames - mean) / std).movedim(-1, 2)


@cache
def _levels_on(device: torch.device) -> Tensor:
    """Return `IMAGENET_LEVELS` on a GPU, where they are copied once: a copy waits for all that is computed there."""
    return IMAGENET_LEVELS.to(device)
