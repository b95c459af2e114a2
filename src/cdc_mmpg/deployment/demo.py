"""A session of a device that training never saw, played question by question through the service and the client."""

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
from cdc_mmpg.program import exit_code, leave_on_signals

UNLABELLED_CLIPS = 2  # that the device records before every clip that it is asked about


class Question(NamedTuple):
    """A question of the person with the device, about a clip."""

    clip: str
    question: str
    answer: str  # the right one


class RecordedSession(NamedTuple):
    """The clips of one device."""

    device: str
    unlabelled: list[str]
    questions: list[Question]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play a session; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished and exported run on the embedded dataset")
    parser.add_argument("--data", type=Path, required=True, help="folder of the embedded dataset's clips")
    parser.add_argument("--device", help="whose session; an unseen one by chance, unless told")
    parser.add_argument("--bundle", default="device-int8", choices=["device", "device-int8"])
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    options = parser.parse_args(arguments)
    leave_on_signals()
    return exit_code(lambda: play(options))


def play(options: argparse.Namespace) -> None:
    """Start the service, play the session, and print every answer and the accuracy.

    Raises:
        CheckpointError: the run is not exported.
        DataError: the clips are not there, or know no such device.
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
        print(f"a session of {session.device}, a camera that training never saw: {len(session.questions)} questions\n")
        print(f"{'clips':>5}  {'question':<34} {'right':<8} {'static':<10} {'adapted':<10} {'running %':>13} "
              f"{'B up':>5} {'B down':>6} {'ms':>6}")  # fmt: skip
        right = {"static": 0, "adapted": 0}
        unlabelled, last_clip = iter(session.unlabelled), ""
        up = down = 0
        for number, (clip, question, answer) in enumerate(session.questions, 1):
            if clip != last_clip:
                for _, further in zip(range(UNLABELLED_CLIPS), unlabelled, strict=False):
                    device.observe(clip_path(options.data, further))
                last_clip = clip
            start = time.perf_counter()
            reply = device.answer(clip_path(options.data, clip), question)
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
        f"\n{count} questions: static {static:.1f} %, adapted {adapted:.1f} %; {up:,} bytes up and {down:,} down in all"
    )


def read_session(run: Path, data: Path, device: str | None, seed: int) -> RecordedSession:
    """Read the test questions of a device, and its unlabelled clips.

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
            raise ValueError("no device in it that training did not see")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{data}: not the embedded dataset, of which {run} was tested ({error})") from error
    if device is None:
        device = random.Random(seed).choice(unseen)
    elif device not in unseen:
        raise DataError(f"{device!r} is no unseen device: these are {', '.join(unseen)}")
    return RecordedSession(device, history[device], asked[device])


def clip_path(data: Path, clip: str) -> Path:
    """Return the file of a clip of the embedded dataset."""
    return data / "YouTubeClips" / f"{clip}.mp4"
