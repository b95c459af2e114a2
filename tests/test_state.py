"""What a device keeps: one writer, no layer of another camera, no number that was not signed, no fault of the disk."""

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg.device import Device
from cdc_mmpg.device.state import CLIP_COUNT, MAX_SESSION_CLIPS, State
from cdc_mmpg.dimensions import FEATURE_DIM
from conftest import write_clip
from deployments import open_device

QUESTION = "what is the man doing?"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clips")
    return [write_clip(root / f"{i}.mp4", frames=8 + 3 * i) for i in range(4)]


def device_in(state: Path, deployed: Path, url: str | None = None) -> Device:
    return open_device(deployed, url, state=state, deadline=20.0)


def test_a_session_that_begins_while_a_layer_is_kept_is_not_given_the_one_before(deployed, fake, clips, tmp_path):
    device = device_in(tmp_path, deployed, fake.url)
    writing, go = threading.Event(), threading.Event()
    write = device._state._write

    def slow(path: Path, content: bytes) -> None:
        if path.name.startswith("layer"):
            writing.set()
            go.wait(20)
        write(path, content)

    device._state._write = slow
    device.deadline = 0.01
    device.answer(clips[0], QUESTION)
    assert writing.wait(20)
    begin = threading.Thread(target=device.new_session)
    begin.start()
    begin.join(0.2)  # it waits for the layer to be kept, or it is done by now
    go.set()
    begin.join(20)
    if device._asking is not None:
        device._asking.join(20)
    assert device._layer.origin == "shared"
    again = device_in(tmp_path, deployed)
    assert again.answer(clips[1], QUESTION).origin == "shared"
    assert len(again._anchors) == 1


def test_a_layer_that_comes_after_its_session_is_neither_installed_nor_kept(deployed, fake, clips, tmp_path):
    go = threading.Event()
    fake.change = lambda layer: (200, {}, layer) if go.wait(20) else None
    device = device_in(tmp_path, deployed, fake.url)
    device.deadline = 0.05
    device.answer(clips[0], QUESTION)
    late = device._asking
    device.new_session()
    go.set()
    late.join(20)
    assert device._layer.origin == "shared"
    assert device._trouble == ""
    device.deadline = 20.0
    assert device.answer(clips[1], QUESTION).anchors == 1


def test_a_device_writes_no_more_to_a_state_in_which_another_has_begun_a_session(
    deployed, fake, clips, tmp_path, caplog
):
    first, second = (device_in(tmp_path, deployed, fake.url) for _ in range(2))
    first.answer(clips[0], QUESTION)
    second.new_session()
    assert first.answer(clips[1], QUESTION).anchors == 2
    assert "another process has begun a new session" in caplog.text
    again = device_in(tmp_path, deployed)
    assert again.answer(clips[2], QUESTION).origin == "shared"
    assert len(again._anchors) == 1
    second.answer(clips[3], QUESTION)
    assert device_in(tmp_path, deployed)._layer.origin == "kept"


def test_a_state_whose_lock_is_held_keeps_nobody_waiting(deployed, fake, clips, tmp_path, caplog):
    device = device_in(tmp_path, deployed, fake.url)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert device.answer(clips[0], QUESTION).origin == "adapted"
    os.close(descriptor)
    assert caplog.text.count("cannot be written") == 1


def count_warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


def use(device: Device, clips: list[Path]) -> None:
    """Answer, begin a new session, and answer again."""
    for clip in clips[:2]:
        assert device.answer(clip, QUESTION).origin == "adapted"
    device.new_session()
    assert device.answer(clips[2], QUESTION).anchors == 1


@pytest.mark.parametrize("what", ["a file", "below a file", "folders", "pipes", "a long name", "a null", "no Unicode"])
def test_a_state_that_is_none_does_not_keep_from_answering(deployed, fake, clips, tmp_path, what, caplog):
    state = tmp_path / "state"
    if what == "a file":
        state.write_text("in the way")
    elif what == "below a file":
        (tmp_path / "file").write_text("in the way")
        state = tmp_path / "file" / "state"
    elif what in ("folders", "pipes"):
        device_in(state, deployed, fake.url).answer(clips[0], QUESTION)
        for path in list(state.iterdir()):
            path.unlink()
            path.mkdir() if what == "folders" else os.mkfifo(path)
    else:
        state = tmp_path / {"a long name": "x" * 300, "a null": "x\0y", "no Unicode": "\ud800"}[what]
    device = device_in(state, deployed, fake.url)
    use(device, clips)
    assert what == "pipes" or count_warnings(caplog) in (1, 2, 3)  # reading, writing, clearing: each once


def test_a_state_that_vanishes_is_made_again(deployed, fake, clips, tmp_path):
    device = device_in(tmp_path / "state", deployed, fake.url)
    device.answer(clips[0], QUESTION)
    shutil.rmtree(tmp_path / "state")
    device.new_session()
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    device.answer(clips[1], QUESTION)
    assert device_in(tmp_path / "state", deployed)._layer.anchors in (0, 1)
    device.new_session()
    device.answer(clips[2], QUESTION)
    assert device_in(tmp_path / "state", deployed)._layer.origin == "kept"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_keeps_what_was_there_and_the_device_goes_on(deployed, fake, clips, small_disk, caplog):
    device = device_in(small_disk / "state", deployed, fake.url)
    device.answer(clips[0], QUESTION)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert device.answer(clips[1], QUESTION).anchors == 2
    assert count_warnings(caplog) == 1
    assert device_in(small_disk / "state", deployed)._layer.anchors == 1
    device.new_session()  # deleting takes no room
    assert device.answer(clips[2], QUESTION).anchors == 1
    assert device_in(small_disk / "state", deployed)._layer.origin == "shared"


def test_a_disk_that_may_only_be_read_gives_its_layer_and_the_device_goes_on(deployed, fake, clips, small_disk, caplog):
    device_in(small_disk / "state", deployed, fake.url).answer(clips[0], QUESTION)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    device = device_in(small_disk / "state", deployed, fake.url)
    assert device._layer.origin == "kept"
    use(device, clips[1:])
    assert "delete it, or the next start goes on with the session before" in caplog.text
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    device.answer(clips[0], QUESTION)  # what could not be cleared is cleared before anything else is written
    again = device_in(small_disk / "state", deployed)
    assert (again._layer.anchors, len(again._anchors)) == (2, 2)


def kept(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}.*")
    return path


def test_the_number_of_clips_is_the_one_that_was_signed(deployed, fake, clips, tmp_path):
    device = device_in(tmp_path, deployed, fake.url)
    for clip in clips[:2]:
        device.answer(clip, QUESTION)
    path = kept(tmp_path, "layer")
    content = path.read_bytes()
    assert device_in(tmp_path, deployed)._layer.anchors == 2
    for count in (0, 1, 3, MAX_SESSION_CLIPS, 4_294_967_295):
        path.write_bytes(content[: -CLIP_COUNT.size] + CLIP_COUNT.pack(count))
        assert State(tmp_path, device.model).layer() is None
    for place in range(len(content) - 60, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert State(tmp_path, device.model).layer() is None
    for cut in range(0, len(content), 37):
        for changed in (content[:cut], content + bytes(cut + 1)):
            path.write_bytes(changed)
            assert State(tmp_path, device.model).layer() is None


@pytest.mark.parametrize("rows", [MAX_SESSION_CLIPS + 1, 20_000])
def test_more_anchors_than_a_session_has_are_not_taken(deployed, tmp_path, rows, caplog):
    device = device_in(tmp_path, deployed)
    device._state.keep_anchors([np.zeros(FEATURE_DIM, np.float32)] * MAX_SESSION_CLIPS)
    assert len(State(tmp_path, device.model).anchors()) == MAX_SESSION_CLIPS
    kept(tmp_path, "anchors").write_bytes(bytes(4 * FEATURE_DIM * rows))
    assert device_in(tmp_path, deployed)._anchors == []
    assert "is not used" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5])
def test_anchors_that_no_encoder_gives_are_not_taken(deployed, tmp_path, value):
    device = device_in(tmp_path, deployed)
    device._state.keep_anchors([np.zeros(FEATURE_DIM, np.float32), np.full(FEATURE_DIM, value, np.float32)])
    assert device_in(tmp_path, deployed)._anchors == []


def test_a_layer_is_of_no_more_clips_than_count(deployed, fake, clips, tmp_path):
    device = device_in(tmp_path, deployed, fake.url)
    random = np.random.default_rng(0)
    for _ in range(MAX_SESSION_CLIPS + 5):
        device._add(random.uniform(-1, 1, FEATURE_DIM).astype(np.float32))
    answer = device.answer(clips[0], QUESTION)
    assert (answer.origin, answer.anchors) == ("adapted", MAX_SESSION_CLIPS)
    for _ in range(MAX_SESSION_CLIPS - 2):
        device._add(random.uniform(-1, 1, FEATURE_DIM).astype(np.float32))
    assert device.answer(clips[1], QUESTION).bytes_up == 0
    assert device.answer(clips[2], QUESTION).bytes_up == 836  # as many new ones as count
    assert device_in(tmp_path, deployed)._layer.anchors == MAX_SESSION_CLIPS
