"""The samples of a split as batches: choice of frames, crops and texts."""

import hashlib
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cdc_mmpg.data.batch import VideoTextBatch
from cdc_mmpg.data.sampling import Jitter, draw_cast, draw_copy, draw_text
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.media.frames import Frames, choose_crop_corner, choose_middle_candidates
from cdc_mmpg.media.text import pad
from data_modules.cache import FrameCache
from data_modules.device_cache import DeviceCache, allocate_frames
from data_modules.domains import Change, ColorJitter, Rotation, rotate_hues

Texts = Sequence[Sequence[int]]  # WordPiece ids of one sample's question, candidates or captions


class Sample(NamedTuple):
    """A sample of a split, as annotated."""

    clip: str  # name of the clip in the annotation
    question: str  # "" without a question
    answer: str = ""  # answer to an open-ended question
    type: str = ""  # type of the question, "" if unknown
    options: tuple[str, ...] = ()  # candidates of a multiple choice, or the clip's captions
    right: int = 0  # index of the right candidate
    id: str = ""  # id of the question in the annotation, "" without one


class ClipDataset(Dataset[VideoTextBatch]):
    """The samples of a split as batches; an item is fetched by (epoch, index), which decide its augmentation.

    Args:
        samples: samples of the split.
        texts: texts of each sample.
        labels: (N,) class of each sample, or index of its right candidate.
        cache: cache with the clips' frames.
        augment: draw the frames within their segments and the position of the crop; else take the middle ones.
        draw: in training, use one of several texts, drawn anew in every epoch.
        seed: seed of the draws.
        shift: domains of the clips, which change their frames; None without domains.

    Attributes:
        virtual: number of virtual devices of each device in training, see `with_virtual_devices`.
        devices: device of each sample; needed only with virtual devices.
    """

    virtual = 0
    devices: Sequence[str] = ()

    def __init__(
        self,
        samples: Sequence[Sample],
        texts: Sequence[Texts],
        labels: Tensor,
        cache: FrameCache,
        augment: bool = False,
        draw: bool = False,
        seed: int = 0,
        shift: Change | None = None,
    ) -> None:
        self.samples, self.texts, self.labels = samples, texts, labels
        self.cache, self.augment, self.draw, self.seed, self.shift = cache, augment, draw, seed, shift

    def with_augmentation(self, augment: bool) -> "ClipDataset":
        """Return the same samples, augmented or not."""
        return self._copy_with(augment=augment)

    def rotate(self, degrees: Sequence[float]) -> "ClipDataset":
        """Return the same samples with the hues of each sample's clip rotated.

        Args:
            degrees: rotation for each sample in degrees, the same for all samples of a clip.

        Raises:
            ConfigError: the frames are kept on the device, where hues cannot be rotated.
        """
        self._check_cache()
        by_clip = {sample.clip: angle for sample, angle in zip(self.samples, degrees, strict=True)}
        return self._copy_with(shift=Rotation(by_clip, self.shift))

    def jitter(self, jitters: Sequence[Jitter]) -> "ClipDataset":
        """Return the same samples with the colours of each sample's clip jittered; arguments and errors as `rotate`."""
        self._check_cache()
        by_clip = {sample.clip: jitter for sample, jitter in zip(self.samples, jitters, strict=True)}
        return self._copy_with(shift=ColorJitter(by_clip, self.shift))

    def with_virtual_devices(self, number: int, devices: Sequence[str]) -> "ClipDataset":
        """Return the same samples, each seen by its device or one of its virtual devices with equal probability.

        Args:
            number: number of virtual devices of a device; 0 leaves the samples unchanged.
            devices: device of each sample.

        Raises:
            ConfigError: see `rotate`.
        """
        if number:
            self._check_cache()
        return self._copy_with(virtual=number, devices=devices)

    def _check_cache(self) -> None:
        """Refuse to change the colours of frames that are kept on the device."""
        if isinstance(self.cache, DeviceCache):
            raise ConfigError("frame_cache is device, but this method changes colours of frames: leave out FRAME_CACHE")

    def _copy_with(self, **changes: object) -> "ClipDataset":
        """Return a copy with other settings."""
        other = copy(self)
        vars(other).update(changes)
        return other

    def __len__(self) -> int:
        return len(self.samples)

    def frames(self, epoch: int, index: int) -> Tensor:
        """Read a sample's frames, (T, S, S, 3) uint8."""
        size = self.cache.image_size
        frames = allocate_frames(self.cache.num_frames, size, size, 3)
        self._read(epoch, index, frames.numpy())
        return frames

    def _read(self, epoch: int, index: int, frames: Frames) -> None:
        """Read a sample's frames into `frames` (T, S, S, 3), its part of a batch; read only the cropped region."""
        clip, size = self.samples[index].clip, self.cache.image_size
        kept = self.cache.array(clip)
        chosen, top, left = self._draw_crop(epoch, index, kept.shape)
        rotation = self._draw_rotation(epoch, index)
        if rotation or (self.shift is not None and self.shift.describe_effect(clip)):
            changed = kept[chosen] if self.shift is None else self.shift.apply(clip, kept[chosen])
            changed = changed[:, top : top + size, left : left + size]
            frames[:] = rotate_hues(changed, rotation) if rotation else changed
            return
        for place, number in enumerate(chosen):
            frames[place] = kept[number, top : top + size, left : left + size]

    def _draw_rotation(self, epoch: int, index: int) -> float:
        """Draw the hue rotation in degrees of the device that sees a sample in this epoch; 0 for its real device."""
        copy = draw_copy(self.seed, epoch, index, 1 + self.virtual)
        return draw_cast(self.devices[index], copy - 1) if copy else 0.0

    def _draw_crop(self, epoch: int, index: int, shape: Sequence[int]) -> tuple[list[int], int, int]:
        """Draw the indices of a sample's frames among the kept ones (K, H, W, 3), and top and left of its crop."""
        generator, candidates = None, self.cache.candidates
        chosen = choose_middle_candidates(self.cache.num_frames, candidates)
        if self.augment:
            generator = np.random.default_rng((self.seed, epoch, index))
            starts = range(0, self.cache.num_frames * candidates, candidates)
            drawn = generator.integers(candidates, size=len(starts)).tolist()
            chosen = [start + place for start, place in zip(starts, drawn, strict=True)]
        top, left = choose_crop_corner(shape[1], shape[2], self.cache.image_size, generator)
        return self.cache.indices(shape[0], chosen), top, left

    def _read_batch(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """Read the samples' frames, (B, T, S, S, 3), or locate them on the device, (B, T, 2): `DeviceCache.gather`."""
        number, size = self.cache.num_frames, self.cache.image_size
        if isinstance(self.cache, DeviceCache):
            return torch.tensor([self._locate_crops(self.cache, epoch, index) for epoch, index in items])
        frames = allocate_frames(len(items), number, size, size, 3)
        for (epoch, index), place in zip(items, frames.numpy(), strict=True):
            self._read(epoch, index, place)
        return frames

    def _locate_crops(self, cache: DeviceCache, epoch: int, index: int) -> list[tuple[int, int]]:
        """Return where a sample's crops lie on the device, (T, 2) as in `DeviceCache.gather`."""
        offset, shape = cache.places[self.samples[index].clip]
        chosen, top, left = self._draw_crop(epoch, index, shape)
        _, height, width, channels = shape
        row = width * channels
        return [(offset + (number * height + top) * row + left * channels, row) for number in chosen]

    def digest(self, frames: bool) -> str:
        """Return a digest of clip names, texts and labels; with `frames` also of the frames."""
        digest = hashlib.sha256()
        for sample, texts, label in zip(self.samples, self.texts, self.labels.tolist(), strict=True):
            clip = self.cache.key(sample.clip) if frames else sample.clip
            if frames and self.shift is not None:
                clip += self.shift.describe_effect(sample.clip)
            digest.update(f"{clip} {texts} {label}\n".encode())
        return digest.hexdigest()

    def draw_texts(self, epoch: int, index: int) -> Texts:
        """Return a sample's texts, or, with `draw` in training, the one drawn for this epoch."""
        texts = self.texts[index]
        if not (self.draw and self.augment):
            return texts
        return [texts[draw_text(self.seed, epoch, index, len(texts))]]

    def collate(self, texts: Sequence[Texts]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of a batch's texts, (B, K, L): rows of zeros for a sample with fewer than K texts."""
        longest = max(map(len, texts))
        ids, mask = pad([text for listed in texts for text in [*listed, *[[]] * (longest - len(listed))]])
        return torch.from_numpy(ids).unflatten(0, (-1, longest)), torch.from_numpy(mask).unflatten(0, (-1, longest))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> VideoTextBatch:
        indices = torch.tensor([index for _, index in items])
        ids, mask = self.collate([self.draw_texts(epoch, i) for epoch, i in items])
        return VideoTextBatch(self._read_batch(items), ids, mask, self.labels[indices], indices)


class QADataset(ClipDataset):
    """A split whose samples have one text each, the question."""

    def collate(self, texts: Sequence[Texts]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of a batch's questions, (B, L)."""
        ids, mask = pad([text for (text,) in texts])
        return torch.from_numpy(ids), torch.from_numpy(mask)
