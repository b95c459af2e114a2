"""Demo: the session of a device unseen in training, played in the browser or question by question in the terminal."""

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from cdc_mmpg.deployment.bundle_files import describe_bundles
from cdc_mmpg.deployment.local import LocalService
from cdc_mmpg.device import Device
from cdc_mmpg.device.page import DEMO_FILE, DEMO_FOLDER, DEVICE_FOLDERS, install
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.evaluation.answers import read_answers
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import Stopped, exit_on_signals, run_to_exit_code
from cdc_mmpg.results import PREDICTIONS, write_json
from cdc_mmpg.training.wandb_record import Subject, start_record

# Columns of the table of a session's answers in W&B.
ANSWER_COLUMNS = ("clip", "question", "answer", "static", "adapted", "clips", "bytes up", "bytes down", "ms")
UNLABELLED_CLIPS = 2  # number of clips that the device records before each clip with questions
# Decoders of phones refuse small frames and full colour resolution. Enlarged by this, a pixel has its own chroma.
ENLARGEMENT = 4


class Step(NamedTuple):
    """One step of a session: a clip that is only observed, or a question about a clip."""

    clip: str  # name of the file
    question: str = ""  # "" to observe
    answer: str = ""  # correct answer


class RecordedSession(NamedTuple):
    """Clips and questions of one device."""

    device: str
    steps: list[Step]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play a session; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished, exported run on the synthetic dataset")
    parser.add_argument("--data", type=Path, required=True, help="folder of the synthetic dataset's clips")
    parser.add_argument("--device", help="device of the session; default: a random unseen one")
    parser.add_argument("--terminal", action="store_true", help="play in the terminal instead of the browser")
    parser.add_argument("--port", type=int, default=0, help="port of the service; default: a free one")
    parser.add_argument(
        "--bundle",
        default="device-int8",
        choices=DEVICE_FOLDERS.values(),
        help="bundle of the export; default: device-int8",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice")
    options = parser.parse_args(arguments)
    exit_on_signals()
    return run_to_exit_code(lambda: play(options))


def play(options: argparse.Namespace) -> None:
    """Write the session's clips, start the service, and play the session.

    Raises:
        CheckpointError: the run is not exported.
        DataError: the clips are missing, or the device is not an unseen one.
        ConfigError: the page's libraries cannot be installed.
        CDCError: the service does not start.
    """
    bundles = options.run / "deployment"
    if not (bundles / "export.json").is_file():
        raise CheckpointError(f"{options.run}: not exported: make export METHOD={options.run.parent.name}")
    session = read_session(options.run, options.data, options.device, options.seed)
    write_session(session, options.data, bundles / DEMO_FOLDER)
    web = [] if options.terminal else ["--web", str(bundles)]
    if web:
        install()
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalService(bundles / "cloud", Path(scratch) / "service.log", *web, port=options.port) as service,
    ):
        if options.terminal:
            answers = play_in_terminal(session, bundles, options.bundle, service.url)
            record_session(options.run, bundles, {"device": session.device, "bundle": options.bundle}, answers)
        else:
            address = f"{service.url}/?bundle={options.bundle}"
            opened = "opened in your browser" if webbrowser.open(address) else "open it in a browser"
            print(f"{address}: {opened}. Ctrl-C ends the service.", flush=True)
            with suppress(Stopped):
                signal.pause()


def record_session(
    run: Path, bundles: Path, config: dict[str, str], answers: Sequence[Sequence[str | int | float]]
) -> None:
    """Record a session of the terminal in W&B: the bundles that it used, and its answers, at least one."""
    record = start_record(bundles, Subject.of_run(run, "demo"), config)
    if record.run is None:
        return
    record.use(describe_bundles(run, bundles))
    record.log_table("demo/answers", ANSWER_COLUMNS, answers)
    columns = dict(zip(ANSWER_COLUMNS, zip(*answers, strict=True), strict=True))
    for place in ("static", "adapted"):
        right = [given == answer for given, answer in zip(columns[place], columns["answer"], strict=True)]
        record.summarise({f"demo/{place}": sum(right) / len(right)})
    record.end()


def play_in_terminal(session: RecordedSession, bundles: Path, bundle: str, url: str) -> list[list[str | int | float]]:
    """Play a session with the Python client; print every answer and the accuracy; return rows of `ANSWER_COLUMNS`."""
    device = Device(bundles / bundle, url, deadline=5.0)
    count = sum(bool(step.question) for step in session.steps)
    print(f"cloud: {url}, device: {bundles / bundle}, {device.model.layout.kind} layers")
    print(f"session of {session.device}, a camera unseen in training: {count} questions\n")
    print(f"{'clips':>5}  {'question':<34} {'right':<8} {'static':<10} {'adapted':<10} {'running %':>13} "
          f"{'B up':>5} {'B down':>6} {'ms':>6}")  # fmt: skip
    right, number, up, down = {"static": 0, "adapted": 0}, 0, 0, 0
    answers: list[list[str | int | float]] = []
    for clip, question, answer in session.steps:
        path = bundles / DEMO_FOLDER / clip
        if not question:
            device.observe(path)
            continue
        start = time.perf_counter()
        reply = device.answer(path, question)
        milliseconds = 1000 * (time.perf_counter() - start)
        right["static"] += reply.unadapted == answer
        right["adapted"] += reply.text == answer
        number, up, down = number + 1, up + reply.bytes_up, down + reply.bytes_down
        answers.append([clip, question, answer, reply.unadapted, reply.text, reply.anchors, reply.bytes_up,
                        reply.bytes_down, milliseconds])  # fmt: skip
        marked = [f"{text} {'✓' if text == answer else '✗'}" for text in (reply.unadapted, reply.text)]
        running = " → ".join(f"{100 * value / number:.0f}" for value in right.values())
        print(f"{reply.anchors:>5}  {question:<34} {answer:<8} {marked[0]:<10} {marked[1]:<10} {running:>13} "
              f"{reply.bytes_up or '':>5} {reply.bytes_down or '':>6} {milliseconds:>6.1f}"
              + (f"  ({reply.trouble})" if reply.trouble else ""), flush=True)  # fmt: skip
    device.close()
    static, adapted = (100 * value / count for value in right.values())
    print(
        f"\n{count} questions: static {static:.1f} %, adapted {adapted:.1f} %; in total {up:,} bytes up, {down:,} down"
    )
    return answers


def read_session(run: Path, data: Path, device: str | None, seed: int) -> RecordedSession:
    """Read the test questions and the unlabelled clips of a device, in the order in which they are played.

    Raises:
        DataError: the clips are missing, or the device is not an unseen one.
    """
    try:
        asked = read_answers(run / PREDICTIONS).asked
        rows = list(zip(*(asked[name] for name in ("clip", "device", "group", "question", "answer")), strict=True))
        clips = json.loads((data / "devices.json").read_text(encoding="utf-8"))
        unseen = sorted({owner for _, owner, group, *_ in rows if group == "unseen"})
        if not unseen:
            raise ValueError("it has no device unseen in training")
        if device is None:
            device = random.Random(seed).choice(unseen)
        elif device not in unseen:
            raise DataError(f"{device!r} is not an unseen device: choose from {', '.join(unseen)}")
        unlabelled = [name for name, row in clips.items() if row["device"] == device and row["role"] == "history"]
        steps = [Step(f"{clip}.mp4", question, answer) for clip, owner, _, question, answer in rows if owner == device]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{data}: not the synthetic dataset on which {run} was tested ({error})") from error
    return RecordedSession(device, list(interleave(unlabelled, steps)))


def interleave(unlabelled: Sequence[str], asked: Sequence[Step]) -> Iterator[Step]:
    """Yield the questions, and before those about a new clip `UNLABELLED_CLIPS` clips that are only observed."""
    remaining, last_clip = iter(unlabelled), ""
    for step in asked:
        if step.clip != last_clip:
            for _, name in zip(range(UNLABELLED_CLIPS), remaining, strict=False):
                yield Step(f"{name}.mp4")
            last_clip = step.clip
        yield step


def write_session(session: RecordedSession, data: Path, out: Path) -> None:
    """Write a session's clips and steps, as files that browsers and phones decode.

    Raises:
        DataError: a clip is missing or damaged.
        CDCError: a file cannot be written.
    """
    if out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    for clip in dict.fromkeys(step.clip for step in session.steps):
        enlarge_clip(data / "YouTubeClips" / clip, out / clip)
    steps = [{name: value for name, value in step._asdict().items() if value} for step in session.steps]
    write_json({"device": session.device, "steps": steps}, out / DEMO_FILE)


def enlarge_clip(source: Path, target: Path) -> None:
    """Write a clip `ENLARGEMENT` times as large, as H.264 with the colour resolution that browsers decode.

    Raises:
        DataError: the clip is missing or damaged.
        CDCError: the file cannot be written.
    """
    try:
        with av.open(str(source)) as container:
            rate = container.streams.video[0].average_rate
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{source}: cannot be decoded ({error}): run make data") from error
    with atomic_write(target) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "10"})
        stream.height, stream.width = (ENLARGEMENT * length for length in frames[0].shape[:2])
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            large = np.repeat(np.repeat(pixels, ENLARGEMENT, axis=0), ENLARGEMENT, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
        container.mux(stream.encode())
