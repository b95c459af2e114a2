"""The frame cache: every clip's candidate frames, decoded once, resized, as memory-mapped uint8 arrays.

One folder per combination of settings. It holds one `.npy` (K, H, W, 3) per clip (shorter than K if the clip has fewer
frames), named after the clip and its content, and `index.jsonl`: size, modification time, number of frames and sha256
of every clip. A clip that was touched or moved is hashed, not decoded again; one whose content has changed is refused
by name until the user runs `make data`.

Arrays are written atomically. The index is append-only, one line per clip, written after its array. An array missing
from the index is recovered by its file name: losing the index costs re-hashing, not re-decoding.
"""

import ctypes
import importlib.util
import logging
import mmap
import os
import shutil
import stat
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from cdc_mmpg.errors import CDCError, DataError, format_names
from cdc_mmpg.files import hash_file, remove_leftovers, write_listing
from cdc_mmpg.media.frames import CANDIDATES, Frames, choose_candidates, compute_shorter_side
from cdc_mmpg.media.video import NO_DECORD, Decoder
from cdc_mmpg.progress import track
from data_modules.decoding import DecodingSettings, decode_clips
from data_modules.frame_index import NOT_DECODED, Entry, FrameIndex

logger = logging.getLogger(__name__)

MAX_MAPPED_ARRAYS = 32_768  # arrays that a process keeps mapped; Linux allows 65,530 maps per process


class FrameCache:
    """Candidate frames of clips, on disk; clips are identified by the name that annotations use.

    Args:
        folder: parent of the folders per settings.
        num_frames, image_size, decoder: see `frames` and `video`.
        side: pixels to which a frame's shorter side is resized; None is `compute_shorter_side(image_size)`.
        candidates: frames kept for each of the `num_frames` segments of a clip.
    """

    TIMEOUT_SECONDS: float = 300  # limit for decoding one clip

    def __init__(
        self,
        folder: Path,
        num_frames: int,
        image_size: int,
        decoder: Decoder,
        side: int | None = None,
        candidates: int = CANDIDATES,
    ) -> None:
        self.num_frames, self.image_size, self.decoder, self.candidates = num_frames, image_size, decoder, candidates
        self.side = side or compute_shorter_side(image_size)
        self.changed_list = folder.parent / "changed.txt"  # next to the list of missing clips
        self.folder = folder / f"{decoder}-{self.side}px-{num_frames}x{candidates}"
        self.ready: frozenset[str] = frozenset()  # clips whose frames can be read, after `load` or `fill`
        self.index = FrameIndex(self.folder)

    def load(self) -> None:
        """Read the index that another process has filled.

        Raises:
            DataError: a line of the index is damaged.
        """
        self.index.read(repair=False)
        self._set_ready()

    def entry(self, name: str) -> Entry:
        """Return the index entry of a clip, see `FrameIndex.find`."""
        return self.index.find(name)

    def key(self, name: str) -> str:
        """Return the key of a clip's frames: the settings and the digest of its content."""
        return f"{self.folder.name}/{self.entry(name).sha256}"

    def estimate(self, clips: int) -> int:
        """Estimate the size in bytes of the frames of `clips` clips: frames of 4:3, no clip shorter than K frames."""
        return clips * self.num_frames * self.candidates * self.side * round(self.side * 4 / 3) * 3

    def read(self, name: str, candidates: Sequence[int]) -> Frames:
        """Read some of the candidate frames of a clip, (T, H, W, 3); see `array`."""
        kept = self.array(name)
        return kept[self.indices(len(kept), candidates)]

    def array(self, name: str) -> Frames:
        """Return all kept frames of a clip, (K, H, W, 3), memory-mapped: only the parts that are used are read.

        Raises:
            DataError: the clip is not prepared, or its array file is damaged.
        """
        if not (entry := self.entry(name)).frames:
            raise DataError(f"{name}: no frames ({entry.error})")
        path = f"{self.folder}/{self.index.array_file(name)}"
        try:
            kept = _map_array(path)
            expected = min(entry.frames, self.num_frames * self.candidates)
            if len(kept) != expected:
                raise ValueError(f"{kept.shape} for {expected} frames")
            return kept
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path}: the cached frames of {name} cannot be read ({error}): delete the file and run `make data`"
            ) from error

    def indices(self, kept: int, candidates: Sequence[int]) -> list[int]:
        """Return the indices of candidates among the `kept` frames of a clip."""
        frame_indices = choose_candidates(kept, self.num_frames, self.candidates)
        return [frame_indices[candidate] for candidate in candidates]

    def fill(self, clips: Mapping[str, Path], workers: int, renew: bool = False) -> dict[str, str]:
        """Decode the clips that are not in the cache yet; clips that are done stay if the process is killed.

        Args:
            clips: path of each clip.
            workers: number of decoding processes.
            renew: decode clips whose content has changed again, and retry clips that could not be decoded.

        Returns:
            The clips that cannot be decoded, with the reason; known failures are retried only if their file changed.

        Raises:
            DataError: clips changed since they were decoded; the index is damaged; the disk has too little space;
                decoding processes cannot be started.
            CDCError: the disk is full or not writable.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.index.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise CDCError(
                f"{self.folder}: cannot be written ({error.strerror}): set another cache folder (CACHE=)"
            ) from error
        remove_leftovers(self.folder)
        try:
            return self._fill(clips, max(1, workers), renew, descriptor)
        finally:
            os.close(descriptor)
            remove_leftovers(self.folder)  # decoders that were stopped or outlived a killed run leave temporary files

    def _fill(self, clips: Mapping[str, Path], workers: int, renew: bool, descriptor: int) -> dict[str, str]:
        self.index.read(repair=True)
        now, failures = _read_statuses(clips)
        other = self._find_changed(clips, now, failures, workers, descriptor)
        changed = [name for name in other if self.index.entries[name].frames]
        if changed and not renew:
            raise DataError(
                f"{self.folder}: {len(changed)} clips changed after they were decoded:"
                f"{write_listing([f'{name} ({clips[name]})' for name in changed], self.changed_list)}\n"
                "fetch them again, or run `make data` to decode the changed files"
            )
        if changed:
            logger.warning("decoding again, because their files changed:%s", format_names(changed))
        obsolete = {self.index.array_file(name) for name in changed}
        files, missing = self._list_files(), []
        for name in sorted(now.keys() - failures.keys()):
            known = name in self.index.entries and name not in other
            if known and not self.index.entries[name].frames and not renew:
                failures[name] = f"{clips[name]}: {self.index.entries[name].error}"
            elif not known or self.index.array_file(name) not in files:
                missing.append(name)
        if missing:
            self._check_room(len(missing))

            def record(name: str, entry: Entry) -> None:
                self.index.append(descriptor, name, entry)
                if not entry.frames:
                    failures[name] = f"{clips[name]}: {entry.error}"

            settings = DecodingSettings(
                self.folder, self.num_frames, self.candidates, self.image_size, self.side, self.decoder
            )
            chosen = {name: clips[name] for name in missing}
            decode_clips(chosen, now, files, settings, workers, self.TIMEOUT_SECONDS, record)
        for name in sorted(failures.keys() & self.index.entries.keys()):
            if self.index.entries[name].frames:  # frames of the file's former content
                self.index.append(descriptor, name, NOT_DECODED)
        self._set_ready()
        for file in obsolete - {self.index.array_file(name) for name in self.ready if obsolete}:
            with suppress(OSError):  # an obsolete file only takes space
                (self.folder / file).unlink(missing_ok=True)
        return failures

    def _find_changed(
        self,
        clips: Mapping[str, Path],
        now: Mapping[str, os.stat_result],
        failures: dict[str, str],
        workers: int,
        descriptor: int,
    ) -> list[str]:
        """Find clips whose content differs from the index; store the new time of those that are the same."""
        touched = [
            name
            for name in sorted(now.keys() - failures.keys())
            if (entry := self.index.entries.get(name)) and entry[:2] != (now[name].st_size, now[name].st_mtime_ns)
        ]
        if not touched:
            return []
        logger.info("%d clips have another size or time: comparing their content", len(touched))
        other = []
        pool = ThreadPoolExecutor(workers)  # threads suffice: reading and hashing release the GIL
        try:
            digests = {name: pool.submit(hash_file, clips[name]) for name in sorted(touched)}
            for name, digest in track(digests.items(), description="comparing clips"):
                try:
                    if digest.result() == (entry := self.index.entries[name]).sha256:
                        size, mtime_ns = now[name].st_size, now[name].st_mtime_ns
                        self.index.append(descriptor, name, entry._replace(size=size, mtime_ns=mtime_ns))
                    else:
                        other.append(name)
                except OSError as error:
                    failures[name] = f"{clips[name]}: cannot be read ({error.strerror})"
        finally:
            pool.shutdown(cancel_futures=True)
        return other

    def _check_room(self, clips: int) -> None:
        if self.decoder == "decord" and importlib.util.find_spec("decord") is None:
            raise DataError(NO_DECORD)
        needed = self.estimate(clips)
        logger.info("decoding %d clips into %s, about %s", clips, self.folder, decimal(needed))
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise DataError(
                f"{self.folder}: about {decimal(needed)} are needed for the frames of {clips} clips, "
                f"{decimal(free)} are free: free disk space, or set another cache folder (CACHE=)"
            )

    def _list_files(self) -> set[str]:
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CDCError(f"{self.folder}: cannot be read ({error.strerror}): fix the permissions") from error

    def _set_ready(self) -> None:
        files = self._list_files()
        self.ready = frozenset(
            n for n, entry in self.index.entries.items() if entry.frames and self.index.array_file(n) in files
        )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@lru_cache(MAX_MAPPED_ARRAYS)
def _map_array(path: str) -> Frames:
    """Map the array of a file, once per process: mapping takes longer than reading three frames.

    It calls the C library's mmap: each of Python's maps holds a file descriptor, and the limit is often 1,024.

    Raises:
        OSError, ValueError, EOFError: the file is not a complete array of uint8 frames.
    """
    kept = np.load(path, mmap_mode="r", allow_pickle=False)
    if kept.dtype != np.uint8 or kept.ndim != 4:
        raise ValueError(f"{kept.dtype} {kept.shape}")
    size = kept.offset + kept.nbytes
    with open(path, "rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    content = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(content, _libc.munmap, address, size).atexit = False
    frames = np.frombuffer(content, np.uint8, offset=kept.offset).reshape(kept.shape)
    frames.flags.writeable = False
    return frames


def _read_statuses(clips: Mapping[str, Path]) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """Read the clips' current sizes and modification times; return also the clips without one, with the reason."""
    now: dict[str, os.stat_result] = {}
    failures: dict[str, str] = {}
    for name, path in clips.items():
        try:
            now[name] = path.stat()
            if not stat.S_ISREG(now[name].st_mode):
                failures[name] = f"{path}: not a file"
        except OSError as error:
            failures[name] = f"{path}: {error.strerror}"
    return now, failures
