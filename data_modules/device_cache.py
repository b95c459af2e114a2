"""The frame cache on the device that computes: no batch of frames is read from the disk or copied there any more."""

import logging
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from rich.filesize import decimal
from rich.progress import track
from torch import Tensor
from torch.utils.data import get_worker_info

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.processors import free_memory
from data_modules.cache import FrameCache

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a clip's frames lie among those of all clips."""

    offset: int  # bytes before them
    shape: tuple[int, ...]  # (K, H, W, 3)


class DeviceCache(FrameCache):
    """A frame cache that is also kept whole in the memory of the device that computes, once a batch asks for it.

    A batch is drawn on the host, as of the disk's cache, and travels as the places of its frames; the frames
    are gathered on the device.

    Args:
        see `FrameCache`.

    Attributes:
        clips: those to keep, to be set before the first batch.
    """

    clips: Sequence[str] = ()
    _frames: Tensor | None = None  # all of them, one after another

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each clip's frames lie.

        Raises:
            DataError: see `FrameCache.array`.
        """
        offset, places = 0, {}
        for clip in self.clips:
            places[clip] = Place(offset, self.array(clip).shape)
            offset += prod(places[clip].shape)
        return places

    def gather(self, crops: Tensor) -> Tensor:
        """Return the squares of a batch, (B, T, S, S, 3), without a word to the host.

        Args:
            crops: (B, T, 2) int64 on the device: bytes before a square's first row, and from a row to the next.

        Raises:
            ConfigError: the device has no room for all frames.
        """
        if self._frames is None:
            self._frames = self._load(crops.device)
        size = self.image_size
        rows = crops[..., :1] + torch.arange(size, device=crops.device) * crops[..., 1:]
        gathered = empty_frames(rows.numel(), 3 * size, device=crops.device)
        # Every place where a row could begin, without a copy.
        every = self._frames.as_strided((len(self._frames) - 3 * size + 1, 3 * size), (1, 1))
        torch.index_select(every, 0, rows.flatten(), out=gathered)
        return gathered.view(*rows.shape, size, 3)

    def _load(self, device: torch.device) -> Tensor:
        """Return all frames on a device, where they fit."""
        needed = sum(prod(place.shape) for place in self.places.values())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        sizes = f"the frames of {len(self.places):,} clips take {decimal(needed)}, {decimal(free)} are free on {device}"
        if needed > free:
            raise ConfigError(
                f"{sizes}: leave them on the disk (FRAME_CACHE=disk), or keep fewer (--data.init_args.candidates=1)"
            )
        logger.info("%s: they are kept there, and the run has the rest", sizes)
        frames = empty_frames(needed, device=device)
        for clip, (offset, shape) in track(self.places.items(), description="reading all frames"):
            own = torch.from_numpy(np.array(self.array(clip)))
            frames[offset : offset + prod(shape)].copy_(own.flatten())
        return frames


def empty_frames(*shape: int, device: torch.device | None = None) -> Tensor:
    """Return memory for frames that is cheap to have: to get a batch's page by page takes longer than to fill it.

    A process that loads for another one has it in what both share, or else all would be copied there.
    """
    if device is not None and device.type != "cpu":
        return torch.empty(shape, dtype=torch.uint8, device=device)
    if get_worker_info() is not None:
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(prod(shape))).view(shape)
    return torch.from_numpy(np.empty(shape, np.uint8))  # numpy asks for large pages
