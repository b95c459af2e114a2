"""The browser as a device: the page in chromium with the real service, beside the Python device on the same clips."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import ask, choose, open_browser, open_page, read_message, wait_until, wait_until_idle

from cdc_mmpg.cloud.model import load_model
from cdc_mmpg.deployment.demo import RecordedSession, Step, write_session
from cdc_mmpg.device import Device
from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.device.page import DEMO_FOLDER, PAGE
from cdc_mmpg.media.text import TextEncoder
from cdc_mmpg.wire.messages import UPLOAD_BYTES, WeightsRejected, decode_layer, encode_layer, encode_upload
from conftest import write_clip
from deployments import Cloud, build_cloud_bundle, open_device

pytestmark = pytest.mark.slow
QUESTION = "what is the man doing?"
QUESTIONS = (QUESTION, "who is the man?", "what is red?", "is it a man?", "what is the green man doing?")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def export(deployed: Path, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of a tiny session model, with a demo of 100 questions about 20 clips."""
    folder = tmp_path_factory.mktemp("export") / "deployment"
    shutil.copytree(deployed / "session", folder)
    clips = sorted(path.name for path in (synthetic / "YouTubeClips").glob("*.mp4"))[:25]
    steps = [Step(clip) for clip in clips[20:]]
    steps += [Step(clip, question, "red") for clip in clips[:20] for question in QUESTIONS]
    write_session(RecordedSession("unseen", steps), synthetic, folder / DEMO_FOLDER)
    return folder


@pytest.fixture(scope="module")
def service(browser: Any, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """The service with the page; `browser` comes first, since it installs the page's libraries."""
    with Cloud(export / "cloud", tmp_path_factory.mktemp("log") / "log", "--web", str(export)) as cloud:
        yield cloud


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A new browser profile, without stored sessions; a message in its console is a failure."""
    opened = browser.new_context()
    opened.on("weberror", lambda error: pytest.fail(str(error.error)))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clips")
    return [write_clip(root / f"{i}.mp4", frames=8 + 3 * i, codec="libx264") for i in range(5)]


@pytest.mark.parametrize("bundle", ["device", "device-int8"])
def test_the_demo_gives_the_answers_of_the_python_device(context, service, export, bundle):
    uploads = []
    context.on("request", lambda request: uploads.append(request) if request.method == "POST" else None)
    page = open_page(context, service.url, bundle)
    page.click("#demo-play")
    wait_until_idle(page)
    record = json.loads(page.text_content("#demo-record"))
    rows = record["rows"]
    assert record["finished"]

    device = Device(export / bundle, service.url, threads=1)
    ours = []
    for clip, question, _ in read_steps(export):
        path = export / DEMO_FOLDER / clip
        if question:
            ours.append(device.answer(path, question))
        else:
            device.observe(path)
    assert len(rows) == len(ours) == 100
    assert sum(row["text"] == answer.text for row, answer in zip(rows, ours, strict=True)) >= 95
    assert sum(row["unadapted"] == answer.unadapted for row, answer in zip(rows, ours, strict=True)) >= 95
    for row, answer in zip(rows, ours, strict=True):
        expected = (answer.origin, answer.anchors, answer.bytes_up, answer.bytes_down, answer.trouble)
        assert (row["origin"], row["anchors"], row["bytesUp"], row["bytesDown"], row["trouble"]) == expected
    assert {len(request.post_data_buffer) for request in uploads} == {UPLOAD_BYTES}
    assert {request.url for request in uploads} == {f"{service.url}/v1/layer"}
    assert len(uploads) == sum(answer.bytes_up > 0 for answer in ours)


def read_steps(export: Path) -> list[Step]:
    """Return the steps of an export's demo."""
    steps = json.loads((export / DEMO_FOLDER / "session.json").read_text())["steps"]
    return [Step(**step) for step in steps]


def test_the_demo_opens_a_page_and_ends_its_service(context, export, synthetic, tmp_path):
    """The command, with the folders that a run on the synthetic dataset leaves."""
    run = tmp_path / "cdc_mmpg_session" / "seed0"
    shutil.copytree(export, run / "deployment")
    (run / "deployment" / "export.json").write_text("{}")
    owners = json.loads((synthetic / "devices.json").read_text())
    rows = [
        f"{name},{row['device']},unseen,,what is it?,red,red,r" for name, row in owners.items() if row["role"] == "test"
    ]
    (run / "predictions.test.csv").write_text(
        "\n".join(["clip,device,group,type,question,answer,n16,right", *rows]) + "\n"
    )
    device = next(row["device"] for row in owners.values() if row["role"] == "test")
    command = [sys.executable, "-m", "cdc_mmpg", "demo", str(run), "--data", str(synthetic), "--device", device]
    environment = {**os.environ, "BROWSER": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        address = process.stdout.readline()
        assert "opened in your browser. Ctrl-C ends the service." in address
        url = address.partition("/?")[0]
        page = open_page(context, url)
        assert device in page.text_content("#demo-about")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
        pass


def test_a_session_survives_a_reload_and_an_outage(context, service, clips):
    page = open_page(context, service.url)
    first = ask(page, clips[0], QUESTION)
    assert (first["origin"], first["anchors"], first["bytesUp"], first["trouble"]) == ("adapted", 1, 836, "")
    context.route("**/v1/layer", lambda route: route.abort())
    second = ask(page, clips[1], QUESTION)
    assert (second["origin"], second["anchors"]) == ("adapted", 1)
    assert "the cloud has not answered yet" in second["trouble"]
    assert second["trouble"] in page.text_content("#answer-trouble")
    page.reload()
    wait_until_idle(page)
    assert "2 clips" in page.text_content("#session")
    third = ask(page, clips[1], QUESTION)  # known: the session does not grow
    assert (third["origin"], third["anchors"], third["text"]) == ("kept", 1, second["text"])
    context.unroute("**/v1/layer")
    page.reload()
    wait_until_idle(page)
    assert (ask(page, clips[1], QUESTION)["origin"], page.text_content("#message")) == ("adapted", "Answered.")
    page.click("#new-session")
    wait_until_idle(page)
    page.uncheck("#use-cloud") if page.is_visible("#use-cloud") else page.evaluate(
        "document.getElementById('use-cloud').click()"
    )
    assert ask(page, clips[2], QUESTION)["origin"] == "shared"


def test_no_upload_follows_a_new_session_or_a_cloud_that_is_switched_off(console, clips):
    console.set_input_files("#file", str(clips[0]))
    console.route("**/v1/layer", lambda route: route.abort())
    before, after = console.evaluate(
        """async (question) => {
          const { Device } = await import("./device.js");
          const post = window.fetch;
          let sent = 0;
          window.fetch = (url, ...rest) => (sent += String(url).includes("v1/layer"), post(url, ...rest));
          const counts = [[], []];
          for (const stop of [(device) => device.newSession(), (device) => (device.cloud = null)]) {
            const device = await Device.open("device/", ".", { deadline: 1 });
            await device.answer(document.getElementById("file").files[0], question);
            await stop(device);
            counts[0].push(sent);
            await new Promise((resolve) => setTimeout(resolve, 2500)); // the next would follow after 2.4 s at most
            counts[1].push(sent);
            await device.close();
          }
          return counts;
        }""",
        QUESTION,
    )
    assert min(before) > 1
    assert before == after


def test_a_damaged_record_and_a_failed_deletion_do_no_harm(context, service, clips):
    store = """(record) => new Promise((resolve) => {
      indexedDB.open("cdc-mmpg").onsuccess = (event) => {
        const records = event.target.result.transaction("sessions", "readwrite").objectStore("sessions");
        records.getAllKeys().onsuccess = ({ target }) => target.result.forEach((key) => records.put(record, key));
        records.transaction.oncomplete = resolve;
      };
    })"""
    page = open_page(context, service.url)
    ask(page, clips[0], QUESTION)
    for record in ({"session": "", "anchors": None}, {"session": "", "anchors": [[1]], "receipt": {"message": 3}}, 7):
        page.evaluate(store, record)
        page.reload()
        wait_until_idle(page)
        assert page.text_content("#model-name") == "test/cdc_mmpg_session", record
    page.click("#new-session")
    wait_until_idle(page)
    ask(page, clips[0], QUESTION)
    page.evaluate(
        """const put = IDBObjectStore.prototype.put;
        IDBObjectStore.prototype.put = () => { IDBObjectStore.prototype.put = put; throw new Error("full"); };
        null"""
    )
    page.click("#new-session")
    wait_until_idle(page)
    assert "not stored in this browser (full)" in page.text_content("#storage-trouble")
    ask(page, clips[1], QUESTION)  # the next write begins the session
    assert not page.is_visible("#storage-trouble")
    page.reload()
    wait_until_idle(page)
    assert ask(page, clips[1], QUESTION)["anchors"] == 1


def test_the_page_works_without_a_network(context, service, clips):
    page = open_page(context, service.url)
    wait_until(page, "navigator.serviceWorker.controller !== null")
    wait_until(page, "caches.open('cdc-mmpg').then(async (kept) => (await kept.keys()).length > 25)")
    context.set_offline(True)
    page.reload()
    wait_until_idle(page)
    answer = ask(page, clips[0], QUESTION)
    assert answer["origin"] == "shared"
    assert "Failed to fetch" in answer["trouble"]


def test_a_tampered_reply_is_refused(context, service, clips):
    places = iter((3, 8, 30, 45, 57, 100, -1))

    def tamper(route: Any) -> None:
        reply = route.fetch()
        body = bytearray(reply.body())
        body[next(places)] ^= 1
        route.fulfill(response=reply, body=bytes(body))

    context.route("**/v1/layer", tamper)
    page = open_page(context, service.url)
    for reason in ("magic", "encoder", "generator", "nonce", "shape", "signature", "signature"):
        page.click("#new-session")
        wait_until_idle(page)
        answer = ask(page, clips[0], QUESTION)
        assert (answer["origin"], answer["text"]) == ("shared", answer["unadapted"])
        assert f"the layer from the cloud was rejected ({reason}:" in answer["trouble"]


def test_a_reply_that_ends_early_is_refused(context, service, clips):
    context.route("**/v1/layer", lambda route: route.fulfill(response=(r := route.fetch()), body=r.body()[:200]))
    answer = ask(open_page(context, service.url), clips[0], QUESTION)
    assert (answer["origin"], "length" in answer["trouble"]) == ("shared", True)


def test_bad_input_is_a_sentence_and_the_page_goes_on(context, service, clips, tmp_path):
    page = open_page(context, service.url)
    text, empty, avi = tmp_path / "notes.mp4", tmp_path / "empty.mp4", tmp_path / "old.avi"
    text.write_text("not a video")
    empty.touch()
    write_clip(avi)
    huge = tmp_path / "huge.mp4"
    with huge.open("wb") as file:
        file.truncate(4 * 2**30)
    for clip, message in (
        (text, "notes.mp4 is not a video"),
        (empty, "empty.mp4 is an empty file"),
        (avi, "use MP4, MOV, WebM or Matroska (not AVI or GIF)"),
        (huge, "huge.mp4 has 4096 MiB, more than 512: cut a shorter clip."),
        (write_clip(tmp_path / "mpeg4.mp4"), "which this browser cannot decode: use H.264, VP9 or AV1"),
    ):
        ask(page, clip, QUESTION)
        assert message in read_message(page), clip
    assert ask(page, write_clip(tmp_path / "one.mp4", frames=1, codec="libx264"), QUESTION)["origin"] == "adapted"
    answer = ask(page, clips[0], "\N{GRINNING FACE}\N{GRINNING FACE}?")
    assert answer["unknownWords"] == ["\N{GRINNING FACE}\N{GRINNING FACE}"]
    ask(page, clips[0], "   ")
    assert "Type a question first." in read_message(page)
    page.click("#camera")  # the profile has no permission
    wait_until_idle(page)
    assert "camera" in read_message(page).lower()
    assert ask(page, clips[1], QUESTION)["text"]


def test_a_service_of_another_export_is_named(context, service, clips, export, tmp_path):
    build_cloud_bundle(tmp_path / "cloud", outputs=5, seed=3)
    with Cloud(tmp_path / "cloud", tmp_path / "log", "--web", str(export)) as other:
        answer = ask(open_page(context, other.url), clips[0], QUESTION)
    assert answer["origin"] == "shared"
    assert "409" in answer["trouble"]
    assert "use device and cloud bundles of the same export" in answer["trouble"]


def test_a_damaged_bundle_and_an_old_one_are_named(context, service, export):
    context.route("**/device/head.onnx", lambda route: route.fulfill(response=route.fetch(), body=b"damaged"))
    page = open_page(context, service.url)
    assert "head.onnx was changed since the export" in page.text_content("#load-error")
    settings = json.loads((export / "device" / "bundle.json").read_text())
    for wrong, message in (
        ({"format": 2}, "has format 2, this page reads format 3"),
        ({"name": "x"}, "bundle.json was changed since the export"),
    ):
        body = json.dumps(settings | wrong)
        context.unroute("**/device/bundle.json")
        context.route("**/device/bundle.json", lambda route, _, body=body: route.fulfill(body=body))
        assert message in open_page(context, service.url).text_content("#load-error")


def test_plain_http_is_explained(context, service):
    page = open_page(context, f"http://lab.example:{service.port}")
    assert page.is_visible("#insecure")
    assert "start the service with CERTIFICATE=" in page.text_content("#insecure")
    assert "Use https" in read_message(page)


def test_a_page_of_another_origin_needs_to_be_listed(console, service, export, clips, tmp_path):
    console.set_input_files("#file", str(clips[0]))
    code = """async ([cloud, question]) => {
      const { Device } = await import("./device.js");
      const device = await Device.open("device/", cloud);
      const { frame, ...answer } = await device.answer(document.getElementById("file").files[0], question);
      return answer;
    }"""
    refused = console.evaluate(code, [service.url.replace("127.0.0.1", "localhost"), QUESTION])
    assert (refused["origin"], refused["trouble"]) == ("shared", "the cloud has not answered yet (Failed to fetch)")
    with Cloud(export / "cloud", tmp_path / "log", "--origin", service.url) as other:
        answer = console.evaluate(code, [other.url, QUESTION])
    assert (answer["origin"], answer["trouble"]) == ("adapted", "")
    assert answer["milliseconds"]["generate"] > 0  # the header of the times is readable there, too


def test_denied_storage_is_said_and_the_page_goes_on(context, service, clips):
    context.add_init_script("indexedDB.open = () => { throw new DOMException('denied by a test'); }")
    page = open_page(context, service.url)
    assert ask(page, clips[0], QUESTION)["origin"] == "adapted"
    assert "The session is not stored in this browser (denied by a test)" in page.text_content("#storage-trouble")


def test_the_camera_records_a_clip(browser, service):
    context = browser.new_context(permissions=["camera"])
    page = open_page(context, service.url)
    page.click("#camera")
    page.wait_for_selector("#camera-close")  # the camera is open
    page.click("#camera")
    wait_until_idle(page)
    assert ask(page, None, QUESTION)["origin"] == "adapted"
    context.close()


def test_another_clip_is_added_without_a_question(context, service, clips):
    page = open_page(context, service.url)
    choose(page, *clips[:3])
    page.click("#observe")
    wait_until_idle(page)
    assert ask(page, None, QUESTION)["anchors"] == 3
    assert page.locator("#thumbnails canvas").count() == 3


def test_nothing_is_cut(context, service, clips):
    page = open_page(context, service.url)
    for question in ("", QUESTION, "x" * 500):
        if question:
            ask(page, clips[0], question)
        for width in (320, 390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_choices_and_samples_are_served_too(context, browser, deployed, clips, tmp_path):
    for kind, choices in (("choice", ["a man", "red"]), ("sample", [])):
        with Cloud(deployed / kind / "cloud", tmp_path / kind, "--web", str(deployed / kind)) as cloud:
            page = open_page(context, cloud.url)
            if choices:
                page.fill("#choices", "\n".join(choices))
            answer = ask(page, clips[0], QUESTION)
            ours = open_device(deployed, cloud.url, kind).answer(clips[0], QUESTION, choices)
            assert (answer["text"], answer["unadapted"], answer["origin"], answer["bytesDown"]) == (
                ours.text, ours.unadapted, "adapted", ours.bytes_down
            )  # fmt: skip
            assert answer["ranked"][0][1] == pytest.approx(ours.ranked[0][1], abs=1e-3)


@pytest.fixture
def console(context: Any, service: Cloud) -> Any:
    """A page of the service's origin without its policy, but with a file input, to call the modules in."""
    page = context.new_page()
    page.goto(f"{service.url}/ready")
    page.evaluate("document.body.append(Object.assign(document.createElement('input'), {type: 'file', id: 'file'}))")
    return page


def test_frames_are_those_of_the_python_device(console, export, synthetic, clips, tmp_path):
    wide = write_clip(tmp_path / "wide.mp4", size=(640, 96), codec="libx264")
    odd = write_clip(tmp_path / "odd.mp4", size=(98, 74), codec="libx264")
    webm = write_clip(tmp_path / "clip.webm", codec="libvpx-vp9")
    paths = [wide, odd, webm, *clips[:2], *sorted((synthetic / "YouTubeClips").glob("*.mp4"))[:3]]
    paths += sorted((export / DEMO_FOLDER).glob("*.mp4"))[:3]
    if real := os.environ.get("CDC_MMPG_REAL"):
        paths += sorted(Path(real).glob("msrvtt/videos/*.mp4"))[:3]
    model = DeviceModel(export / "device", threads=1)
    for path in paths:
        console.set_input_files("#file", str(path))
        theirs = console.evaluate(
            """async (settings) => {
              const { decodeFrames } = await import("./media.js");
              return Array.from(await decodeFrames(document.getElementById("file").files[0], settings));
            }""",
            model._frames,
        )
        ours = model.decode_frames(path)
        difference = np.abs(np.array(theirs).reshape(ours.shape) - ours)
        # Of 255 levels: FFmpeg's integers are rounded at other places, and very wide frames are converted to RGB twice.
        assert difference.mean() < (2 if path == wide else 0.05), path
        assert difference.max() <= 3, path


def test_questions_have_the_ids_of_the_python_tokenizer(console, export, real):
    """All questions of the real samples, with bert-base-uncased's vocabulary."""
    from tokenizers.implementations import BertWordPieceTokenizer

    vocab = real.parent / "vocab" / "vocab.txt"
    tokenizer = BertWordPieceTokenizer(str(vocab), lowercase=True)
    texts = sorted({row["question"] for row in json.loads((real / "msvd" / "test_qa.json").read_text())})
    texts += [
        "Où est le café?",
        "他在做什么?",
        "a\N{ZERO WIDTH SPACE}b",
        "\N{GRINNING FACE} x",
        "it's 3.5%!",
        "",
        "[MASK] x",
    ]
    encoder = TextEncoder(vocab, 24, 20_000)
    theirs = console.evaluate(
        """async ([content, texts]) => {
          const { QuestionEncoder } = await import("./tokenizer.js");
          const encoder = new QuestionEncoder(new TextEncoder().encode(content), 24, 20000);
          return texts.map((text) => encoder.encode(text));
        }""",
        [tokenizer._tokenizer.to_str(), texts],
    )
    assert theirs == encoder(texts)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "low_rank", "basis"])
def test_layers_of_every_kind_are_decoded_to_the_same_numbers(console, tmp_path, kind):
    build_cloud_bundle(tmp_path / "cloud", "basis" if kind == "basis" else "low_rank")
    served = load_model(tmp_path / "cloud")
    layout = next(layout for layout in served.layouts if layout.kind == kind)
    generator = np.random.default_rng(0)
    upload = encode_upload(generator.uniform(-1, 1, 192).astype(np.float32), layout, served.versions)
    matrices = [generator.normal(size=shape).astype(np.float32) for shape in layout.shapes]
    message = encode_layer(matrices, upload, layout, served.versions, served.key)
    ours = decode_layer(message, upload, layout, served.versions, served.key.public_key())
    key = served.key.public_key().public_bytes_raw()
    places = [*range(4, len(message), max(1, len(message) // 40)), len(message) - 1]
    theirs, refused = console.evaluate(
        """async ({ message, upload, layout, encoder, generator, key, places }) => {
          const { WeightsRejected, countMessageBytes, decodeLayer } = await import("./wire.js");
          const bytes = (values) => new Uint8Array(values);
          const versions = { encoder: bytes(encoder), generator: bytes(generator) };
          const cloud = await crypto.subtle.importKey("raw", bytes(key), "Ed25519", false, ["verify"]);
          const decode = (content) => decodeLayer(content, bytes(upload), layout, versions, cloud);
          const matrices = await decode(bytes(message));
          let refused = 0;
          for (const place of places) {
            const changed = bytes(message);
            changed[place] ^= 4;
            await decode(changed).catch((error) => (refused += error instanceof WeightsRejected));
          }
          return [matrices.map((matrix) => Array.from(matrix.values)), refused];
        }""",
        {"message": list(message), "upload": list(upload), "layout": layout._asdict(), "key": list(key),
         "encoder": list(served.versions.encoder), "generator": list(served.versions.generator), "places": places},
    )  # fmt: skip
    assert refused == len(places)
    for matrix, values in zip(ours, theirs, strict=True):
        assert np.array_equal(matrix.ravel(), np.array(values, np.float32))
    with pytest.raises(WeightsRejected):
        decode_layer(message[:-1] + b"\0", upload, layout, served.versions, served.key.public_key())


def test_the_page_has_no_inline_code_and_names_no_host():
    for path in [*PAGE.glob("*.*"), *PAGE.glob("page/*")]:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".html":
            assert "<style" not in content
            assert not [line for line in content.splitlines() if " style=" in line or " onclick=" in line]
        if path.name != "package-lock.json":  # which names the page of a package's sponsors
            assert not re.search(r"https?://[a-z]", content.replace("http://www.w3.org/2000/svg", "")), path
    lock = json.loads((PAGE / "package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
