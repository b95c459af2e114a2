"""Device client: sessions with the service, cloud failures, stored state, damaged bundles, and refused input."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg.cloud.model import load_model, read_cloud_bundle
from cdc_mmpg.device import Answer
from cdc_mmpg.device.__main__ import main
from cdc_mmpg.device.model import BUNDLE_FORMAT, DeviceModel, read_bundle
from cdc_mmpg.device.state import State
from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.files import hash_file, hash_json
from cdc_mmpg.wire.messages import FRAMING_BYTES, HEADER, build_signed_content, decode_layer
from conftest import write_clip
from deployments import Cloud, Reply, open_device

ROOT = Path(__file__).parents[1]
QUESTION = "what is the man doing?"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write nine clips with different anchors."""
    root = tmp_path_factory.mktemp("clips")
    return [write_clip(root / f"{i}.mp4", frames=8 + 3 * i, codec="libx264") for i in range(9)]


def test_a_session_is_adapted_by_the_real_service(deployed, clips, tmp_path):
    with Cloud(deployed / "session" / "cloud", tmp_path / "log") as service:
        device = open_device(deployed, service.url)
        answer = device.answer(clips[0], QUESTION)
        assert (answer.origin, answer.anchors, answer.trouble) == ("adapted", 1, "")
        assert (answer.bytes_up, answer.bytes_down) == (836, device.model.layout.message_bytes)
        assert set(answer.milliseconds) == {
            "decode", "encode", "anchor", "upload", "generate", "download", "verify", "swap", "answer"
        }  # fmt: skip
        assert sum(probability for _, probability in answer.ranked) == pytest.approx(1)
        assert answer.ranked == sorted(answer.ranked, key=lambda pair: -pair[1])
        assert answer.text == answer.ranked[0][0]
        # The layer is the generator's output for the anchor feature, up to the payload's rounding.
        cloud_model = load_model(deployed / "session" / "cloud")
        upload = device.model.encode_anchor(device.model.decode_frames(clips[0]))
        upload_bytes = np.array(upload, "<f4").tobytes()
        import torch

        with torch.no_grad():
            left, right = cloud_model.generator(torch.from_numpy(upload)[None])
            expected = device.model.shared + (left[0].T @ right[0]).numpy()
        assert len(upload_bytes) == 768
        assert np.abs(device._layer.matrix - expected).max() < 0.02 * np.abs(expected - device.model.shared).max()
        assert device.answer(clips[0], QUESTION).bytes_up == 0  # the session keeps its layer


def test_no_upload_follows_a_new_session(deployed, fake, clips):
    """The clips before it are no longer this session's."""
    fake.change = lambda layer: (503, {}, b"")
    device = open_device(deployed, fake.url, deadline=0.3)
    assert "503" in device.answer(clips[0], QUESTION).trouble
    device.new_session()
    count = len(fake.uploads)
    assert count > 1
    time.sleep(1)  # the next one would follow after 0.6 s at most
    assert len(fake.uploads) <= count + 1  # one may have been on its way


def test_a_new_layer_is_requested_when_the_number_of_clips_has_doubled(deployed, fake, clips):
    device = open_device(deployed, fake.url)
    request_counts = []
    for clip in [clips[0], clips[0], *clips[1:]]:
        device.answer(clip, QUESTION)
        request_counts.append(len(fake.uploads))
    assert request_counts == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4]  # after 1, 1 (the same clip again), 2, 3, 4, ... 8, 9 clips
    assert device._layer.anchors == 8
    mean = np.mean([device.model.encode_anchor(device.model.decode_frames(clip)) for clip in clips[:8]], axis=0)
    assert np.frombuffer(fake.uploads[-1], "<f4", offset=HEADER.size) == pytest.approx(mean, abs=1e-6)


def test_observed_clips_count_as_anchors(deployed, fake, clips):
    device = open_device(deployed, fake.url)
    for clip in clips[:5]:
        device.observe(clip)
    assert fake.uploads == []
    assert device.answer(clips[5], QUESTION).anchors == 6
    device.new_session()
    assert device.answer(clips[5], QUESTION).anchors == 1


def test_a_new_layer_needs_no_new_inference_session(deployed, fake, clips):
    device = open_device(deployed, fake.url)
    before = device.model._encoder, device.model._head
    answer = device.answer(clips[0], QUESTION)
    assert answer.origin == "adapted"
    assert (device.model._encoder, device.model._head) == before
    features = device.model.encode(device.model.decode_frames(clips[0]), device.model.tokenize(QUESTION))
    assert not np.allclose(
        device.model.compute_scores(features, device._layer.matrix),
        device.model.compute_scores(features, device.model.shared),
    )


DAMAGED_LAYERS: dict[str, Callable[[bytes], bytes]] = {
    "length: truncated": lambda layer: layer[:-1],
    "length: extended": lambda layer: layer + b"\0",
    "length: nothing": lambda layer: b"",
    "signature: unsigned": lambda layer: layer[: HEADER.size] + bytes(64) + layer[FRAMING_BYTES:],
    "signature: a bit of the body": lambda layer: layer[:-1] + bytes([layer[-1] ^ 1]),
    "encoder: of another": lambda layer: layer[:8] + bytes(16) + layer[24:],
    "generator: of another": lambda layer: layer[:24] + bytes(16) + layer[40:],
    "nonce: of another upload": lambda layer: layer[:40] + bytes(16) + layer[56:],
    "shape: another": lambda layer: layer[:56] + bytes(12) + layer[68:],
    "kind: another": lambda layer: layer[:6] + b"\0" + layer[7:],
    "message: an upload": lambda layer: layer[:5] + b"\0" + layer[6:],
    "magic: something else": lambda layer: b"%PDF" + layer[4:],
}


@pytest.mark.parametrize("defect", DAMAGED_LAYERS)
def test_a_bad_layer_is_rejected_and_the_one_in_use_stays(deployed, fake, clips, defect):
    device = open_device(deployed, fake.url)
    device.answer(clips[0], QUESTION)
    before = device._layer
    assert before.origin == "adapted"
    fake.change = lambda layer: (200, {}, DAMAGED_LAYERS[defect](layer))
    answer = device.answer(clips[1], QUESTION)
    assert defect.split(":")[0] in answer.trouble
    assert device._layer is before
    fake.answer_honestly()
    device._next_attempt = 0.0
    answer = device.answer(clips[2], QUESTION)
    assert (answer.anchors, answer.trouble) == (3, "")


def test_a_signed_layer_that_contains_nan_is_rejected(deployed, fake, clips):
    def insert_nan(layer: bytes) -> Reply:
        header, body = layer[: HEADER.size], bytearray(layer[FRAMING_BYTES:])
        body[:2] = np.array([np.nan], "<f2").tobytes()  # the first scale
        return 200, {}, header + fake.served.key.sign(build_signed_content(header, bytes(body))) + bytes(body)

    fake.change = insert_nan
    answer = open_device(deployed, fake.url).answer(clips[0], QUESTION)
    assert answer.origin == "shared"
    assert "finite" in answer.trouble


def test_requests_are_retried_while_the_cloud_is_busy(deployed, fake, clips):
    replies: list[Reply] = [(503, {"Retry-After": "0"}, b"{}"), (500, {}, b""), (429, {}, b"x")]
    fake.change = lambda layer: replies.pop(0) if replies else (200, {}, layer)
    answer = open_device(deployed, fake.url, deadline=20.0).answer(clips[0], QUESTION)
    assert (answer.origin, len(fake.uploads)) == ("adapted", 4)
    assert answer.bytes_up == 4 * 836


def test_a_refusal_is_not_retried_and_its_reason_is_reported(deployed, fake, clips):
    fake.change = lambda layer: (401, {}, b'{"error": "key", "detail": "no key that is known here"}')
    answer = open_device(deployed, fake.url, deadline=20.0).answer(clips[0], QUESTION)
    assert (answer.origin, len(fake.uploads)) == ("shared", 1)
    assert "no key that is known" in answer.trouble


@pytest.mark.parametrize("reply", ["silence", "drip", "endless", "nobody", "refused", "later than Retry-After"])
def test_an_answer_never_waits_longer_than_its_deadline(deployed, fake, clips, reply):
    url, stop = fake.url, threading.Event()
    if reply == "silence":
        fake.change = lambda layer: None
    elif reply == "later than Retry-After":
        fake.change = lambda layer: (503, {"Retry-After": "3600"}, b"")
    elif reply == "endless":
        fake.change = lambda layer: (200, {"Content-Length": str(10**12)}, bytes(10**6))
    elif reply == "nobody":
        url = "http://10.255.255.1:9"
    elif reply == "refused":
        url = "http://127.0.0.1:1"
    else:
        import socket

        server = socket.create_server(("127.0.0.1", 0))

        def drip() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 604\r\n\r\n" + bytes(604):
                    if stop.wait(0.05):
                        return
                    connection.send(bytes([byte]))

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    device = open_device(deployed, url, deadline=0.4)
    start = time.monotonic()
    answer = device.answer(clips[0], QUESTION)
    assert time.monotonic() - start < 8  # without the deadline each would take half a minute
    assert answer.origin == "shared"
    assert device.answer(clips[1], QUESTION).origin == "shared"
    assert answer.text
    stop.set()


def test_after_a_failure_the_next_questions_do_not_wait_for_the_cloud(deployed, fake, clips):
    fake.change = lambda layer: (409, {}, b"")
    device = open_device(deployed, fake.url)
    device.answer(clips[0], QUESTION)
    device._next_attempt += 60
    request_count = len(fake.uploads)
    for clip in clips[1:4]:
        assert device.answer(clip, QUESTION).trouble
    assert len(fake.uploads) == request_count


def test_a_late_layer_answers_the_next_question(deployed, fake, clips):
    released = threading.Event()

    def reply_late(layer: bytes) -> Reply:
        released.wait(20)
        return 200, {}, layer

    fake.change = reply_late
    device = open_device(deployed, fake.url, deadline=0.2)
    answer = device.answer(clips[0], QUESTION)
    assert answer.origin == "shared"
    assert "not answered yet" in answer.trouble
    assert device.answer(clips[0], QUESTION).origin == "shared"  # no second request
    released.set()
    device._request_thread.join(20)
    answer = device.answer(clips[0], QUESTION)
    assert (answer.origin, answer.trouble, len(fake.uploads)) == ("adapted", "", 1)


def test_offline_devices_use_the_last_then_the_stored_then_the_shared_layer(deployed, fake, clips, tmp_path):
    offline = "http://127.0.0.1:1"
    unconnected = open_device(deployed, offline, state=tmp_path, deadline=0.2)
    assert unconnected.answer(clips[0], QUESTION).origin == "shared"
    online = open_device(deployed, fake.url, state=tmp_path)
    assert online.answer(clips[1], QUESTION).anchors == 2  # the session resumed
    fake.close()
    online.deadline = 0.2
    for clip in clips[2:5]:
        answer = online.answer(clip, QUESTION)
        assert (answer.origin, answer.anchors) == ("adapted", 2)
    restarted = open_device(deployed, offline, state=tmp_path, deadline=0.2)
    answer = restarted.answer(clips[0], QUESTION)
    assert (answer.origin, answer.anchors) == ("kept", 2)
    assert np.array_equal(restarted._layer.matrix, online._layer.matrix)
    restarted.new_session()
    assert open_device(deployed, None, state=tmp_path).answer(clips[0], QUESTION).origin == "shared"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_stored_layer_is_not_used(deployed, fake, clips, tmp_path, damage):
    open_device(deployed, fake.url, state=tmp_path).answer(clips[0], QUESTION)
    (path,) = tmp_path.glob("layer.*.bin")
    content = path.read_bytes()
    damaged = {"truncated": content[:-9], "flipped": content[:200] + bytes([content[200] ^ 4]) + content[201:],
               "empty": b"", "foreign": b"<html>" * 100}[damage]  # fmt: skip
    path.write_bytes(damaged)
    (anchors,) = tmp_path.glob("anchors.*.f32")
    anchors.write_bytes(b"abc" if damage == "foreign" else anchors.read_bytes()[:-5])
    assert open_device(deployed, None, state=tmp_path).answer(clips[0], QUESTION).origin == "shared"


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_old_or_the_new_layer(deployed, fake, clips, tmp_path):
    device = open_device(deployed, fake.url, state=tmp_path)
    receipts = []
    device._state.save_layer = receipts.append
    for clip in clips[:2]:
        device.answer(clip, QUESTION)
    model = device.model
    layers = {
        receipt.anchors: model.install(
            decode_layer(receipt.message, receipt.upload, model.layout, model.versions, model.cloud), model.layout
        )
        for receipt in receipts
    }
    assert layers.keys() == {1, 2}
    state, generator, stored_anchors = State(tmp_path, model), random.Random(0), set()
    state.save_layer(receipts[0])
    for _ in range(40):
        child = os.fork()
        if child == 0:
            while True:
                for receipt in receipts:
                    state.save_layer(receipt)
        time.sleep(generator.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stored = State(tmp_path, model).load_layer()
        assert stored is not None
        assert np.array_equal(stored.matrix, layers[stored.anchors])
        stored_anchors.add(stored.anchors)
    assert stored_anchors == {1, 2}
    assert not list(tmp_path.glob(".*.tmp"))  # removed at the next start


def test_encoder_and_generator_of_different_versions_are_refused_by_the_cloud(deployed, clips, tmp_path):
    with Cloud(deployed / "choice" / "cloud", tmp_path / "log") as service:
        answer = open_device(deployed, service.url).answer(clips[0], QUESTION)
    assert answer.origin == "shared"
    assert "409" in answer.trouble


def test_every_sample_gets_a_new_layer_or_the_shared_one(deployed, clips, tmp_path):
    with Cloud(deployed / "sample" / "cloud", tmp_path / "log") as service:
        device = open_device(deployed, service.url, "sample", state=tmp_path, deadline=5.0)
        answers = [device.answer(clip, question) for clip in clips[:2] for question in (QUESTION, "who is it?")]
        assert [answer.origin for answer in answers] == ["adapted"] * 4
        assert all(answer.bytes_up == 836 for answer in answers)
        assert len({tuple(answer.ranked) for answer in answers}) == 4
    device.deadline = 0.2
    assert device.answer(clips[0], QUESTION).origin == "shared"
    assert open_device(deployed, None, "sample", state=tmp_path).answer(clips[0], QUESTION).origin == "shared"


def test_a_multiple_choice_takes_one_of_its_choices(deployed, clips, tmp_path):
    choices = ["red", "the man", "is it"]
    with Cloud(deployed / "choice" / "cloud", tmp_path / "log") as service:
        answer = open_device(deployed, service.url, "choice").answer(clips[0], QUESTION, choices)
    assert {text for text, _ in answer.ranked} == set(choices)
    assert answer.origin == "adapted"
    assert answer.bytes_down == FRAMING_BYTES + 4  # two coefficients and a scale
    with pytest.raises(ConfigError, match="two choices"):
        open_device(deployed, None, "choice").answer(clips[0], QUESTION, ["red"])


def test_the_key_goes_with_every_request(deployed, clips, tmp_path):
    (tmp_path / "keys").write_text("first\nsecond\n")
    with Cloud(deployed / "session" / "cloud", tmp_path / "log", "--keys", str(tmp_path / "keys")) as service:
        assert open_device(deployed, service.url, key="second").answer(clips[0], QUESTION).origin == "adapted"
        assert "401" in open_device(deployed, service.url, key="third").answer(clips[0], QUESTION).trouble


def test_several_threads_may_ask(deployed, fake, clips):
    device = open_device(deployed, fake.url)
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda c=clip: answers.append(device.answer(c, QUESTION))) for clip in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(clips)
    assert len(device._anchors) == len(clips)


@pytest.mark.parametrize("name", ["encoder.onnx", "head.onnx", "shared.bin", "tokenizer.json", "answers.json"])
def test_a_bundle_that_changed_is_refused_by_name(deployed, tmp_path, name):
    bundle = Path(shutil.copytree(deployed / "session" / "device", tmp_path / "bundle"))
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: changed"):
        DeviceModel(bundle)
    (bundle / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        DeviceModel(bundle)


def test_damaged_or_foreign_bundles_are_refused(tmp_path, deployed):
    with pytest.raises(CheckpointError, match="not a complete device bundle"):
        DeviceModel(tmp_path)
    bundle = Path(shutil.copytree(deployed / "session" / "device", tmp_path / "bundle"))
    settings = json.loads((bundle / "bundle.json").read_text())
    for wrong, message in (
        ({**settings, "format": 9}, "format 9"),
        ([], "not a complete"),
        ({"format": BUNDLE_FORMAT}, "changed since"),
        ({**settings, "files": {}}, "changed since"),
        ({**settings, "unit": "sample"}, "changed since"),
        ({name: value for name, value in settings.items() if name != "digest"}, "changed since"),
    ):
        (bundle / "bundle.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=message):
            DeviceModel(bundle)


def test_damaged_settings_are_refused(deployed, tmp_path):
    for folder, name, read in (("device", "bundle.json", read_bundle), ("cloud", "cloud.json", read_cloud_bundle)):
        bundle = Path(shutil.copytree(deployed / "session" / folder, tmp_path / folder))
        content = (bundle / name).read_bytes()
        for bit in random.Random(0).sample(range(8 * len(content)), 200):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (bundle / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name):
                read(bundle)
        for cut in range(0, len(content), 101):
            (bundle / name).write_bytes(content[:cut])
            with pytest.raises(CheckpointError, match=name):
                read(bundle)
        for wrong in (b"[" * 100_000, b"null", b"7", b"\xff\xfe", b'"text"', b"[]", b"{}"):
            (bundle / name).write_bytes(wrong)
            with pytest.raises(CheckpointError, match=name):
                read(bundle)


ODD_VALUES = (None, True, -1, 0, 2.5, 10**30, "", "x", [], [1], {}, {"x": 1})


def walk_json(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in JSON, the root first."""
    yield path
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from walk_json(inner, (*path, name))


def test_settings_of_a_wrong_type_are_refused_though_their_digest_is_right(deployed, tmp_path):
    bundle = Path(shutil.copytree(deployed / "choice" / "device", tmp_path / "bundle"))
    settings = json.loads((bundle / "bundle.json").read_text())
    del settings["digest"]
    names_in_use = {"format", "task", "unit", "layout", "encoder", "generator", "public_key", "frames", "text", "files"}
    for path in walk_json({name: settings[name] for name in names_in_use}):
        for odd_value in ODD_VALUES:
            wrong = inner = json.loads(json.dumps(settings))
            for name in path[:-1]:
                inner = inner[name]
            if path:
                inner[path[-1]] = odd_value
            else:
                wrong = {}
            (bundle / "bundle.json").write_text(json.dumps({**wrong, "digest": hash_json(wrong)}))
            with contextlib.suppress(CheckpointError):  # accepted settings must work
                DeviceModel(bundle, threads=1).encode_anchor(np.zeros((3, 32, 32, 3), np.uint8))
    del settings["files"]["shared.bin"]
    (bundle / "bundle.json").write_text(json.dumps({**settings, "digest": hash_json(settings)}))
    with pytest.raises(CheckpointError, match=r"bundle\.json.*files"):
        DeviceModel(bundle)


def test_a_choice_that_is_no_text_is_refused(deployed):
    model = DeviceModel(deployed / "choice" / "device", threads=1)
    assert len(model.tokenize("what is it?", ["a man", "red"])) == 2
    for odd in (3, None, "\udcff"):
        for question, choices in (("what is it?", ["a man", odd]), ("what is it?", [odd, "red"]), (odd, ["a", "red"])):
            with pytest.raises(ConfigError, match="is not text"):
                model.tokenize(question, choices)


def test_sizes_outside_their_range_are_refused(deployed, tmp_path):
    bundle = Path(shutil.copytree(deployed / "choice" / "device", tmp_path / "bundle"))
    settings = json.loads((bundle / "bundle.json").read_text())
    del settings["digest"]
    places = [("frames", name) for name in ("number", "candidates", "size", "side")]
    for where, name in (*places, ("text", "length"), ("text", "known"), ("layout", 1), ("layout", 2)):
        limit = 4096 if (where, name) in (*places, ("text", "length")) else 10**6
        for size, is_right in ((0, False), (-1, False), (1, True), (limit, True), (4097, limit > 4097)):
            wrong = json.loads(json.dumps(settings))
            wrong[where][name] = size
            (bundle / "bundle.json").write_text(json.dumps({**wrong, "digest": hash_json(wrong)}))
            if is_right:
                assert read_bundle(bundle)[where][name] == size
                continue
            with pytest.raises(CheckpointError, match="invalid size: not written by make export"):
                read_bundle(bundle)


def test_answers_may_hold_line_feeds(tmp_path, deployed):
    bundle = Path(shutil.copytree(deployed / "session" / "device", tmp_path / "bundle"))
    answers = ["red\ngreen", "\u2028", "", "man", "(unknown)"]
    (bundle / "answers.json").write_text(json.dumps(answers))
    settings = json.loads((bundle / "bundle.json").read_text())
    del settings["digest"]
    settings["files"]["answers.json"] = hash_file(bundle / "answers.json")
    (bundle / "bundle.json").write_text(json.dumps({**settings, "digest": hash_json(settings)}))
    assert DeviceModel(bundle).answers == answers


def test_words_outside_the_vocabulary_are_reported(deployed, clips, capsys):
    device = open_device(deployed, None)
    assert device.answer(clips[0], QUESTION).unknown_words == []
    assert device.answer(clips[0], "What is the Zebra, green zebra?").unknown_words == ["zebra", ",", "green"]
    answer = open_device(deployed, None, "choice").answer(clips[0], "", ["red", "blue"])
    assert answer.unknown_words == ["blue"]
    arguments = ["--video", str(clips[0]), "--question", "what is xyz\x1b[2J doing?"]
    assert main([str(deployed / "session" / "device"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not in this bundle's vocabulary, read as [UNK]: xyz" in printed
    assert "\x1b" not in printed


def test_a_question_that_is_no_text_is_refused(deployed, clips):
    for question in ("what is \udcff?", 7, None, b"what"):
        with pytest.raises(ConfigError, match="not text"):
            open_device(deployed, None).answer(clips[0], question)


def test_bad_questions_and_clips_are_refused(deployed, clips, tmp_path):
    device = open_device(deployed, None)
    with pytest.raises(ConfigError, match="ask one"):
        device.answer(clips[0], "  ")
    with pytest.raises(ConfigError, match="no choices"):
        device.answer(clips[0], QUESTION, ["a", "b"])
    (tmp_path / "text.mp4").write_text("not a clip")
    for wrong in (tmp_path / "absent.mp4", tmp_path / "text.mp4"):
        with pytest.raises(DataError, match=wrong.name):
            device.answer(wrong, QUESTION)
    with pytest.raises(ConfigError, match="http"):
        open_device(deployed, "localhost:8000")
    with pytest.raises(ConfigError, match="deadline"):
        open_device(deployed, None, deadline=0.0)


def test_the_command_line_prints_answers_and_returns_exit_codes(deployed, fake, clips, tmp_path, capsys):
    bundle = str(deployed / "session" / "device")
    arguments = ["--video", str(clips[0]), "--question", QUESTION]
    assert main([bundle, *arguments, "--cloud", fake.url, "--state", str(tmp_path)]) == 0
    assert "last layer: adapted, from 1 clip;" in capsys.readouterr().out
    assert main([bundle, *arguments, "--state", str(tmp_path)]) == 0
    assert "adapted earlier, loaded from disk, from 1 clip;" in capsys.readouterr().out
    assert main([bundle, "--video", str(clips[0])]) == 2
    assert main([bundle, "--video", "absent.mp4", "--question", QUESTION]) == 3
    assert main([str(tmp_path), *arguments]) == 4
    assert main([bundle, *arguments, "--cloud", "ftp://nowhere"]) == 2
    errors = capsys.readouterr().err
    assert len(re.findall(r"^(Config|Data|Checkpoint)Error: ", errors, re.MULTILINE)) == 4
    assert "Traceback" not in errors


@pytest.mark.slow
def test_the_device_runs_in_an_environment_without_torch(deployed, clips, tmp_path):
    """The package is installed with only its base dependencies, as on a device; the service is real."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = tmp_path / "pins.txt"
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    pins.write_text("\n".join(line.split("#")[0].split(";")[0].replace("[signatures]", "") for line in pinned))
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "checkpoints", "tests"))
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--constraint", pins, source], check=True)
    script = f"""
import importlib.util, sys
from cdc_mmpg.device import Device
with_cloud = Device({str(deployed / "session" / "device")!r}, sys.argv[1], state={str(tmp_path / "state")!r})
answer = with_cloud.answer({str(clips[0])!r}, {QUESTION!r})
assert answer.origin == "adapted", answer
for name in ("torch", "lightning", "timm", "transformers", "torchmetrics", "fastapi", "httpx", "requests"):
    assert importlib.util.find_spec(name) is None, name
"""
    with Cloud(deployed / "session" / "cloud", tmp_path / "log") as service:
        subprocess.run([python, "-c", script, service.url], check=True, cwd=tmp_path)


def test_clips_one_pixel_wide_or_high_take_little_memory(deployed, tmp_path):
    """Resizing before cropping would take 12 MB per frame, for nine frames."""
    device = open_device(deployed, None)
    for name, size in (("tall", (1, 4000)), ("wide", (4000, 1))):
        clip = write_clip(tmp_path / f"{name}.gif", frames=12, size=size, codec="gif")
        tracemalloc.start()
        assert device.answer(clip, QUESTION).text
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16_000_000
