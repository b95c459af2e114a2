"""The frame cache: resumable, never half-written, and refused by name where a clip is no longer what was decoded."""

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
from cdc_mmpg.files import HOST
from cdc_mmpg.media.frames import candidate_indices, middle_candidates
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
    """Clips c0, c1, ..., of which the k-th has k more frames."""
    return {f"c{i}": write_clip(folder / f"c{i}.avi", frames=frames + i, size=size) for i in range(count)}


def make_cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "frames", 3, 32, "pyav")


def numbers(cache: FrameCache, name: str, candidates: list[int]) -> list[int]:
    """Which frames of a clip the cache gives, read off their grey."""
    return [round((float(frame.mean()) - 4) / 6) for frame in cache.read(name, candidates)]


def times(cache: FrameCache) -> dict[str, int]:
    """When each array was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.folder.glob("*.npy")}


def lines(cache: FrameCache) -> list[dict[str, object]]:
    return [json.loads(line) for line in (cache.folder / "index.jsonl").read_text().splitlines()]


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """forbid("file_digest"): from here on the cache may not use it."""

    def forbid(what: str) -> None:
        for place in (module, decoding):
            monkeypatch.setattr(place, what, None, raising=False)

    return forbid


def test_cached_frames_are_the_candidates_of_each_clip(tmp_path):
    clips = {"a clip/of: ünusual näme": write_clip(tmp_path / "long.avi", frames=40)}
    clips |= {"index": write_clip(tmp_path / "brief.avi", frames=2)}
    cache = make_cache(tmp_path)
    assert cache.fill(clips, 1) == {}
    assert cache.ready == set(clips)
    for name, frames in zip(clips, (40, 2), strict=True):
        assert numbers(cache, name, list(range(9))) == candidate_indices(frames, 3)
        status, entry = clips[name].stat(), cache.entry(name)
        assert entry == Entry(status.st_size, status.st_mtime_ns, frames, entry.sha256)
        assert cache.key(name) == f"pyav-38px-3x3/{entry.sha256}"
    assert numbers(cache, "index", middle_candidates(3)) == [0, 1, 1]
    assert sorted(np.load(path).shape[0] for path in cache.folder.glob("*.npy")) == [2, 9]
    assert cache.estimate(1) == max(path.stat().st_size for path in cache.folder.glob("*.npy")) - 128

    later = make_cache(tmp_path)
    with pytest.raises(DataError, match=r"index: not in .*index\.jsonl"):
        later.read("index", [0])
    later.load()
    assert later.ready == set(clips)
    np.testing.assert_array_equal(later.read("index", [0, 8]), cache.read("index", [0, 8]))


def test_decoding_one_clip_keeps_its_candidates(tmp_path, forbid):
    """As a decoding process does it, without one."""
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
        assert greys == (candidate_indices(frames, 3) if frames > 9 else list(range(frames)))
    page = tmp_path / "page.avi"
    page.write_text("<html>")
    entry = decoding.decode_clip("page", page, [], settings)
    assert (entry.size, entry.frames, entry.sha256) == (6, 0, hashlib.sha256(b"<html>").hexdigest())
    assert entry.error.startswith("pyav cannot decode it")
    assert not list(settings.folder.glob("page*"))
    forbid("read_frames")  # what is there under the clip's name and content is taken
    others = ["a_clip.000000000000.1.npy", f"a_clip.{digest[:12]}.1.npy"]
    assert decoding.decode_clip("a clip", path, others, settings).frames == 1
    with pytest.raises(DataError, match="cannot be read"):
        decoding.decode_clip("absent", tmp_path / "absent.avi", [], settings)


def test_a_decoder_that_is_not_installed_is_named_before_anything_is_decoded(tmp_path, monkeypatch):
    clips = make_clips(tmp_path, 1)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="decord is not installed here"):
        FrameCache(tmp_path / "frames", 3, 32, "decord").fill(clips, 1)


def test_settings_have_folders_of_their_own(tmp_path):
    clips, one = make_clips(tmp_path, 1, frames=40), make_cache(tmp_path)
    one.fill(clips, 1)
    other = FrameCache(tmp_path / "frames", 2, 32, "pyav", side=40, candidates=4)
    assert other.fill(clips, 1) == {}
    assert [path.name for path in sorted((tmp_path / "frames").iterdir())] == ["pyav-38px-3x3", "pyav-40px-2x4"]
    assert numbers(other, "c0", list(range(8))) == candidate_indices(40, 2, 4) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert numbers(other, "c0", middle_candidates(2, 4)) == [12, 32]
    assert other.read("c0", [0]).shape[1:3] == (40, 53)
    assert other.key("c0") != one.key("c0")
    assert numbers(one, "c0", middle_candidates(3)) == [6, 20, 33]


def children_of(pid: int) -> set[int]:
    return {int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def is_running(pid: int) -> bool:
    """Not gone, and not merely waiting for init to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_killed_in_the_middle_it_goes_on(tmp_path):
    """Nothing is decoded twice, nothing is half there, no decoder stays behind."""
    clips, cache = make_clips(tmp_path / "clips", 12, frames=30, size=(480, 360)), make_cache(tmp_path)
    run = subprocess.Popen([sys.executable, "-c", FILL, tmp_path / "clips", tmp_path / "frames", "1"])
    end = time.monotonic() + 20
    while len(times(cache)) < 3:
        assert time.monotonic() < end
        time.sleep(0.002)
    decoders = children_of(run.pid)
    run.kill()
    run.wait()
    assert decoders
    while any(is_running(pid) for pid in decoders):
        assert time.monotonic() < end, "a decoder was left behind"
        time.sleep(0.01)
    made = times(cache)
    assert 3 <= len(made) < 12
    assert cache.fill(clips, 1) == {}
    assert len(times(cache)) == 12
    assert made.items() <= times(cache).items(), "a clip was decoded twice"
    assert cache.ready == set(clips)
    for number, name in enumerate(clips):
        assert cache.entry(name).frames == 30 + number
        assert numbers(cache, name, list(range(9))) == candidate_indices(30 + number, 3)
    assert not list(cache.folder.glob(".*"))


def test_no_decoder_stays_behind_when_it_hangs(tmp_path):
    clip = write_clip(tmp_path / "clips" / "hangs.avi")
    (tmp_path / "sitecustomize.py").write_text(BAD_DECODER)
    command = [sys.executable, "-c", FILL, clip.parent, tmp_path / "frames", "1"]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not (tmp_path / "hanging").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    decoder = int((tmp_path / "hanging").read_text())
    assert decoder in children_of(run.pid)
    run.kill()
    run.wait()
    while is_running(decoder):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_leftovers_of_killed_runs_are_removed(tmp_path, monkeypatch):
    """A decoder of a killed run may live on for a moment."""
    cache, late = make_cache(tmp_path), subprocess.Popen(["sleep", "60"])
    cache.folder.mkdir(parents=True)
    early, later = (cache.folder / f".c.npy.{HOST}.{pid}.tmp" for pid in (4194999, late.pid))
    early.touch()
    later.touch()

    def fill(*arguments: object) -> dict[str, str]:
        assert not early.exists()
        assert later.exists()
        late.kill()
        late.wait()
        return {}

    monkeypatch.setattr(cache, "_fill", fill)
    cache.fill({}, 1)
    assert not later.exists()


def test_a_cut_index_and_a_half_written_array_are_made_good(tmp_path):
    clips, cache = make_clips(tmp_path, 3), make_cache(tmp_path)
    cache.fill(clips, 1)
    made, index = times(cache), cache.folder / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-30])
    half = cache.folder / f".c1.000000000000.13.npy.{HOST}.4194999.tmp"
    half.write_bytes(b"half")
    reader = make_cache(tmp_path)
    reader.load()
    assert len(reader.ready) == 2
    assert index.read_bytes()[-1:] != b"\n", "who only reads changes nothing"
    assert make_cache(tmp_path).fill(clips, 1) == {}
    assert not half.exists()
    assert {line["name"] for line in lines(cache)} == set(clips)
    assert times(cache) == made, "a whole array was decoded again"


def test_a_damaged_index_is_refused_and_can_be_deleted(tmp_path):
    clips, cache = make_clips(tmp_path, 3), make_cache(tmp_path)
    cache.fill(clips, 1)
    made, index = times(cache), cache.folder / "index.jsonl"
    whole = index.read_text().splitlines()
    entries = [cache.entry(name) for name in clips]
    for damaged in ('{"name": "c0"', "[]", "\0\0", whole[1].replace(": 12", ': "12"').replace(": 13", ': "13"')):
        index.write_text("\n".join([whole[0], damaged, whole[2], ""]))
        for action in (cache.load, lambda: cache.fill(clips, 1)):
            with pytest.raises(DataError, match=r"index\.jsonl:2: the index is damaged .*: delete the file"):
                action()
    index.unlink()
    assert cache.fill(clips, 1) == {}
    assert [cache.entry(name) for name in clips] == entries
    assert times(cache) == made, "the arrays were there"


def test_a_damaged_array_is_refused_and_can_be_deleted(tmp_path):
    clips, cache = make_clips(tmp_path, 1), make_cache(tmp_path)
    cache.fill(clips, 1)
    (path,) = cache.folder.glob("*.npy")
    whole, shorter = path.read_bytes(), io.BytesIO()
    np.save(shorter, np.load(path)[:5])
    for damaged in (whole[:-1], b"", b"\0" * len(whole), shorter.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"{path.name}: the cached frames of c0 cannot be read .*: delete the file"
        ):
            cache.read("c0", [0])
    path.unlink()
    cache.load()
    assert not cache.ready
    cache.fill(clips, 1)
    assert path.read_bytes() == whole


def test_a_changed_clip_is_refused_by_name_until_asked_for(tmp_path, caplog):
    clips, cache = make_clips(tmp_path, 6), make_cache(tmp_path)
    cache.fill(clips, 1)
    before, key, made = numbers(cache, "c3", [0, 8]), cache.key("c3"), times(cache)
    write_clip(clips["c3"], frames=40)
    with pytest.raises(
        DataError, match=r" 1 clips changed .*\n  c3 \(.*c3\.avi\)\nfetch them again, or run `make data`"
    ):
        cache.fill(clips, 1)
    assert times(cache) == made
    with caplog.at_level(logging.WARNING):
        assert cache.fill(clips, 1, renew=True) == {}
    assert "decoding anew, for their files changed: c3" in caplog.text
    assert cache.entry("c3").frames == 40
    assert numbers(cache, "c3", [0, 8]) == [2, 37] != before
    assert cache.key("c3") != key
    assert len(times(cache)) == 6, "the old array was not removed"
    assert len(made.items() - times(cache).items()) == 1, "another clip was decoded again"
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


def test_a_changed_clip_that_is_no_longer_one_loses_its_frames(tmp_path):
    clips, cache = make_clips(tmp_path, 2), make_cache(tmp_path)
    cache.fill(clips, 1)
    clips["c0"].write_text("<html>404</html>")
    assert list(cache.fill(clips, 1, renew=True)) == ["c0"]
    assert cache.ready == {"c1"}
    assert [name.partition(".")[0] for name in times(cache)] == ["c1"]
    with pytest.raises(DataError, match=r"c0: no frames .*pyav cannot decode it"):
        cache.read("c0", [0])


def test_a_touched_or_moved_clip_is_not_decoded_again(tmp_path, forbid):
    clips, cache = make_clips(tmp_path / "here", 3), make_cache(tmp_path)
    cache.fill(clips, 1)
    made, keys = times(cache), [cache.key(name) for name in clips]
    forbid("ProcessPool")
    (tmp_path / "here").rename(tmp_path / "there")
    clips = {name: tmp_path / "there" / path.name for name, path in clips.items()}
    os.utime(clips["c1"])
    assert cache.fill(clips, 1) == {}
    assert times(cache) == made
    assert [cache.key(name) for name in clips] == keys
    assert cache.entry("c1").mtime_ns == clips["c1"].stat().st_mtime_ns
    assert [line["name"] for line in lines(cache)][3:] == ["c1"]
    forbid("file_digest")
    assert cache.fill(clips, 1) == {}


def test_clips_that_cannot_be_decoded_are_remembered(tmp_path, forbid, monkeypatch):
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
    write_clip(clips["no"], codec="libx264")  # fetched again: nothing was prepared from what it was
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
        "hangs": f"{clips['hangs']}: hangs the decoder (no end within 1 s): {remedy}",
        "dies": f"{clips['dies']}: kills the decoder (exit code -11): {remedy}",
        "ended": f"{clips['ended']}: kills the decoder (exit code -9): {remedy}",
        "surprises": f"{clips['surprises']}: AttributeError while decoding it (no attribute): {remedy}",
    }
    assert cache.ready == {f"c{i}" for i in range(3)}
    del failures["ended"], failures["surprises"]  # as the system ends who takes too much memory: of the moment
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
    with pytest.raises(DataError, match=r"decoding processes end or do not start .* type the same command again"):
        make_cache(tmp_path).fill(make_clips(tmp_path, 1), 1)


def test_clips_that_are_no_files_are_named_and_tried_again(tmp_path):
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
    kept = clips["absent"].rename(tmp_path / "kept.avi")
    assert "absent" in cache.fill(clips, 1)
    assert cache.ready == {"c0"}
    kept.rename(clips["absent"])
    assert "absent" not in cache.fill(clips, 1)


def test_a_clip_that_is_still_being_written_is_not_prepared(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "growing.avi")

    def read(path, *arguments):
        with path.open("ab") as file:
            file.write(b"more")
        return read_frames(path, *arguments)

    monkeypatch.setattr(decoding, "read_frames", read)
    settings = decoding.DecodingSettings(tmp_path / "frames", 3, 3, 32, 38, "pyav")
    with pytest.raises(DataError, match=r"growing\.avi: changes while it is decoded"):
        decoding.decode_clip("growing", clip, [], settings)
    assert not (tmp_path / "frames").exists()


def test_few_clips_wait_in_the_decoders_at_a_time(tmp_path, monkeypatch):
    waiting, most = [], 0

    class Pool(decoding.ProcessPool):
        def schedule(self, *arguments, **keywords):
            nonlocal most
            waiting.append(super().schedule(*arguments, **keywords))
            most = max(most, sum(not future.done() for future in waiting))
            return waiting[-1]

    monkeypatch.setattr(decoding, "ProcessPool", Pool)
    monkeypatch.setattr(decoding, "MAX_QUEUED_CLIPS", 4)
    assert make_cache(tmp_path).fill(make_clips(tmp_path, 12), 1) == {}
    assert len(waiting) == 12
    assert 2 <= most <= 4


def test_too_little_room(tmp_path, monkeypatch):
    clips, cache = make_clips(tmp_path, 2), make_cache(tmp_path)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=cache.estimate(2) - 1)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(DataError, match=r"104\.7 kB are needed for the frames of 2 clips, 104\.7 kB are free"):
            cache.fill(clips, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as the end of a disk, for the decoders too
    try:
        with pytest.raises(CDCError, match=r"c\d\..*\.npy: cannot be written"):
            cache.fill(clips, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in cache.folder.iterdir()] == ["index.jsonl"]


def test_the_room_ends_within_a_line_of_the_index(tmp_path):
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
    assert [line["name"] for line in lines(cache)] == ["c0", "c1", "c1"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "frames").write_text("a file")
    with pytest.raises(CDCError, match=r"frames.*: cannot be written"):
        make_cache(tmp_path).fill({}, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may mount no file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_or_may_only_be_read(small_disk, own_msvd, tmp_path, monkeypatch, capsys):
    """Whatever is written for a dataset: a named error, what was there is intact, and there is room it goes on."""
    clips, cache = make_clips(tmp_path / "clips", 8), FrameCache(small_disk / "frames", 3, 32, "pyav")
    with pytest.raises(DataError, match="make room"):
        cache.fill(clips, 1)
    monkeypatch.setattr(FrameCache, "estimate", lambda self, clips: 0)  # as if another program took the room meanwhile
    with pytest.raises(CDCError, match=r"\.npy: cannot be written .*, and what was there is untouched"):
        cache.fill(clips, 1)
    made = times(cache)
    assert 0 < len(made) < 8
    missing = small_disk / "missing.txt"
    for path in made:
        (cache.folder / path).unlink()
    missing.write_text("old")
    with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    (own_msvd / "YouTubeClips" / "e_3_4.avi").unlink()
    data = MSVDQA(str(own_msvd), str(small_disk), num_classes=5, image_size=32, vocab=str(own_msvd / "vocab.txt"))
    with pytest.raises(CDCError, match=r"missing\.txt: cannot be written .*No space left.* untouched"):
        data.prepare_data()
    assert missing.read_text() == "old"
    with pytest.raises(CDCError, match=r"data\.json: cannot be written"):
        prepare(MSVDQA(str(own_msvd), str(tmp_path), num_classes=5, image_size=32), {}, small_disk)
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
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait(30) for run in runs] == [0, 0]
    cache.load()
    assert cache.ready == set(clips)
    assert len(list(cache.folder.iterdir())) == 13
    for number, name in enumerate(clips):
        assert numbers(cache, name, list(range(9))) == candidate_indices(12 + number, 3)


def test_a_decoding_process_loads_no_training_library():
    code = "import sys, data_modules.cache; print({'torch', 'lightning', 'decord', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_every_odd_file_at_once_is_as_alone(real, tmp_path, decoder, capfd):
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
            alone = read_frames(path, lambda count: candidate_indices(count, 3), 32, decoder)
            np.testing.assert_array_equal(cache.read(name, list(range(9))), alone)
    assert capfd.readouterr().err == ""


# The second process that decodes starts only when the first is to be ended, which takes two seconds.
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


def test_a_process_that_still_starts_when_all_is_done_says_nothing(tmp_path):
    make_clips(tmp_path / "clips", 2)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_START)
    places = os.pathsep.join(map(str, (tmp_path / "site", ROOT, ROOT / "src")))
    done = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path / "clips", tmp_path / "frames", "2"], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": places, "SLOW_START": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ends").exists()
    assert "Traceback" not in done.stderr
