"""The samples of a split as batches: which frames, which crop, which texts."""

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
from cdc_mmpg.media.frames import Frames, crop_place, middle_candidates
from cdc_mmpg.media.text import pad
from data_modules.cache import FrameCache
from data_modules.device_cache import DeviceCache, empty_frames
from data_modules.domains import Change, Jittered, Rotation, rotate_hues

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

    Attributes:
        virtual: how many virtual devices each device becomes in training, see `with_virtual_devices`.
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
        return self._with(augment=augment)

    def rotate(self, degrees: Sequence[float]) -> "ClipDataset":
        """Return the same samples with the hues of each sample's clip rotated.

        Args:
            degrees: of each sample, the same for all samples of a clip.

        Raises:
            ConfigError: the frames are kept on the device, where nothing rotates them.
        """
        self._check_cache()
        by_clip = {sample.clip: own for sample, own in zip(self.samples, degrees, strict=True)}
        return self._with(shift=Rotation(by_clip, self.shift))

    def jitter(self, jitters: Sequence[Jitter]) -> "ClipDataset":
        """Return the same samples with the colours of each sample's clip jittered; arguments and errors as `rotate`."""
        self._check_cache()
        by_clip = {sample.clip: own for sample, own in zip(self.samples, jitters, strict=True)}
        return self._with(shift=Jittered(by_clip, self.shift))

    def with_virtual_devices(self, number: int, devices: Sequence[str]) -> "ClipDataset":
        """Return the same samples, each seen by its device or, as often as each other, by one of its virtual devices.

        Args:
            number: of virtual devices of a device; 0 leaves the samples as they are.
            devices: of each sample.

        Raises:
            ConfigError: see `rotate`.
        """
        if number:
            self._check_cache()
        return self._with(virtual=number, devices=devices)

    def _check_cache(self) -> None:
        """Refuse to rotate hues of frames that are kept on the device."""
        if isinstance(self.cache, DeviceCache):
            raise ConfigError(
                "frame_cache is device, and this method rotates hues, which frames on a device do not: leave out "
                "FRAME_CACHE"
            )

    def _with(self, **changes: object) -> "ClipDataset":
        """Return the same samples with other settings."""
        other = copy(self)
        vars(other).update(changes)
        return other

    def __len__(self) -> int:
        return len(self.samples)

    def frames(self, epoch: int, index: int) -> Tensor:
        """Return a sample's frames, (T, S, S, 3) uint8."""
        size = self.cache.image_size
        frames = empty_frames(self.cache.num_frames, size, size, 3)
        self._read(epoch, index, frames.numpy())
        return frames

    def _read(self, epoch: int, index: int, frames: Frames) -> None:
        """Read a sample's frames into their place (T, S, S, 3) in a batch: no more than is seen of them."""
        clip, size = self.samples[index].clip, self.cache.image_size
        kept = self.cache.array(clip)
        chosen, top, left = self._draw(epoch, index, kept.shape)
        turn = self._draw_turn(epoch, index)
        if turn or (self.shift is not None and self.shift.effect(clip)):
            seen = kept[chosen] if self.shift is None else self.shift.apply(clip, kept[chosen])
            seen = seen[:, top : top + size, left : left + size]
            frames[:] = rotate_hues(seen, turn) if turn else seen
            return
        for place, number in enumerate(chosen):
            frames[place] = kept[number, top : top + size, left : left + size]

    def _draw_turn(self, epoch: int, index: int) -> float:
        """Draw by how many degrees the device that sees a sample in this epoch rotates its hues, 0 for its own."""
        copy = draw_copy(self.seed, epoch, index, 1 + self.virtual)
        return draw_cast(self.devices[index], copy - 1) if copy else 0.0

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

    def digest(self, frames: bool) -> str:
        """Return a digest of clips by name, texts and labels, and with `frames` of the frames."""
        digest = hashlib.sha256()
        for sample, texts, label in zip(self.samples, self.texts, self.labels.tolist(), strict=True):
            clip = self.cache.key(sample.clip) if frames else sample.clip
            if frames and self.shift is not None:
                clip += self.shift.effect(sample.clip)
            digest.update(f"{clip} {texts} {label}\n".encode())
        return digest.hexdigest()

    def draw_texts(self, epoch: int, index: int) -> Texts:
        """Return a sample's texts, or in training the one that is this epoch's."""
        texts = self.texts[index]
        if not (self.draw and self.augment):
            return texts
        return [texts[draw_text(self.seed, epoch, index, len(texts))]]

    def collate(self, texts: Sequence[Texts]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of a batch's texts, (B, K, L): rows of zeros where a sample has fewer than K."""
        most = max(map(len, texts))
        ids, mask = pad([text for own in texts for text in [*own, *[[]] * (most - len(own))]])
        return torch.from_numpy(ids).unflatten(0, (-1, most)), torch.from_numpy(mask).unflatten(0, (-1, most))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> VideoTextBatch:
        where = torch.tensor([index for _, index in items])
        ids, mask = self.collate([self.draw_texts(epoch, i) for epoch, i in items])
        return VideoTextBatch(self._batch(items), ids, mask, self.labels[where], where)


class QADataset(ClipDataset):
    """Every sample has one text, its question."""

    def collate(self, texts: Sequence[Texts]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of a batch's questions, (B, L)."""
        ids, mask = pad([text for (text,) in texts])
        return torch.from_numpy(ids), torch.from_numpy(mask)
