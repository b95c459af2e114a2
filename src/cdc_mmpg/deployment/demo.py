"""A session of a device that training never saw, played question by question through the service and the client."""

import argparse
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2

from cdc_mmpg.device import Device
from cdc_mmpg.errors import CDCError, CheckpointError, DataError
from cdc_mmpg.program import exit_code, leave_on_signals

START_SECONDS = 60.0  # that a service may take to be ready
BEFORE = 2  # unlabelled clips that the device records before every clip that it is asked about


class Question(NamedTuple):
    """What the person with the device asks."""

    clip: str
    question: str
    answer: str  # the right one


class Session(NamedTuple):
    """The clips of one device."""

    device: str
    unlabelled: list[str]
    questions: list[Question]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play a session; returns the exit code (see `errors`)."""
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
    """Start the service, play the session, say what became of it.

    Raises:
        CheckpointError: the run is not exported.
        DataError: the clips are not there, or know no such device.
        CDCError: the service does not start.
    """
    session = session_of(options.run, options.data, options.device, options.seed)
    bundles = options.run / "deployment"
    with service(bundles / "cloud") as url:
        device = Device(bundles / options.bundle, url, deadline=5.0)
        print(f"cloud: {url}, device: {bundles / options.bundle}, {device.model.layout.kind} layers")
        print(f"a session of {session.device}, a camera that training never saw: {len(session.questions)} questions\n")
        print(f"{'clips':>5}  {'question':<34} {'right':<8} {'static':<10} {'adapted':<10} {'running %':>13} "
              f"{'B up':>5} {'B down':>6} {'ms':>6}")  # fmt: skip
        right = {"static": 0, "adapted": 0}
        unlabelled, before = iter(session.unlabelled), ""
        up = down = 0
        for number, (clip, question, answer) in enumerate(session.questions, 1):
            if clip != before:
                for _, further in zip(range(BEFORE), unlabelled, strict=False):
                    device.observe(path_of(options.data, further))
                before = clip
            start = time.perf_counter()
            found = device.answer(path_of(options.data, clip), question)
            milliseconds = 1000 * (time.perf_counter() - start)
            right["static"] += found.unadapted == answer
            right["adapted"] += found.text == answer
            up, down = up + found.bytes_up, down + found.bytes_down
            said = [f"{text} {'✓' if text == answer else '✗'}" for text in (found.unadapted, found.text)]
            running = " → ".join(f"{100 * count / number:.0f}" for count in right.values())
            print(f"{found.anchors:>5}  {question:<34} {answer:<8} {said[0]:<10} {said[1]:<10} {running:>13} "
                  f"{found.bytes_up or '':>5} {found.bytes_down or '':>6} {milliseconds:>6.1f}"
                  + (f"  ({found.trouble})" if found.trouble else ""), flush=True)  # fmt: skip
        device.close()
    count = len(session.questions)
    static, adapted = (100 * value / count for value in right.values())
    print(
        f"\n{count} questions: static {static:.1f} %, adapted {adapted:.1f} %; {up:,} bytes up and {down:,} down in all"
    )


def session_of(run: Path, data: Path, device: str | None, seed: int) -> Session:
    """The test questions of a device, and its unlabelled clips.

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
    return Session(device, history[device], asked[device])


def path_of(data: Path, clip: str) -> Path:
    """Of a clip of the embedded dataset."""
    return data / "YouTubeClips" / f"{clip}.mp4"


@contextmanager
def service(bundle: Path, *options: str) -> Iterator[str]:
    """The cloud's service as a process of its own, on a free port, until the end of the block; its address.

    Raises:
        CDCError: it does not get ready; with the end of its log.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "cdc_mmpg.cloud", str(bundle), "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise CDCError(f"the service did not start:\n{log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.05)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def is_ready(url: str) -> bool:
    """Whether a service answers there."""
    try:
        return httpx2.get(f"{url}/ready", timeout=1.0, trust_env=False).is_success
    except httpx2.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
