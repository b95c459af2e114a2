"""The frame cache: every clip's candidate frames, decoded once, resized, as memory-mapped uint8 arrays.

A folder a choice of settings. In it one `.npy` (K, H, W, 3) a clip (fewer than K where the clip has fewer frames),
named after the clip and its content, and `index.jsonl`: size, time, number of frames and sha256 of every clip. A clip
that was touched or moved is hashed, not decoded again; one whose content changed is refused by name, until the user
asks for it.

Arrays appear whole or not at all. The index is only appended to, a line a clip, after its array is in place. An array
missing from the index is recovered by its file name: losing the index costs re-hashing, not re-decoding.
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
from rich.progress import track

from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.files import file_digest, remove_leftovers, write_listing
from cdc_mmpg.media.frames import CANDIDATES, Frames, candidate_indices, shorter_side
from cdc_mmpg.media.video import Decoder
from data_modules.decoding import DecodingSettings, decode_clips
from data_modules.frame_index import NOT_DECODED, Entry, FrameIndex

logger = logging.getLogger(__name__)

MAX_MAPPED_ARRAYS = 32_768  # arrays that a process keeps mapped; Linux lets it have 65,530 maps


class FrameCache:
    """Candidate frames of clips, on disk; clips go by the name that annotations use.

    Args:
        folder: where the settings' folders lie.
        num_frames, image_size, decoder: see `frames` and `video`.
        side: pixels to which a frame's shorter side is resized; None is `shorter_side(image_size)`.
        candidates: frames kept of each of the `num_frames` segments of a clip.
    """

    TIMEOUT_SECONDS: float = 300  # for a clip to be decoded in

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
        self.side = side or shorter_side(image_size)
        self.changed_list = folder.parent / "changed.txt"  # beside the list of missing clips
        self.folder = folder / f"{decoder}-{self.side}px-{num_frames}x{candidates}"
        self.ready: frozenset[str] = frozenset()  # clips whose frames can be read, after `load` or `fill`
        self.index = FrameIndex(self.folder)

    def load(self) -> None:
        """Read the index that another process has filled.

        Raises:
            DataError: the index was damaged from outside.
        """
        self.index.read(repair=False)
        self._set_ready()

    def entry(self, name: str) -> Entry:
        """Return what the index knows of a clip, see `FrameIndex.find`."""
        return self.index.find(name)

    def key(self, name: str) -> str:
        """Return the identity of a clip's frames: its content and the settings."""
        return f"{self.folder.name}/{self.entry(name).sha256}"

    def estimate(self, clips: int) -> int:
        """Estimate how many bytes the frames of `clips` clips take: pictures of 4:3, none of the clips brief."""
        return clips * self.num_frames * self.candidates * self.side * round(self.side * 4 / 3) * 3

    def read(self, name: str, candidates: Sequence[int]) -> Frames:
        """Read some of the candidate frames of a clip, (T, H, W, 3); see `array`."""
        kept = self.array(name)
        return kept[self.indices(len(kept), candidates)]

    def array(self, name: str) -> Frames:
        """Return all kept frames of a clip, (K, H, W, 3): mapped, so that only what is used of them is read.

        Raises:
            DataError: not prepared, or the file was damaged from outside.
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
        """Return which of so many kept frames candidates are."""
        every = candidate_indices(kept, self.num_frames, self.candidates)
        return [every[candidate] for candidate in candidates]

    def fill(self, clips: Mapping[str, Path], workers: int, renew: bool = False) -> dict[str, str]:
        """Decode what is not there yet, in `workers` processes; what was done stays if this is killed.

        Args:
            clips: where each clip lies.
            workers: processes.
            renew: take clips whose content changed as they are now, and try again those that could not be decoded.

        Returns:
            The clips that cannot be decoded, with the reason; known ones are not tried again unless their file changed.

        Raises:
            DataError: clips changed since they were decoded; the index was damaged from outside; the disk has too
                little room; decoding processes cannot be started.
            CDCError: the disk is full or may not be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.index.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise CDCError(
                f"{self.folder}: cannot be written ({error.strerror}): set the cache_dir elsewhere"
            ) from error
        remove_leftovers(self.folder)
        try:
            return self._fill(clips, max(1, workers), renew, descriptor)
        finally:
            os.close(descriptor)
            remove_leftovers(self.folder)  # of decoders that were stopped, or that outlived a killed run

    def _fill(self, clips: Mapping[str, Path], workers: int, renew: bool, descriptor: int) -> dict[str, str]:
        self.index.read(repair=True)
        now, failures = _read_statuses(clips)
        other = self._touched(clips, now, failures, workers, descriptor)
        changed = [name for name in other if self.index.entries[name].frames]
        if changed and not renew:
            raise DataError(
                f"{self.folder}: {len(changed)} clips changed after they were prepared:"
                f"{write_listing([f'{name} ({clips[name]})' for name in changed], self.changed_list)}\n"
                "fetch them again, or run `make data` to take them as they are now"
            )
        if changed:
            logger.warning("decoding anew, for their files changed: %s", ", ".join(changed))
        obsolete = {self.index.array_file(name) for name in changed}
        files, missing = self._files(), []
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
            if self.index.entries[name].frames:  # of what the clip was
                self.index.append(descriptor, name, NOT_DECODED)
        self._set_ready()
        for file in obsolete - {self.index.array_file(name) for name in self.ready if obsolete}:
            with suppress(OSError):  # it only takes room
                (self.folder / file).unlink(missing_ok=True)
        return failures

    def _touched(
        self,
        clips: Mapping[str, Path],
        now: Mapping[str, os.stat_result],
        failures: dict[str, str],
        workers: int,
        descriptor: int,
    ) -> list[str]:
        """Return names of clips with another content than the index has; store the new time of those with the same."""
        touched = [
            name
            for name in sorted(now.keys() - failures.keys())
            if (entry := self.index.entries.get(name)) and entry[:2] != (now[name].st_size, now[name].st_mtime_ns)
        ]
        if not touched:
            return []
        logger.info("%d clips were touched: comparing their content", len(touched))
        other = []
        pool = ThreadPoolExecutor(workers)  # reading and hashing free the interpreter
        try:
            digests = {name: pool.submit(file_digest, clips[name]) for name in sorted(touched)}
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
            raise DataError("decord is not installed here (it has no wheels for this platform): use decoder pyav")
        needed = self.estimate(clips)
        logger.info("decoding %d clips into %s, about %s", clips, self.folder, decimal(needed))
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise DataError(
                f"{self.folder}: about {decimal(needed)} are needed for the frames of {clips} clips, "
                f"{decimal(free)} are free: make room, or set --data.init_args.cache_dir"
            )

    def _files(self) -> set[str]:
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CDCError(f"{self.folder}: may not be read ({error.strerror}): mend that") from error

    def _set_ready(self) -> None:
        files = self._files()
        self.ready = frozenset(
            n for n, entry in self.index.entries.items() if entry.frames and self.index.array_file(n) in files
        )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@lru_cache(MAX_MAPPED_ARRAYS)
def _map_array(path: str) -> Frames:
    """Return a file's array, mapped once by a process: to map it takes longer than to read three frames of it.

    By the system's own call: Python's maps hold a file descriptor each, of which a process often has 1,024.

    Raises:
        OSError, ValueError, EOFError: it is no whole array of uint8 frames.
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
    """Read the clips' sizes and times as they are now; return also what is wrong with those that have none."""
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
