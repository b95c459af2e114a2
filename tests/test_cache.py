"""The frame cache: filling it can be resumed, no array is half written, and changed clips are refused by name."""

import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg.commands.prepare import prepare
from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.files import HOST_TAG
from cdc_mmpg.media.frames import choose_candidates, choose_middle_candidates
from cdc_mmpg.media.video import read_frames
from conftest import TINY, write_clip
from data_modules import cache as module
from data_modules import decoding, synthetic_clips
from data_modules.cache import FrameCache
from data_modules.frame_index import Entry
from data_modules.msvd_qa import MSVDQA

ROOT = Path(__file__).parents[1]
FILL = """
import sys
from pathlib import Path
from data_modules.cache import FrameCache
clips = {path.stem: path for path in sorted(Path(sys.argv[1]).iterdir())}
assert not FrameCache(Path(sys.argv[2]), 3, 32, "pyav").fill(clips, int(sys.argv[3]))
"""


def make_clips(folder: Path, count: int, frames: int = 12, size: tuple[int, int] = (64, 48)) -> dict[str, Path]:
    """Write the clips c0, c1, ...; the k-th has k frames more than the first."""
    return {f"c{i}": write_clip(folder / f"c{i}.avi", frames=frames + i, size=size) for i in range(count)}


def make_cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "frames", 3, 32, "pyav")


def read_frame_numbers(cache: FrameCache, name: str, candidates: list[int]) -> list[int]:
    """Return which frames of a clip the cache holds, read off their gray level."""
    return [round((float(frame.mean()) - 4) / 6) for frame in cache.read(name, candidates)]


def read_write_times(cache: FrameCache) -> dict[str, int]:
    """Return when each array was written, in ns since the epoch."""
    return {path.name: path.stat().st_mtime_ns for path in cache.folder.glob("*.npy")}


def read_index(cache: FrameCache) -> list[dict[str, object]]:
    return [json.loads(line) for line in (cache.folder / "index.jsonl").read_text().splitlines()]


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that keeps the cache from using the function of a name."""

    def forbid_function(name: str) -> None:
        for namespace in (module, decoding):
            monkeypatch.setattr(namespace, name, None, raising=False)

    return forbid_function


def test_cached_frames_are_the_candidates_of_each_clip(tmp_path):
    clips = {"a clip/of: ünusual näme": write_clip(tmp_path / "long.avi", frames=40)}
    clips |= {"index": write_clip(tmp_path / "brief.avi", frames=2)}
    cache = make_cache(tmp_path)
    assert cache.fill(clips, 1) == {}
    assert cache.ready == set(clips)
    for name, frames in zip(clips, (40, 2), strict=True):
        assert read_frame_numbers(cache, name, list(range(9))) == choose_candidates(frames, 3)
        status, entry = clips[name].stat(), cache.entry(name)
        assert entry == Entry(status.st_size, status.st_mtime_ns, frames, entry.sha256)
        assert cache.key(name) == f"pyav-38px-3x3/{entry.sha256}"
    assert read_frame_numbers(cache, "index", choose_middle_candidates(3)) == [0, 1, 1]
    assert sorted(np.load(path).shape[0] for path in cache.folder.glob("*.npy")) == [2, 9]
    assert cache.estimate(1) == max(path.stat().st_size for path in cache.folder.glob("*.npy")) - 128

    reopened = make_cache(tmp_path)
    with pytest.raises(DataError, match=r"index: not in .*index\.jsonl"):
        reopened.read("index", [0])
    reopened.load()
    assert reopened.ready == set(clips)
    np.testing.assert_array_equal(reopened.read("index", [0, 8]), cache.read("index", [0, 8]))


def test_decoding_one_clip_keeps_its_candidates(tmp_path, forbid):
    """Calls in this process what a decoding process runs."""
    settings = decoding.DecodingSettings(tmp_path / "frames", 3, 3, 32, 38, "pyav")
    settings.folder.mkdir()
    for frames, kept in ((40, 9), (10, 9), (9, 9), (8, 8), (2, 2), (1, 1)):
        path = write_clip(tmp_path / f"{frames}.avi", frames=frames)
        entry = decoding.decode_clip("a clip", path, [], settings)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry == Entry(path.stat().st_size, path.stat().st_mtime_ns, frames, digest)
        array = np.load(settings.folder / f"a_clip.{digest[:12]}.{frames}.npy")
        assert array.shape == (kept, 38, 51, 3)
        greys = ((array.mean((1, 2, 3)) - 4) / 6).round().astype(int).tolist()
        assert greys == (choose_candidates(frames, 3) if frames > 9 else list(range(frames)))
    page = tmp_path / "page.avi"
    page.write_text("<html>")
    entry = decoding.decode_clip("page", page, [], settings)
    assert (entry.size, entry.frames, entry.sha256) == (6, 0, hashlib.sha256(b"<html>").hexdigest())
    assert entry.error.startswith("pyav cannot decode it")
    assert not list(settings.folder.glob("page*"))
    forbid("read_frames")  # an array with the clip's name and content is reused
    others = ["a_clip.000000000000.1.npy", f"a_clip.{digest[:12]}.1.npy"]
    assert decoding.decode_clip("a clip", path, others, settings).frames == 1
    with pytest.raises(DataError, match="cannot be read"):
        decoding.decode_clip("absent", tmp_path / "absent.avi", [], settings)


def test_a_decoder_that_is_not_installed_is_named_before_anything_is_decoded(tmp_path, monkeypatch):
    clips = make_clips(tmp_path, 1)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="decord is not installed"):
        FrameCache(tmp_path / "frames", 3, 32, "decord").fill(clips, 1)


def test_each_setting_has_its_own_folder(tmp_path):
    clips, first = make_clips(tmp_path, 1, frames=40), make_cache(tmp_path)
    first.fill(clips, 1)
    other = FrameCache(tmp_path / "frames", 2, 32, "pyav", side=40, candidates=4)
    assert other.fill(clips, 1) == {}
    assert [path.name for path in sorted((tmp_path / "frames").iterdir())] == ["pyav-38px-3x3", "pyav-40px-2x4"]
    assert (
        read_frame_numbers(other, "c0", list(range(8))) == choose_candidates(40, 2, 4) == [2, 7, 12, 17, 22, 27, 32, 37]
    )
    assert read_frame_numbers(other, "c0", choose_middle_candidates(2, 4)) == [12, 32]
    assert other.read("c0", [0]).shape[1:3] == (40, 53)
    assert other.key("c0") != first.key("c0")
    assert read_frame_numbers(first, "c0", choose_middle_candidates(3)) == [6, 20, 33]


def list_children(pid: int) -> set[int]:
    return {int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that init has not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_filling_resumes_after_a_kill(tmp_path):
    """No clip is decoded twice, no array is half written, and no decoder keeps running."""
    clips, cache = make_clips(tmp_path / "clips", 12, frames=30, size=(480, 360)), make_cache(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", FILL, tmp_path / "clips", tmp_path / "frames", "1"])
    deadline = time.monotonic() + 20
    while len(read_write_times(cache)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    decoders = list_children(process.pid)
    process.kill()
    process.wait()
    assert decoders
    while any(is_running(pid) for pid in decoders):
        assert time.monotonic() < deadline, "a decoder was left behind"
        time.sleep(0.01)
    written = read_write_times(cache)
    assert 3 <= len(written) < 12
    assert cache.fill(clips, 1) == {}
    assert len(read_write_times(cache)) == 12
    assert written.items() <= read_write_times(cache).items(), "a clip was decoded twice"
    assert cache.ready == set(clips)
    for number, name in enumerate(clips):
        assert cache.entry(name).frames == 30 + number
        assert read_frame_numbers(cache, name, list(range(9))) == choose_candidates(30 + number, 3)
    assert not list(cache.folder.glob(".*"))


def test_a_hanging_decoder_ends_when_its_parent_is_killed(tmp_path):
    clip = write_clip(tmp_path / "clips" / "hangs.avi")
    (tmp_path / "sitecustomize.py").write_text(BAD_DECODER)
    command = [sys.executable, "-c", FILL, clip.parent, tmp_path / "frames", "1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (tmp_path / "hanging").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    decoder = int((tmp_path / "hanging").read_text())
    assert decoder in list_children(process.pid)
    process.kill()
    process.wait()
    while is_running(decoder):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_leftovers_of_killed_runs_are_removed(tmp_path, monkeypatch):
    """A decoder may live a moment longer than its killed run: its file is removed only after it has ended."""
    cache, decoder = make_cache(tmp_path), subprocess.Popen(["sleep", "60"])
    cache.folder.mkdir(parents=True)
    abandoned_file, decoder_file = (cache.folder / f".c.npy.{HOST_TAG}.{pid}.tmp" for pid in (4194999, decoder.pid))
    abandoned_file.touch()
    decoder_file.touch()

    def end_decoder(*arguments: object) -> dict[str, str]:
        assert not abandoned_file.exists()
        assert decoder_file.exists()
        decoder.kill()
        decoder.wait()
        return {}

    monkeypatch.setattr(cache, "_fill", end_decoder)
    cache.fill({}, 1)
    assert not decoder_file.exists()


def test_a_truncated_index_and_a_half_written_array_are_repaired(tmp_path):
    clips, cache = make_clips(tmp_path, 3), make_cache(tmp_path)
    cache.fill(clips, 1)
    written, index = read_write_times(cache), cache.folder / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-30])
    temporary = cache.folder / f".c1.000000000000.13.npy.{HOST_TAG}.4194999.tmp"
    temporary.write_bytes(b"half")
    reader = make_cache(tmp_path)
    reader.load()
    assert len(reader.ready) == 2
    assert index.read_bytes()[-1:] != b"\n", "who only reads changes nothing"
    assert make_cache(tmp_path).fill(clips, 1) == {}
    assert not temporary.exists()
    assert {line["name"] for line in read_index(cache)} == set(clips)
    assert read_write_times(cache) == written, "a whole array was decoded again"


def test_a_damaged_index_is_refused_and_can_be_deleted(tmp_path):
    clips, cache = make_clips(tmp_path, 3), make_cache(tmp_path)
    cache.fill(clips, 1)
    written, index = read_write_times(cache), cache.folder / "index.jsonl"
    index_lines = index.read_text().splitlines()
    entries = [cache.entry(name) for name in clips]
    for damaged in ('{"name": "c0"', "[]", "\0\0", index_lines[1].replace(": 12", ': "12"').replace(": 13", ': "13"')):
        index.write_text("\n".join([index_lines[0], damaged, index_lines[2], ""]))
        for action in (cache.load, lambda: cache.fill(clips, 1)):
            with pytest.raises(DataError, match=r"index\.jsonl:2: the index is damaged .*: delete the file"):
                action()
    index.unlink()
    assert cache.fill(clips, 1) == {}
    assert [cache.entry(name) for name in clips] == entries
    assert read_write_times(cache) == written, "the arrays were there"


def test_a_damaged_array_is_refused_and_can_be_deleted(tmp_path):
    clips, cache = make_clips(tmp_path, 1), make_cache(tmp_path)
    cache.fill(clips, 1)
    (path,) = cache.folder.glob("*.npy")
    content, short_array = path.read_bytes(), io.BytesIO()
    np.save(short_array, np.load(path)[:5])
    for damaged in (content[:-1], b"", b"\0" * len(content), short_array.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"{path.name}: the cached frames of c0 cannot be read .*: delete the file"
        ):
            cache.read("c0", [0])
    path.unlink()
    cache.load()
    assert not cache.ready
    cache.fill(clips, 1)
    assert path.read_bytes() == content


def test_a_changed_clip_is_refused_by_name_unless_renewal_is_requested(tmp_path, caplog):
    clips, cache = make_clips(tmp_path, 6), make_cache(tmp_path)
    cache.fill(clips, 1)
    frames_before, key_before, written = (
        read_frame_numbers(cache, "c3", [0, 8]),
        cache.key("c3"),
        read_write_times(cache),
    )
    write_clip(clips["c3"], frames=40)
    with pytest.raises(
        DataError, match=r" 1 clips changed .*\n  c3 \(.*c3\.avi\)\nfetch them again, or run `make data`"
    ):
        cache.fill(clips, 1)
    assert read_write_times(cache) == written
    with caplog.at_level(logging.WARNING):
        assert cache.fill(clips, 1, renew=True) == {}
    assert "decoding again, because their files changed:\n  c3" in caplog.text
    assert cache.entry("c3").frames == 40
    assert read_frame_numbers(cache, "c3", [0, 8]) == [2, 37] != frames_before
    assert cache.key("c3") != key_before
    assert len(read_write_times(cache)) == 6, "the old array was not removed"
    assert len(written.items() - read_write_times(cache).items()) == 1, "another clip was decoded again"
    for path in clips.values():
        write_clip(path, frames=5)
    with pytest.raises(DataError, match=r" 6 clips changed (.|\n)*\n  c\d \(.*\n") as error:
        cache.fill(clips, 1)
    assert str(error.value).count(".avi") == 6


def test_every_changed_clip_is_named_in_a_file(tmp_path):
    clips, cache = make_clips(tmp_path / "clips", 1), make_cache(tmp_path)
    for number in range(1, 25):
        clips[f"c{number}"] = Path(shutil.copy(clips["c0"], tmp_path / "clips" / f"c{number}.avi"))
    cache.fill(clips, 1)
    for path in clips.values():
        path.write_bytes(b"another content")
    with pytest.raises(DataError, match=r"25 clips changed (.|\n)*and 5 more, all named in .*changed\.txt") as error:
        cache.fill(clips, 1)
    assert (tmp_path / "changed.txt").read_text() == "".join(f"{name} ({clips[name]})\n" for name in sorted(clips))
    assert str(tmp_path / "changed.txt") in str(error.value)


def test_frames_of_a_clip_that_became_undecodable_are_removed(tmp_path):
    clips, cache = make_clips(tmp_path, 2), make_cache(tmp_path)
    cache.fill(clips, 1)
    clips["c0"].write_text("<html>404</html>")
    assert list(cache.fill(clips, 1, renew=True)) == ["c0"]
    assert cache.ready == {"c1"}
    assert [name.partition(".")[0] for name in read_write_times(cache)] == ["c1"]
    with pytest.raises(DataError, match=r"c0: no frames .*pyav cannot decode it"):
        cache.read("c0", [0])


def test_a_touched_or_moved_clip_is_not_decoded_again(tmp_path, forbid):
    clips, cache = make_clips(tmp_path / "here", 3), make_cache(tmp_path)
    cache.fill(clips, 1)
    written, keys = read_write_times(cache), [cache.key(name) for name in clips]
    forbid("ProcessPool")
    (tmp_path / "here").rename(tmp_path / "there")
    clips = {name: tmp_path / "there" / path.name for name, path in clips.items()}
    os.utime(clips["c1"])
    assert cache.fill(clips, 1) == {}
    assert read_write_times(cache) == written
    assert [cache.key(name) for name in clips] == keys
    assert cache.entry("c1").mtime_ns == clips["c1"].stat().st_mtime_ns
    assert [line["name"] for line in read_index(cache)][3:] == ["c1"]
    forbid("hash_file")
    assert cache.fill(clips, 1) == {}


def test_undecodable_clips_are_remembered(tmp_path, forbid, monkeypatch):
    clips, cache = make_clips(tmp_path, 1), make_cache(tmp_path)
    clips["no"] = tmp_path / "no.mp4"
    clips["no"].write_text("<html>404</html>")
    failures = cache.fill(clips, 1)
    assert failures == {"no": failures["no"]}
    assert failures["no"].startswith(f"{clips['no']}: pyav cannot decode it")
    assert cache.entry("no").frames == 0
    assert cache.ready == {"c0"}
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "ProcessPool", None)
        assert make_cache(tmp_path).fill(clips, 1) == failures
        os.utime(clips["no"])
        assert make_cache(tmp_path).fill(clips, 1) == failures
        with pytest.raises(TypeError):
            cache.fill(clips, 1, renew=True)
    assert cache.fill(clips, 1, renew=True) == failures
    write_clip(clips["no"], codec="libx264")  # as if fetched again: nothing was cached of the old file
    assert cache.fill(clips, 1) == {}
    assert cache.ready == {"c0", "no"}


def test_a_clip_that_hangs_or_kills_its_decoder_is_the_only_one_to_fail(tmp_path, monkeypatch, forbid):
    clips, cache = make_clips(tmp_path / "clips", 3), make_cache(tmp_path)
    for name in ("hangs", "dies", "ended", "surprises"):
        clips[name] = Path(shutil.copy(clips["c0"], tmp_path / "clips" / f"{name}.avi"))
    (tmp_path / "sitecustomize.py").write_text(BAD_DECODER)
    monkeypatch.setattr(FrameCache, "TIMEOUT_SECONDS", 1)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        failures = cache.fill(clips, 1)
    remedy = "fetch it again"
    assert failures == {
        "hangs": f"{clips['hangs']}: the decoder hangs (not done after 1 s): {remedy}",
        "dies": f"{clips['dies']}: the decoder crashes (exit code -11): {remedy}",
        "ended": f"{clips['ended']}: the decoder crashes (exit code -9): {remedy}",
        "surprises": f"{clips['surprises']}: AttributeError while decoding it (no attribute): {remedy}",
    }
    assert cache.ready == {f"c{i}" for i in range(3)}
    del failures["ended"], failures["surprises"]  # may be transient, as when memory runs out: not stored
    assert cache.fill(clips, 1) == failures
    assert cache.ready == clips.keys() - failures.keys()
    forbid("ProcessPool")
    assert cache.fill(clips, 1) == failures


BAD_DECODER = """
import os, signal, time
import cdc_mmpg.media.video
def read_frames(path, *arguments, read=cdc_mmpg.media.video.read_frames):
    if path.stem == "hangs":
        path.parent.with_name("hanging").write_text(str(os.getpid()))
        time.sleep(1000)
    if path.stem == "surprises":
        raise AttributeError("no attribute")
    if path.stem in ("dies", "ended"):
        os.kill(os.getpid(), signal.SIGSEGV if path.stem == "dies" else signal.SIGKILL)
    return read(path, *arguments)
cdc_mmpg.media.video.read_frames = read_frames
"""


def test_decoders_that_do_not_start_are_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DataError, match=r"decoding processes died or did not start .* re-run the same command"):
        make_cache(tmp_path).fill(make_clips(tmp_path, 1), 1)


def test_paths_that_are_not_files_are_named_and_retried(tmp_path):
    clips, cache = make_clips(tmp_path, 1), make_cache(tmp_path)
    clips |= {"pipe": tmp_path / "pipe", "folder": tmp_path, "absent": tmp_path / "absent.avi"}
    os.mkfifo(clips["pipe"])
    failures = cache.fill(clips, 1)
    assert failures == {
        "pipe": f"{clips['pipe']}: not a file",
        "folder": f"{tmp_path}: not a file",
        "absent": f"{clips['absent']}: No such file or directory",
    }
    assert cache.ready == {"c0"}
    write_clip(clips["absent"])
    assert cache.fill(clips, 1).keys() == {"pipe", "folder"}
    moved = clips["absent"].rename(tmp_path / "kept.avi")
    assert "absent" in cache.fill(clips, 1)
    assert cache.ready == {"c0"}
    moved.rename(clips["absent"])
    assert "absent" not in cache.fill(clips, 1)


def test_a_clip_that_is_still_being_written_is_not_cached(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "growing.avi")

    def read_and_append(path, *arguments):
        with path.open("ab") as file:
            file.write(b"more")
        return read_frames(path, *arguments)

    monkeypatch.setattr(decoding, "read_frames", read_and_append)
    settings = decoding.DecodingSettings(tmp_path / "frames", 3, 3, 32, 38, "pyav")
    with pytest.raises(DataError, match=r"growing\.avi: changed while it was decoded"):
        decoding.decode_clip("growing", clip, [], settings)
    assert not (tmp_path / "frames").exists()


def test_the_queue_of_the_decoders_is_bounded(tmp_path, monkeypatch):
    futures, max_queued = [], 0

    class Pool(decoding.ProcessPool):
        def schedule(self, *arguments, **keywords):
            nonlocal max_queued
            futures.append(super().schedule(*arguments, **keywords))
            max_queued = max(max_queued, sum(not future.done() for future in futures))
            return futures[-1]

    monkeypatch.setattr(decoding, "ProcessPool", Pool)
    monkeypatch.setattr(decoding, "MAX_QUEUED_CLIPS", 4)
    assert make_cache(tmp_path).fill(make_clips(tmp_path, 12), 1) == {}
    assert len(futures) == 12
    assert 2 <= max_queued <= 4


def test_too_little_disk_space_is_refused(tmp_path, monkeypatch):
    clips, cache = make_clips(tmp_path, 2), make_cache(tmp_path)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=cache.estimate(2) - 1)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(DataError, match=r"104\.7 kB are needed for the frames of 2 clips, 104\.7 kB are free"):
            cache.fill(clips, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as on a full disk, also for the decoders
    try:
        with pytest.raises(CDCError, match=r"c\d\..*\.npy: cannot be written"):
            cache.fill(clips, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in cache.folder.iterdir()] == ["index.jsonl"]


def test_filling_resumes_after_the_disk_filled_up_within_an_index_line(tmp_path):
    clips, cache = make_clips(tmp_path, 2), make_cache(tmp_path)
    cache.fill(clips, 1)
    os.utime(clips["c1"])
    size = (cache.folder / "index.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
    try:
        with pytest.raises(CDCError, match=r"index\.jsonl: cannot be written"):
            cache.fill(clips, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (cache.folder / "index.jsonl").stat().st_size == size + 30
    assert cache.fill(clips, 1) == {}
    assert [line["name"] for line in read_index(cache)] == ["c0", "c1", "c1"]


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "frames").write_text("a file")
    with pytest.raises(CDCError, match=r"frames.*: cannot be written"):
        make_cache(tmp_path).fill({}, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 256 kB; skip the test if this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False
    )
    if mounting.returncode:
        pytest.skip("this user may mount no file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_filling_resumes_after_the_disk_was_full_or_read_only(small_disk, writable_msvd, tmp_path, monkeypatch, capsys):
    """Every write of a dataset fails with a named error and leaves existing files intact; later it resumes."""
    clips, cache = make_clips(tmp_path / "clips", 8), FrameCache(small_disk / "frames", 3, 32, "pyav")
    with pytest.raises(DataError, match="free disk space"):
        cache.fill(clips, 1)
    monkeypatch.setattr(FrameCache, "estimate", lambda self, clips: 0)  # as if another program used up the space
    with pytest.raises(CDCError, match=r"\.npy: cannot be written .*; an existing file is unchanged"):
        cache.fill(clips, 1)
    written = read_write_times(cache)
    assert 0 < len(written) < 8
    missing = small_disk / "missing.txt"
    for path in written:
        (cache.folder / path).unlink()
    missing.write_text("old")
    with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    (writable_msvd / "YouTubeClips" / "e_3_4.avi").unlink()
    data = MSVDQA(
        str(writable_msvd), str(small_disk), num_classes=5, image_size=32, vocab=str(writable_msvd / "vocab.txt")
    )
    with pytest.raises(CDCError, match=r"missing\.txt: cannot be written .*No space left.* unchanged"):
        data.prepare_data()
    assert missing.read_text() == "old"
    with pytest.raises(CDCError, match=r"data\.json: cannot be written"):
        prepare(MSVDQA(str(writable_msvd), str(tmp_path), num_classes=5, image_size=32), {}, small_disk)
    monkeypatch.setitem(synthetic_clips.DATASET_SIZES, "toy", TINY)
    assert synthetic_clips.main([str(small_disk / "synthetic"), "--size=toy"]) == 1
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not [*small_disk.rglob("*.tmp")]

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for fill in (lambda: cache.fill(clips, 1), lambda: FrameCache(small_disk / "new", 3, 32, "pyav").fill(clips, 1)):
        with pytest.raises(CDCError, match=r"cannot be written \(Read-only file system\)"):
            fill()
    assert synthetic_clips.main([str(small_disk / "other"), "--size=toy"]) == 1
    assert "Read-only file system" in capsys.readouterr().err

    subprocess.run(["mount", "-o", "remount,rw,size=4m", small_disk], check=True)
    assert cache.fill(clips, 1) == {}
    assert cache.ready == clips.keys()


def test_two_processes_may_fill_the_same_cache(tmp_path):
    clips, cache = make_clips(tmp_path / "clips", 12), make_cache(tmp_path)
    command = [sys.executable, "-c", FILL, tmp_path / "clips", tmp_path / "frames", "1"]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(30) for process in processes] == [0, 0]
    cache.load()
    assert cache.ready == set(clips)
    assert len(list(cache.folder.iterdir())) == 13
    for number, name in enumerate(clips):
        assert read_frame_numbers(cache, name, list(range(9))) == choose_candidates(12 + number, 3)


def test_a_decoding_process_loads_no_training_library():
    code = "import sys, data_modules.cache; print({'torch', 'lightning', 'decord', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_odd_files_are_decoded_as_without_a_cache(real, tmp_path, decoder, capfd):
    if decoder == "decord":
        pytest.importorskip("decord")
    clips = {path.name: path for path in sorted((real / "odd").iterdir())}
    cache = FrameCache(tmp_path, 3, 32, decoder)
    failures = cache.fill(clips, 1)
    assert cache.ready == clips.keys() - failures.keys()
    for name, path in clips.items():
        if name in failures:
            with pytest.raises(DataError, match=re.escape(str(path))):
                read_frames(path, lambda count: [0], 32, decoder)
            assert failures[name].startswith(f"{path}: ")
        else:
            expected = read_frames(path, lambda count: choose_candidates(count, 3), 32, decoder)
            np.testing.assert_array_equal(cache.read(name, list(range(9))), expected)
    assert capfd.readouterr().err == ""


# The second decoding process starts only while the first is being ended, which takes two seconds.
SLOW_START = """
import multiprocessing.process, os, pathlib, sys, time
place, end = pathlib.Path(os.environ["SLOW_START"]), multiprocessing.process.BaseProcess.terminate
def end_slowly(process):
    (place / "ends").mkdir(exist_ok=True)
    time.sleep(2)
    end(process)
multiprocessing.process.BaseProcess.terminate = end_slowly
if "spawn_main" in " ".join(sys.orig_argv):
    try:
        (place / "first").mkdir()
    except FileExistsError:
        while not (place / "ends").exists():
            time.sleep(0.01)
"""


def test_a_process_that_starts_during_shutdown_prints_no_traceback(tmp_path):
    make_clips(tmp_path / "clips", 2)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_START)
    search_path = os.pathsep.join(map(str, (tmp_path / "site", ROOT, ROOT / "src")))
    completed = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path / "clips", tmp_path / "frames", "2"], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": search_path, "SLOW_START": str(tmp_path)},
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "ends").exists()
    assert "Traceback" not in completed.stderr
