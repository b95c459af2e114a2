"""Decoding clips into the arrays of the frame cache, in processes that may hang or die without harming the others."""

import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
from pebble import ProcessExpired, ProcessPool

from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.files import atomic_write, hash_file
from cdc_mmpg.media.frames import choose_candidates
from cdc_mmpg.media.video import Decoder, read_frames
from cdc_mmpg.program import hold_signals
from cdc_mmpg.progress import track
from data_modules.frame_index import ARRAY_FILE_NAME, NOT_DECODED, Entry, array_file_name, file_stem

MAX_QUEUED_CLIPS = 64  # clips queued for the decoding processes: memory does not grow with the dataset
# Exit codes of a process ended from outside, as by the out-of-memory killer, or by SLURM, which signals entire jobs.
EXTERNAL_STOP_EXIT_CODES = (signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGUSR1)


class DecodingSettings(NamedTuple):
    """Settings that decide the array of a clip."""

    folder: Path  # folder of the arrays
    num_frames: int  # segments of a clip
    candidates: int  # frames kept for each segment
    image_size: int  # side of the square that the model sees, in pixels
    side: int  # shorter side of a kept frame, in pixels
    decoder: Decoder


def decode_clips(
    clips: Mapping[str, Path],
    statuses: Mapping[str, os.stat_result],
    files: Collection[str],
    settings: DecodingSettings,
    workers: int,
    timeout_seconds: float,
    record: Callable[[str, Entry], None],
) -> None:
    """Decode clips into their arrays, in `workers` processes.

    Args:
        clips: path of each clip.
        statuses: size and modification time of each clip's file, for the index.
        files: names of the existing arrays.
        settings: settings of the decoding.
        workers: maximum number of processes.
        timeout_seconds: limit for decoding one clip.
        record: called with the name and the index entry of every clip as soon as it is done.

    Raises:
        DataError: decoding processes cannot be started.
        CDCError: the disk is full or not writable.
    """
    kept: defaultdict[str, list[str]] = defaultdict(list)
    for file in filter(ARRAY_FILE_NAME.fullmatch, files):
        kept[file.partition(".")[0]].append(file)
    waiting, running, done = iter(clips.items()), dict[Future[Entry], str](), SimpleQueue[Future[Entry]]()
    # Fresh processes: a forked copy of a process with running threads may hang.
    context, others = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
    pool = ProcessPool(min(workers, len(clips)), initializer=_start_worker, context=context)
    try:
        with hold_signals(for_helpers=True):
            if not pool.active:  # the first access starts the processes
                raise RuntimeError("no process is left")
        for _ in track(range(len(clips)), description="decoding clips"):
            for name, path in islice(waiting, max(MAX_QUEUED_CLIPS, 2 * workers) - len(running)):
                arguments = (name, path, kept[file_stem(name)], settings)
                future = pool.schedule(decode_clip, arguments, timeout=timeout_seconds)
                running[future] = name
                future.add_done_callback(done.put)
            finished = _wait_for_next(done, pool)
            name = running.pop(finished)
            record(name, _make_entry(finished, clips[name], statuses[name], settings.decoder, timeout_seconds))
    except RuntimeError as error:  # of the pool
        raise DataError(
            f"the decoding processes died or did not start ({error}): free memory if it is short, and re-run the "
            "same command; decoded clips are kept"
        ) from error
    finally:
        pool.stop()
        # The pool removes its locks before it ends its workers: a worker that is still starting would fail on them.
        for worker in {*multiprocessing.active_children()} - others:
            worker.terminate()
        pool.join()


def _make_entry(
    future: "Future[Entry]", path: Path, status: os.stat_result, decoder: Decoder, timeout_seconds: float
) -> Entry:
    """Return the index entry of a clip: permanent failures are stored, transient ones are not."""
    remedy = "fetch it again" + (", or try decoder pyav" if decoder == "decord" else "")
    fatal = Entry(status.st_size, status.st_mtime_ns, 0, "")
    try:
        return future.result()
    except DataError as error:
        return NOT_DECODED._replace(error=str(error).removeprefix(f"{path}: "))
    except (CDCError, BrokenProcessPool):
        raise
    except TimeoutError:
        return fatal._replace(error=f"the decoder hangs (not done after {timeout_seconds:g} s): {remedy}")
    except ProcessExpired as error:
        entry = NOT_DECODED if error.exitcode in EXTERNAL_STOP_EXIT_CODES else fatal
        return entry._replace(error=f"the decoder crashes (exit code {error.exitcode}): {remedy}")
    except Exception as error:  # no error in one clip may keep the others from being decoded
        return NOT_DECODED._replace(error=f"{type(error).__name__} while decoding it ({error}): {remedy}")


def _wait_for_next(done: "SimpleQueue[Future[Entry]]", pool: ProcessPool) -> "Future[Entry]":
    """Wait until a clip is done.

    Raises:
        RuntimeError: the pool is broken, and may have lost the clip.
    """
    while True:
        try:
            return done.get(timeout=1)
        except Empty:
            if not pool.active:
                raise RuntimeError("Unexpected error within the Pool") from None


def _start_worker() -> None:
    """End this process when its parent ends; pebble leaves Ctrl-C, which reaches both, to the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def decode_clip(name: str, path: Path, kept: Sequence[str], settings: DecodingSettings) -> Entry:
    """Decode one clip into its array, unless one of the `kept` files already is this array.

    Raises:
        DataError: the clip cannot be read now, or changes while it is decoded.
        CDCError: the array cannot be written.
    """
    folder, num_frames, candidates, image_size, side, decoder = settings
    before = _read_status(path)
    try:
        digest = hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for file in kept:
        count = int(file.split(".")[-2])
        if file == array_file_name(name, digest, count):
            return Entry(*before, count, digest)
    count = 0

    def choose(frames: int) -> Sequence[int]:
        """Return the indices of the frames to keep: all, without repetitions, if there are fewer than candidates."""
        nonlocal count
        count = frames
        return choose_candidates(count, num_frames, candidates) if count > num_frames * candidates else range(count)

    reason = ""
    try:
        frames = read_frames(path, choose, image_size, decoder, side)
    except DataError as error:
        count, reason = 0, str(error).removeprefix(f"{path}: ")
    if _read_status(path) != before:
        raise DataError(f"{path}: changed while it was decoded: wait until it is complete")
    if count:
        with atomic_write(folder / array_file_name(name, digest, count)) as array:
            np.save(array, frames)
    return Entry(*before, count, digest, reason)


def _read_status(path: Path) -> tuple[int, int]:
    """Return size in bytes and modification time in nanoseconds."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns
