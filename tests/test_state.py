"""State stored on a device: concurrent writers, new sessions, damaged or unsigned content, and disk faults."""

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


def open_device_at(state: Path, deployed: Path, url: str | None = None) -> Device:
    return open_device(deployed, url, state=state, deadline=20.0)


def test_new_session_during_a_layer_write_starts_from_the_shared_layer(deployed, fake, clips, tmp_path):
    device = open_device_at(tmp_path, deployed, fake.url)
    write_started, write_allowed = threading.Event(), threading.Event()
    write = device._state._write

    def write_slowly(path: Path, content: bytes) -> None:
        if path.name.startswith("layer"):
            write_started.set()
            write_allowed.wait(20)
        write(path, content)

    device._state._write = write_slowly
    device.deadline = 0.01
    device.answer(clips[0], QUESTION)
    assert write_started.wait(20)
    session_thread = threading.Thread(target=device.new_session)
    session_thread.start()
    session_thread.join(0.2)  # either waits for the layer to be stored, or is done by now
    write_allowed.set()
    session_thread.join(20)
    if device._request_thread is not None:
        device._request_thread.join(20)
    assert device._layer.origin == "shared"
    reopened = open_device_at(tmp_path, deployed)
    assert reopened.answer(clips[1], QUESTION).origin == "shared"
    assert len(reopened._anchors) == 1


def test_layer_arriving_after_its_session_is_discarded(deployed, fake, clips, tmp_path):
    reply_allowed = threading.Event()
    fake.change = lambda layer: (200, {}, layer) if reply_allowed.wait(20) else None
    device = open_device_at(tmp_path, deployed, fake.url)
    device.deadline = 0.05
    device.answer(clips[0], QUESTION)
    late_request = device._request_thread
    device.new_session()
    reply_allowed.set()
    late_request.join(20)
    assert device._layer.origin == "shared"
    assert device._trouble == ""
    device.deadline = 20.0
    assert device.answer(clips[1], QUESTION).anchors == 1


def test_device_stops_writing_after_another_process_starts_a_session(deployed, fake, clips, tmp_path, caplog):
    first, second = (open_device_at(tmp_path, deployed, fake.url) for _ in range(2))
    first.answer(clips[0], QUESTION)
    second.new_session()
    assert first.answer(clips[1], QUESTION).anchors == 2
    assert "another process has begun a new session" in caplog.text
    reopened = open_device_at(tmp_path, deployed)
    assert reopened.answer(clips[2], QUESTION).origin == "shared"
    assert len(reopened._anchors) == 1
    second.answer(clips[3], QUESTION)
    assert open_device_at(tmp_path, deployed)._layer.origin == "kept"


def test_locked_state_does_not_block_answers(deployed, fake, clips, tmp_path, caplog):
    device = open_device_at(tmp_path, deployed, fake.url)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert device.answer(clips[0], QUESTION).origin == "adapted"
    os.close(descriptor)
    assert caplog.text.count("cannot be written") == 1
    assert "(another process has held its lock for 0.5 s)" in caplog.text


def count_warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


def answer_in_two_sessions(device: Device, clips: list[Path]) -> None:
    """Answer in one session, start a new one, and answer again."""
    for clip in clips[:2]:
        assert device.answer(clip, QUESTION).origin == "adapted"
    device.new_session()
    assert device.answer(clips[2], QUESTION).anchors == 1


@pytest.mark.parametrize(
    "obstacle", ["a file", "below a file", "folders", "pipes", "a long name", "a null", "no Unicode"]
)
def test_unusable_state_folder_does_not_prevent_answers(deployed, fake, clips, tmp_path, obstacle, caplog):
    state = tmp_path / "state"
    if obstacle == "a file":
        state.write_text("in the way")
    elif obstacle == "below a file":
        (tmp_path / "file").write_text("in the way")
        state = tmp_path / "file" / "state"
    elif obstacle in ("folders", "pipes"):
        open_device_at(state, deployed, fake.url).answer(clips[0], QUESTION)
        for path in list(state.iterdir()):
            path.unlink()
            path.mkdir() if obstacle == "folders" else os.mkfifo(path)
    else:
        state = tmp_path / {"a long name": "x" * 300, "a null": "x\0y", "no Unicode": "\ud800"}[obstacle]
    device = open_device_at(state, deployed, fake.url)
    answer_in_two_sessions(device, clips)
    assert obstacle == "pipes" or count_warnings(caplog) in (
        1,
        2,
        3,
    )  # at most one each for reading, writing and clearing


def test_deleted_state_folder_is_recreated(deployed, fake, clips, tmp_path):
    device = open_device_at(tmp_path / "state", deployed, fake.url)
    device.answer(clips[0], QUESTION)
    shutil.rmtree(tmp_path / "state")
    device.new_session()
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    device.answer(clips[1], QUESTION)
    assert open_device_at(tmp_path / "state", deployed)._layer.anchors in (0, 1)
    device.new_session()
    device.answer(clips[2], QUESTION)
    assert open_device_at(tmp_path / "state", deployed)._layer.origin == "kept"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 64 KB; skips the test without the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_keeps_the_old_state_and_the_device_still_answers(deployed, fake, clips, small_disk, caplog):
    device = open_device_at(small_disk / "state", deployed, fake.url)
    device.answer(clips[0], QUESTION)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert device.answer(clips[1], QUESTION).anchors == 2
    assert count_warnings(caplog) == 1
    assert open_device_at(small_disk / "state", deployed)._layer.anchors == 1
    device.new_session()  # deleting needs no disk space
    assert device.answer(clips[2], QUESTION).anchors == 1
    assert open_device_at(small_disk / "state", deployed)._layer.origin == "shared"


def test_read_only_disk_restores_the_layer_and_the_device_still_answers(deployed, fake, clips, small_disk, caplog):
    open_device_at(small_disk / "state", deployed, fake.url).answer(clips[0], QUESTION)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    device = open_device_at(small_disk / "state", deployed, fake.url)
    assert device._layer.origin == "kept"
    answer_in_two_sessions(device, clips[1:])
    assert "delete it, or the next start resumes the old session" in caplog.text
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    device.answer(clips[0], QUESTION)  # first clears the state of the old session
    reopened = open_device_at(small_disk / "state", deployed)
    assert (reopened._layer.anchors, len(reopened._anchors)) == (2, 2)


def find_stored_file(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}.*")
    return path


def test_clip_count_of_a_stored_layer_is_signed(deployed, fake, clips, tmp_path):
    device = open_device_at(tmp_path, deployed, fake.url)
    for clip in clips[:2]:
        device.answer(clip, QUESTION)
    path = find_stored_file(tmp_path, "layer")
    content = path.read_bytes()
    assert open_device_at(tmp_path, deployed)._layer.anchors == 2
    for count in (0, 1, 3, MAX_SESSION_CLIPS, 4_294_967_295):
        path.write_bytes(content[: -CLIP_COUNT.size] + CLIP_COUNT.pack(count))
        assert State(tmp_path, device.model).load_layer() is None
    for offset in range(len(content) - 60, len(content)):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        assert State(tmp_path, device.model).load_layer() is None
    for length in range(0, len(content), 37):
        for changed in (content[:length], content + bytes(length + 1)):
            path.write_bytes(changed)
            assert State(tmp_path, device.model).load_layer() is None


@pytest.mark.parametrize("rows", [MAX_SESSION_CLIPS + 1, 20_000])
def test_too_many_stored_anchors_are_ignored(deployed, tmp_path, rows, caplog):
    device = open_device_at(tmp_path, deployed)
    device._state.save_anchors([np.zeros(FEATURE_DIM, np.float32)] * MAX_SESSION_CLIPS)
    assert len(State(tmp_path, device.model).load_anchors()) == MAX_SESSION_CLIPS
    find_stored_file(tmp_path, "anchors").write_bytes(bytes(4 * FEATURE_DIM * rows))
    assert open_device_at(tmp_path, deployed)._anchors == []
    assert "is ignored" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5])
def test_stored_anchors_out_of_range_are_ignored(deployed, tmp_path, value):
    device = open_device_at(tmp_path, deployed)
    device._state.save_anchors([np.zeros(FEATURE_DIM, np.float32), np.full(FEATURE_DIM, value, np.float32)])
    assert open_device_at(tmp_path, deployed)._anchors == []


def test_layer_uses_at_most_the_maximum_of_session_clips(deployed, fake, clips, tmp_path):
    device = open_device_at(tmp_path, deployed, fake.url)
    random = np.random.default_rng(0)
    for _ in range(MAX_SESSION_CLIPS + 5):
        device._add_anchor(random.uniform(-1, 1, FEATURE_DIM).astype(np.float32))
    answer = device.answer(clips[0], QUESTION)
    assert (answer.origin, answer.anchors) == ("adapted", MAX_SESSION_CLIPS)
    for _ in range(MAX_SESSION_CLIPS - 2):
        device._add_anchor(random.uniform(-1, 1, FEATURE_DIM).astype(np.float32))
    assert device.answer(clips[1], QUESTION).bytes_up == 0
    assert device.answer(clips[2], QUESTION).bytes_up == 836  # the maximum number of new clips
    assert open_device_at(tmp_path, deployed)._layer.anchors == MAX_SESSION_CLIPS
