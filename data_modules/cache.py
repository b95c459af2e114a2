"""The frame cache: every clip's candidate frames, decoded once, resized, as memory-mapped uint8 arrays.

One `.npy` (K, H, W, 3) a clip (fewer than K where the clip has fewer frames), named after the clip and after a digest
of the clip's size and time and of the settings: a changed clip or setting is a new name, so a stale file is never read.
Files appear whole or not at all.
"""

import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from rich.filesize import decimal
from rich.progress import track

from cdc_mmpg.errors import DataError
from cdc_mmpg.files import atomic_write, remove_leftovers
from cdc_mmpg.frames import CANDIDATES, Frames, candidate_indices, shorter_side
from cdc_mmpg.video import Decoder, read_frames

logger = logging.getLogger(__name__)


def _begin_worker() -> None:
    """Ctrl-C reaches all processes: the one that started this decides. Without it, this ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class FrameCache:
    """Candidate frames of clips, on disk.

    Args:
        folder: where the arrays lie.
        num_frames, image_size, decoder: see `frames` and `video`.
        side: pixels to which a frame's shorter side is resized; None is `shorter_side(image_size)`.
    """

    def __init__(
        self, folder: Path, num_frames: int, image_size: int, decoder: Decoder, side: int | None = None
    ) -> None:
        self.folder, self.num_frames, self.image_size, self.decoder = folder, num_frames, image_size, decoder
        self.side = side or shorter_side(image_size)

    def path(self, clip: Path) -> Path:
        """The array of a clip as it is now; the clip exists."""
        stat = clip.stat()
        settings = (stat.st_size, stat.st_mtime_ns, self.num_frames, CANDIDATES, self.side, self.decoder)
        return self.folder / f"{clip.stem}.{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}.npy"

    def read(self, clip: Path, candidates: Sequence[int]) -> Frames:
        """Some of the candidate frames of a clip, (T, H, W, 3).

        Raises:
            DataError: not prepared, or the file was damaged from outside.
        """
        path = self.path(clip)
        try:
            kept = np.load(path, mmap_mode="r", allow_pickle=False)  # only the frames that are used are read
            places = candidate_indices(len(kept), self.num_frames)
            return kept[[places[candidate] for candidate in candidates]]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: the cached frames of {clip} cannot be read ({error}): delete the file") from error

    def fill(self, clips: Iterable[Path], workers: int) -> dict[Path, str]:
        """Decode what is not there yet, in `workers` processes; what was done stays if this is killed.

        Returns:
            The clips that cannot be decoded, with the reason.

        Raises:
            DataError: the disk has too little room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        there = {path.name for path in self.folder.iterdir()}
        missing = [clip for clip in clips if self.path(clip).name not in there]
        if not missing:
            return {}
        frame_bytes = self.side * round(self.side * 4 / 3) * 3
        needed = len(missing) * self.num_frames * CANDIDATES * frame_bytes
        logger.info("decoding %d clips into %s, about %s", len(missing), self.folder, decimal(needed))
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise DataError(
                f"{self.folder}: about {decimal(needed)} are needed for the frames of {len(missing)} clips, "
                f"{decimal(free)} are free: make room, or set --data.init_args.cache_dir"
            )
        failures: dict[Path, str] = {}
        # Fresh processes: a forked copy of a process with running threads may hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(max(1, workers), context, initializer=_begin_worker)
        try:
            futures = {pool.submit(self._decode, clip): clip for clip in missing}
            for future in track(_as_completed(futures), description="decoding clips", total=len(futures)):
                try:
                    future.result()
                except DataError as error:
                    failures[futures[future]] = str(error)
                except BrokenProcessPool as error:
                    pending = [str(clip) for clip in missing if not self.path(clip).exists() and clip not in failures]
                    raise DataError(
                        f"a decoding process died, on one of {', '.join(pending[: 2 * max(1, workers)])}: "
                        "remove the clip that kills it, or try the other decoder"
                    ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        return failures

    def _decode(self, clip: Path) -> None:
        def choose(count: int) -> list[int]:
            """A clip with fewer frames than candidates is kept whole, without repetitions."""
            return (
                candidate_indices(count, self.num_frames) if count > self.num_frames * CANDIDATES else [*range(count)]
            )

        frames = read_frames(clip, choose, self.image_size, self.decoder, self.side)
        with atomic_write(self.path(clip)) as file:
            np.save(file, frames)


def _as_completed(futures: Iterable[Future[None]]) -> Iterable[Future[None]]:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from done
