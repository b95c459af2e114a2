"""The frame cache in the memory of the computing device: batches are neither read from the disk nor copied."""

import logging
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import get_worker_info

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.processors import measure_free_memory
from cdc_mmpg.progress import track
from data_modules.cache import FrameCache

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Position of a clip's frames among those of all clips."""

    offset: int  # bytes before the frames
    shape: tuple[int, ...]  # (K, H, W, 3)


class DeviceCache(FrameCache):
    """A frame cache that is loaded entirely into the memory of the computing device with the first batch.

    A batch is drawn on the host, as with the cache on disk, and is transferred as the positions of its frames; the
    frames are gathered on the device.

    Args:
        see `FrameCache`.

    Attributes:
        clips: names of the clips to load, to be set before the first batch.
    """

    clips: Sequence[str] = ()
    _frames: Tensor | None = None  # frames of all clips, concatenated

    @cached_property
    def places(self) -> dict[str, Place]:
        """Position of each clip's frames.

        Raises:
            DataError: see `FrameCache.array`.
        """
        offset, places = 0, {}
        for clip in self.clips:
            places[clip] = Place(offset, self.array(clip).shape)
            offset += prod(places[clip].shape)
        return places

    def gather(self, crops: Tensor) -> Tensor:
        """Gather the crops of a batch, (B, T, S, S, 3), without synchronising with the host.

        Args:
            crops: (B, T, 2) int64 on the device: bytes before a crop's first row, and from one row to the next.

        Raises:
            ConfigError: the device lacks memory for all frames.
        """
        if self._frames is None:
            self._frames = self._load(crops.device)
        size = self.image_size
        rows = crops[..., :1] + torch.arange(size, device=crops.device) * crops[..., 1:]
        gathered = allocate_frames(rows.numel(), 3 * size, device=crops.device)
        # A view with a row at every possible offset: no copy.
        all_rows = self._frames.as_strided((len(self._frames) - 3 * size + 1, 3 * size), (1, 1))
        torch.index_select(all_rows, 0, rows.flatten(), out=gathered)
        return gathered.view(*rows.shape, size, 3)

    def _load(self, device: torch.device) -> Tensor:
        """Load all frames onto a device, if they fit."""
        needed = sum(prod(place.shape) for place in self.places.values())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else measure_free_memory()
        sizes = f"the frames of {len(self.places):,} clips take {decimal(needed)}, {decimal(free)} are free on {device}"
        if needed > free:
            raise ConfigError(
                f"{sizes}: leave them on the disk (FRAME_CACHE=disk), or keep fewer (--data.init_args.candidates=1)"
            )
        logger.info("%s: loading them; the run has the rest", sizes)
        frames = allocate_frames(needed, device=device)
        for clip, (offset, shape) in track(self.places.items(), description="reading all frames"):
            clip_frames = torch.from_numpy(np.array(self.array(clip)))
            frames[offset : offset + prod(shape)].copy_(clip_frames.flatten())
        return frames


def allocate_frames(*shape: int, device: torch.device | None = None) -> Tensor:
    """Allocate uint8 memory for frames in large pages: getting it page by page takes longer than filling it.

    A loading process allocates shared memory, because otherwise all frames would be copied into it.
    """
    if device is not None and device.type != "cpu":
        return torch.empty(shape, dtype=torch.uint8, device=device)
    if get_worker_info() is not None:
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(prod(shape))).view(shape)
    return torch.from_numpy(np.empty(shape, np.uint8))  # numpy asks for large pages
