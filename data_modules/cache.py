"""The frame cache: every clip's candidate frames, decoded once, resized, as memory-mapped uint8 arrays; and its index.

A folder a choice of settings. In it one `.npy` (K, H, W, 3) a clip (fewer than K where the clip has fewer frames),
named after the clip and its content, and `index.jsonl`: size, time, number of frames and sha256 of every clip. A clip
that was touched or moved is hashed, not decoded again; one whose content changed is refused by name, until the user
asks for it.

Arrays appear whole or not at all. The index is only appended to, a line a clip, after its array is in place. An array
that no line tells of is found by its name: who loses the index has the clips hashed, not decoded again.
"""

import ctypes
import importlib.util
import json
import logging
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import stat
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
from pebble import ProcessExpired, ProcessPool
from rich.filesize import decimal
from rich.progress import track

from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.files import atomic_write, file_digest, remove_leftovers, write_listing
from cdc_mmpg.media.frames import CANDIDATES, Frames, candidate_indices, shorter_side
from cdc_mmpg.media.video import Decoder, read_frames

logger = logging.getLogger(__name__)

ARRAY = re.compile(r"[A-Za-z0-9_-]*\.[0-9a-f]{12}\.\d+\.npy")  # see `_array`
AT_ONCE = 64  # clips given to the decoding processes at a time: 100,000 need no more memory than these
MAPS = 32_768  # arrays that a process keeps mapped; Linux lets it have 65,530 maps
# Exit codes of who is ended from outside, as for memory, or by SLURM, which signals all processes of a job.
STOPPED = (signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGUSR1)


class Entry(NamedTuple):
    """What the index knows of a clip."""

    size: int  # bytes
    mtime_ns: int
    frames: int  # that can be decoded; 0 where it is no clip
    sha256: str  # of the content; "" where it was never read to its end
    error: str = ""  # why there are no frames


UNKNOWN = Entry(-1, 0, 0, "", "not decoded")  # of a clip that is to be decoded when it is next asked for


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
        self._entries: dict[str, Entry] = {}

    def load(self) -> None:
        """Read the index that another process has filled.

        Raises:
            DataError: the index was damaged from outside.
        """
        self._read_index(repair=False)
        self._set_ready()

    def entry(self, name: str) -> Entry:
        """What is known of a clip.

        Raises:
            DataError: the index does not have it.
        """
        if (entry := self._entries.get(name)) is None:
            raise DataError(f"{name}: not in {self._index}: run `make data`")
        return entry

    def key(self, name: str) -> str:
        """Identity of a clip's frames: its content and the settings."""
        return f"{self.folder.name}/{self.entry(name).sha256}"

    def estimate(self, clips: int) -> int:
        """About how many bytes the frames of so many clips take: pictures of 4:3, none of the clips brief."""
        return clips * self.num_frames * self.candidates * self.side * round(self.side * 4 / 3) * 3

    def read(self, name: str, candidates: Sequence[int]) -> Frames:
        """Some of the candidate frames of a clip, (T, H, W, 3); see `array`."""
        kept = self.array(name)
        return kept[self.indices(len(kept), candidates)]

    def array(self, name: str) -> Frames:
        """Return all kept frames of a clip, (K, H, W, 3): mapped, so that only what is used of them is read.

        Raises:
            DataError: not prepared, or the file was damaged from outside.
        """
        if not (entry := self.entry(name)).frames:
            raise DataError(f"{name}: no frames ({entry.error})")
        path = f"{self.folder}/{self._file(name)}"
        try:
            kept = _map(path)
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
            index = os.open(self._index, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise CDCError(
                f"{self.folder}: cannot be written ({error.strerror}): set the cache_dir elsewhere"
            ) from error
        remove_leftovers(self.folder)
        try:
            return self._fill(clips, max(1, workers), renew, index)
        finally:
            os.close(index)
            remove_leftovers(self.folder)  # of decoders that were stopped, or that outlived a killed run

    def _fill(self, clips: Mapping[str, Path], workers: int, renew: bool, index: int) -> dict[str, str]:
        self._read_index(repair=True)
        now, failures = _look_at(clips)
        other = self._touched(clips, now, failures, workers, index)
        changed = [name for name in other if self._entries[name].frames]
        if changed and not renew:
            raise DataError(
                f"{self.folder}: {len(changed)} clips changed after they were prepared:"
                f"{write_listing([f'{name} ({clips[name]})' for name in changed], self.changed_list)}\n"
                "fetch them again, or run `make data` to take them as they are now"
            )
        if changed:
            logger.warning("decoding anew, for their files changed: %s", ", ".join(changed))
        obsolete = {self._file(name) for name in changed}
        files, missing = self._files(), []
        for name in sorted(now.keys() - failures.keys()):
            known = name in self._entries and name not in other
            if known and not self._entries[name].frames and not renew:
                failures[name] = f"{clips[name]}: {self._entries[name].error}"
            elif not known or self._file(name) not in files:
                missing.append(name)
        if missing:
            self._check_room(len(missing))
            failures |= self._decode({name: clips[name] for name in missing}, now, files, workers, index)
        for name in sorted(failures.keys() & self._entries.keys()):
            if self._entries[name].frames:  # of what the clip was
                self._put(index, name, UNKNOWN)
        self._set_ready()
        for file in obsolete - {self._file(name) for name in self.ready if obsolete}:
            with suppress(OSError):  # it only takes room
                (self.folder / file).unlink(missing_ok=True)
        return failures

    def _touched(
        self,
        clips: Mapping[str, Path],
        now: Mapping[str, os.stat_result],
        failures: dict[str, str],
        workers: int,
        index: int,
    ) -> list[str]:
        """Names of clips with another content than the index has; those with the same are known by their new time."""
        touched = [
            name
            for name in sorted(now.keys() - failures.keys())
            if (entry := self._entries.get(name)) and entry[:2] != (now[name].st_size, now[name].st_mtime_ns)
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
                    if digest.result() == (entry := self._entries[name]).sha256:
                        size, mtime_ns = now[name].st_size, now[name].st_mtime_ns
                        self._put(index, name, entry._replace(size=size, mtime_ns=mtime_ns))
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

    def _decode(
        self,
        clips: Mapping[str, Path],
        now: Mapping[str, os.stat_result],
        files: Collection[str],
        workers: int,
        index: int,
    ) -> dict[str, str]:
        """Decode clips, each known to the index as soon as it is done; those that cannot be, with the reason."""
        kept: defaultdict[str, list[str]] = defaultdict(list)
        for file in filter(ARRAY.fullmatch, files):
            kept[file.partition(".")[0]].append(file)
        settings = self.folder, self.num_frames, self.candidates, self.image_size, self.side, self.decoder
        failures: dict[str, str] = {}
        waiting, running, done = iter(clips.items()), dict[Future[Entry], str](), SimpleQueue[Future[Entry]]()
        # Fresh processes: a forked copy of a process with running threads may hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPool(min(workers, len(clips)), initializer=_begin_worker, context=context)
        try:
            for _ in track(range(len(clips)), description="decoding clips"):
                for name, path in islice(waiting, max(AT_ONCE, 2 * workers) - len(running)):
                    arguments = (name, path, kept[_stem(name)], *settings)
                    future = pool.schedule(_prepare, arguments, timeout=self.TIMEOUT_SECONDS)
                    running[future] = name
                    future.add_done_callback(done.put)
                finished = _next(done, pool)
                name = running.pop(finished)
                entry = self._outcome(finished, clips[name], now[name])
                self._put(index, name, entry)
                if not entry.frames:
                    failures[name] = f"{clips[name]}: {entry.error}"
        except RuntimeError as error:  # of the pool
            raise DataError(
                f"the decoding processes end or do not start ({error}): free memory, if it is short, and type the "
                "same command again; what was decoded stays"
            ) from error
        finally:
            pool.stop()
            pool.join()
        return failures

    def _outcome(self, future: Future[Entry], path: Path, status: os.stat_result) -> Entry:
        """What became of a clip: what is the clip's own fault is remembered, what is the moment's is not."""
        remedy = "fetch it again" + (", or try decoder pyav" if self.decoder == "decord" else "")
        fatal = Entry(status.st_size, status.st_mtime_ns, 0, "")
        try:
            return future.result()
        except DataError as error:
            return UNKNOWN._replace(error=str(error).removeprefix(f"{path}: "))
        except (CDCError, BrokenProcessPool):
            raise
        except TimeoutError:
            return fatal._replace(error=f"hangs the decoder (no end within {self.TIMEOUT_SECONDS:g} s): {remedy}")
        except ProcessExpired as error:
            entry = UNKNOWN if error.exitcode in STOPPED else fatal
            return entry._replace(error=f"kills the decoder (exit code {error.exitcode}): {remedy}")
        except Exception as error:  # nothing that one clip does may keep the others from being decoded
            return UNKNOWN._replace(error=f"{type(error).__name__} while decoding it ({error}): {remedy}")

    @property
    def _index(self) -> Path:
        return self.folder / "index.jsonl"

    def _read_index(self, repair: bool) -> None:
        """What all whole lines say, the last one of a clip; `repair` cuts off what a killed process left half-written.

        Another process that appends meanwhile may lose whole lines by it, which `_prepare` makes good.
        """
        try:
            content = self._index.read_bytes() if self._index.exists() else b""
            *lines, rest = content.split(b"\n")
            if rest and repair:
                os.truncate(self._index, len(content) - len(rest))
        except OSError as error:
            raise CDCError(f"{self._index}: cannot be read or mended ({error.strerror}): mend that") from error
        self._entries = {}
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
                name, entry = fields.pop("name"), Entry(**fields)
                if [type(value) for value in (name, *entry)] != [str, int, int, int, str, str]:
                    raise TypeError("a value of another type")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    f"{self._index}:{number}: the index is damaged ({error}): delete the file and run `make data`; "
                    "the clips are read again, but not decoded"
                ) from error
            self._entries[name] = entry

    def _put(self, index: int, name: str, entry: Entry) -> None:
        """Append to the index, in one piece."""
        line = (json.dumps({"name": name, **entry._asdict()}) + "\n").encode()
        try:
            if os.write(index, line) < len(line):
                raise OSError(0, "only a part of a line")
        except OSError as error:
            raise CDCError(
                f"{self._index}: cannot be written ({error.strerror}): make room and type the same command again"
            ) from error
        self._entries[name] = entry

    def _file(self, name: str) -> str:
        """Name of the file with the frames of a clip that the index knows."""
        return _array(name, self._entries[name].sha256, self._entries[name].frames)

    def _files(self) -> set[str]:
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CDCError(f"{self.folder}: may not be read ({error.strerror}): mend that") from error

    def _set_ready(self) -> None:
        files = self._files()
        self.ready = frozenset(n for n, entry in self._entries.items() if entry.frames and self._file(n) in files)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@lru_cache(MAPS)
def _map(path: str) -> Frames:
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


def _look_at(clips: Mapping[str, Path]) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """The clips' sizes and times as they are now, and what is wrong with those that have none."""
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


def _stem(name: str) -> str:
    """Of a clip's files: without what a file's name may not have, and brief."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100]


def _array(name: str, digest: str, frames: int) -> str:
    """Name of the file with a clip's frames: it says all that the index has to know of them."""
    return f"{_stem(name)}.{digest[:12]}.{frames}.npy"


def _next(done: "SimpleQueue[Future[Entry]]", pool: ProcessPool) -> "Future[Entry]":
    """Wait for a clip to be done.

    Raises:
        RuntimeError: the pool is broken, and may have forgotten the clip.
    """
    while True:
        try:
            return done.get(timeout=1)
        except Empty:
            if not pool.active:
                raise RuntimeError("Unexpected error within the Pool") from None


def _begin_worker() -> None:
    """Without the process that started this, it ends; Ctrl-C, which reaches both, is for that one (pebble's doing)."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _prepare(
    name: str,
    path: Path,
    kept: Sequence[str],
    folder: Path,
    num_frames: int,
    candidates: int,
    image_size: int,
    side: int,
    decoder: Decoder,
) -> Entry:
    """Decode one clip into its array, unless one of the `kept` files of its name is just that.

    Raises:
        DataError: the clip cannot be read now, or changes under our hands.
        CDCError: the array cannot be written.
    """
    before = _status(path)
    try:
        digest = file_digest(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for file in kept:
        count = int(file.split(".")[-2])
        if file == _array(name, digest, count):
            return Entry(*before, count, digest)
    count = 0

    def choose(frames: int) -> Sequence[int]:
        """A clip with fewer frames than candidates is kept whole, without repetitions."""
        nonlocal count
        count = frames
        return candidate_indices(count, num_frames, candidates) if count > num_frames * candidates else range(count)

    reason = ""
    try:
        frames = read_frames(path, choose, image_size, decoder, side)
    except DataError as error:
        count, reason = 0, str(error).removeprefix(f"{path}: ")
    if _status(path) != before:
        raise DataError(f"{path}: changes while it is decoded: wait until it is complete")
    if count:
        with atomic_write(folder / _array(name, digest, count)) as array:
            np.save(array, frames)
    return Entry(*before, count, digest, reason)


def _status(path: Path) -> tuple[int, int]:
    """Size in bytes and time in nanoseconds."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns
