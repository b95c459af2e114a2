"""Demo: the session of a device unseen in training, replayed question by question with service and client."""

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.deployment.local import LocalService
from cdc_mmpg.device import Device
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.program import exit_on_signals, run_to_exit_code

UNLABELLED_CLIPS = 2  # number of clips that the device records before each clip with questions


class Question(NamedTuple):
    """A user's question about a clip."""

    clip: str
    question: str
    answer: str  # correct answer


class RecordedSession(NamedTuple):
    """Clips and questions of one device."""

    device: str
    unlabelled: list[str]
    questions: list[Question]


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a session; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished, exported run on the synthetic dataset")
    parser.add_argument("--data", type=Path, required=True, help="folder of the synthetic dataset's clips")
    parser.add_argument("--device", help="device of the session; default: a random unseen one")
    parser.add_argument(
        "--bundle",
        default="device-int8",
        choices=["device", "device-int8"],
        help="bundle of the export; default: device-int8",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice")
    options = parser.parse_args(arguments)
    exit_on_signals()
    return run_to_exit_code(lambda: play(options))


def play(options: argparse.Namespace) -> None:
    """Start the service, replay the session, and print every answer and the accuracy.

    Raises:
        CheckpointError: the run is not exported.
        DataError: the clips are missing, or the device is not an unseen one.
        CDCError: the service does not start.
    """
    session = read_session(options.run, options.data, options.device, options.seed)
    bundles = options.run / "deployment"
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalService(bundles / "cloud", Path(scratch) / "service.log") as service,
    ):
        device = Device(bundles / options.bundle, service.url, deadline=5.0)
        print(f"cloud: {service.url}, device: {bundles / options.bundle}, {device.model.layout.kind} layers")
        print(f"session of {session.device}, a camera unseen in training: {len(session.questions)} questions\n")
        print(f"{'clips':>5}  {'question':<34} {'right':<8} {'static':<10} {'adapted':<10} {'running %':>13} "
              f"{'B up':>5} {'B down':>6} {'ms':>6}")  # fmt: skip
        right = {"static": 0, "adapted": 0}
        unlabelled, last_clip = iter(session.unlabelled), ""
        up = down = 0
        for number, (clip, question, answer) in enumerate(session.questions, 1):
            if clip != last_clip:
                for _, clip_name in zip(range(UNLABELLED_CLIPS), unlabelled, strict=False):
                    device.observe(locate_clip(options.data, clip_name))
                last_clip = clip
            start = time.perf_counter()
            reply = device.answer(locate_clip(options.data, clip), question)
            milliseconds = 1000 * (time.perf_counter() - start)
            right["static"] += reply.unadapted == answer
            right["adapted"] += reply.text == answer
            up, down = up + reply.bytes_up, down + reply.bytes_down
            marked = [f"{text} {'✓' if text == answer else '✗'}" for text in (reply.unadapted, reply.text)]
            running = " → ".join(f"{100 * count / number:.0f}" for count in right.values())
            print(f"{reply.anchors:>5}  {question:<34} {answer:<8} {marked[0]:<10} {marked[1]:<10} {running:>13} "
                  f"{reply.bytes_up or '':>5} {reply.bytes_down or '':>6} {milliseconds:>6.1f}"
                  + (f"  ({reply.trouble})" if reply.trouble else ""), flush=True)  # fmt: skip
        device.close()
    count = len(session.questions)
    static, adapted = (100 * value / count for value in right.values())
    print(
        f"\n{count} questions: static {static:.1f} %, adapted {adapted:.1f} %; in total {up:,} bytes up, {down:,} down"
    )


def read_session(run: Path, data: Path, device: str | None, seed: int) -> RecordedSession:
    """Read the test questions and the unlabelled clips of a device.

    Raises:
        CheckpointError, DataError: see `play`.
    """
    if not (run / "deployment" / "export.json").is_file():
        raise CheckpointError(f"{run}: not exported: make export METHOD={run.parent.name}")
    try:
        with (run / "predictions.test.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        clips = json.loads((data / "devices.json").read_text(encoding="utf-8"))
        unseen = sorted({row["device"] for row in rows if row["group"] == "unseen"})
        history = {
            owner: [clip for clip, row in clips.items() if row["device"] == owner and row["role"] == "history"]
            for owner in unseen
        }
        asked = {
            owner: [Question(row["clip"], row["question"], row["answer"]) for row in rows if row["device"] == owner]
            for owner in unseen
        }
        if not unseen:
            raise ValueError("it has no device unseen in training")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{data}: not the synthetic dataset on which {run} was tested ({error})") from error
    if device is None:
        device = random.Random(seed).choice(unseen)
    elif device not in unseen:
        raise DataError(f"{device!r} is not an unseen device: choose from {', '.join(unseen)}")
    return RecordedSession(device, history[device], asked[device])


def locate_clip(data: Path, clip: str) -> Path:
    """Return the path of a clip of the synthetic dataset."""
    return data / "YouTubeClips" / f"{clip}.mp4"
