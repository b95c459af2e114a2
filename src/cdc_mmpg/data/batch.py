"""Typed batches that datasets pass to methods, and the names of tasks, views and splits."""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cdc_mmpg.media.frames import MEAN, STD

Task = Literal["open_ended", "multiple_choice", "retrieval"]
View = Literal["samples", "sessions", "captions"]  # kinds of batches that a method can read from a dataset
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
UNKNOWN_ANSWER = "(unknown)"  # the word of the class that stands for all other answers
UNKNOWN_LABEL = -100  # label of an answer outside the vocabulary: no loss in training, wrong in evaluation


class VideoTextBatch(NamedTuple):
    """Clips with one question each, or with K texts each: candidates of a multiple choice, or captions."""

    frames: Tensor  # (B, T, S, S, 3) uint8 RGB
    text_ids: Tensor  # (B, L) or (B, K, L) int64, padded with 0 at the end
    text_mask: Tensor  # same shape, 1 for a token; a sample with fewer than K texts has rows of zeros
    labels: Tensor  # (B,) int64, class (`UNKNOWN_LABEL` outside the vocabulary), or index of the right candidate
    indices: Tensor  # (B,) int64, index of the sample in its split


class FeatureBatch(NamedTuple):
    """The same samples as features of the encoder."""

    # (B, T, 192) of clips with their questions (`Encoded.frame_features`), or of clips alone in retrieval;
    # (B, K, T, 192) of clips with each of K candidates
    frame_features: Tensor
    labels: Tensor  # (B,)
    indices: Tensor  # (B,)
    texts: Tensor | None = None  # (B, K, 192) features of the captions alone, in retrieval
    there: Tensor | None = None  # (B, K) whether each caption exists, or is padding


class SessionBatch(NamedTuple):
    """The same samples, each with the upload of its device in C cases (one case in training)."""

    samples: FeatureBatch
    uploads: Tensor  # (B, C, 192) mean anchor features of n other clips of a device
    anchors: Tensor  # (B, C) n, 0 without an upload
    # (B, 2) cosine and sine of the device's true hue cast, for the oracle; NaN if unknown
    casts: Tensor
    sets: Tensor | None = None  # (B, C, S, 192) the anchors themselves, of which the first `anchors` are valid

    @property
    def labels(self) -> Tensor:
        """Labels of the samples, (B,)."""
        return self.samples.labels

    @property
    def indices(self) -> Tensor:
        """Indices of the samples in their split, (B,)."""
        return self.samples.indices


class CaptionBatch(NamedTuple):
    """Clips with one caption and one question each, for pretraining."""

    frames: Tensor  # (B, T, S, S, 3) uint8 RGB
    caption_ids: Tensor  # (B, L) int64, padded with 0 at the end
    caption_mask: Tensor  # (B, L)
    text_ids: Tensor  # (B, L') the question
    text_mask: Tensor  # (B, L')
    neutral: Tensor  # (P,) the neutral prompt: [CLS], several [MASK], [SEP]
    labels: Tensor  # (B,) WordPiece ids of the answers
    indices: Tensor  # (B,)


IMAGENET_LEVELS = torch.tensor([MEAN, STD]) * 255  # (2, 3) mean and standard deviation of ImageNet's RGB levels (0-255)


def normalise(frames: Tensor) -> Tensor:
    """Normalise uint8 frames (B, T, H, W, 3) by ImageNet's statistics for the encoder: (B, T, 3, H, W) float32."""
    mean, std = IMAGENET_LEVELS if frames.device.type == "cpu" else _levels_on(frames.device)
    return ((frames - mean) / std).movedim(-1, 2)


@cache
def _levels_on(device: torch.device) -> Tensor:
    """Return `IMAGENET_LEVELS` on a GPU; copied only once, because a copy waits for all work queued there."""
    return IMAGENET_LEVELS.to(device)
