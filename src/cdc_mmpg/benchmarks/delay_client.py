"""Client process of the delay measurement, controlled by lines of JSON on stdin and stdout.

`python -m cdc_mmpg.benchmarks.delay_client` runs the process; `Client` starts and controls it.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cdc_mmpg.deployment.local import LocalProcess
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CDCError
from cdc_mmpg.program import run_to_exit_code
from cdc_mmpg.wire.messages import LAYER_PATH, Layout, Versions, decode_layer, encode_upload

ANSWER_TIMEOUT_SECONDS = 60
TIMING_PATTERN = re.compile(r"(\w+);dur=([\d.]+)")


class Client(LocalProcess):
    """The client process, as a context manager that runs it during its block.

    Args:
        prefix: words before the command, such as `ip netns exec <name>`.
        log: path of the log file for stderr.
    """

    def __init__(self, prefix: Sequence[str], log: Path) -> None:
        super().__init__("the client", [*prefix, sys.executable, "-m", __name__], log, piped=True, own_session=True)

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, **command: Any) -> Any:
        """Send a command to `serve_client` and return the reply.

        Raises:
            CDCError: the client process ended.
        """
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise CDCError(f"the client ended:\n{self.read_log_tail()}")
        return json.loads(line)


def serve_client() -> None:
    """Read commands as lines of JSON from stdin and reply to each on stdout, until the input ends.

    {"ready": url} -> whether the URL replies 200. {"device": bundle, "url", "key", "video", "question", "requests"} ->
    the result of `time_answers`. {"url", "key", "encoder", "generator", "public_key", "layout", "requests",
    "connection", "pause"} -> a list of {"whole", "compute", "verify"} in milliseconds. The connection is "new" to open
    one and keep it, "kept" or "idle" to use the open one, or "each" for a new one per request; pause is in seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # requests must use the measured link
    probe, connection = (httpx2.Client(trust_env=False, timeout=1) for _ in range(2))
    for line in sys.stdin:
        command = json.loads(line)
        if url := command.get("ready"):
            try:
                reply: Any = probe.get(url).status_code == 200
            except httpx2.TransportError:
                reply = False
        elif bundle := command.get("device"):
            video, question = Path(command["video"]), command["question"]
            reply = time_answers(Path(bundle), command["url"], command["key"], video, question, command["requests"])
        else:
            layout, key = Layout(*command["layout"]), Ed25519PublicKey.from_public_bytes(
                bytes.fromhex(command["public_key"])
            )  # fmt: skip
            versions = Versions(bytes.fromhex(command["encoder"]), bytes.fromhex(command["generator"]))
            headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity",
                       "Authorization": f"Bearer {command['key']}"}  # fmt: skip
            reply = []
            for number in range(command["requests"]):
                if command["connection"] == "each" or (command["connection"] == "new" and number == 0):
                    connection.close()
                    connection = httpx2.Client(headers=headers, trust_env=False, timeout=ANSWER_TIMEOUT_SECONDS)
                time.sleep(command["pause"])
                reply.append(_time_request(connection, command["url"] + LAYER_PATH, layout, versions, key))
        print(json.dumps(reply), flush=True)


def time_answers(bundle: Path, url: str, key: str, video: Path, question: str, requests: int) -> list[dict[str, float]]:
    """Return the milliseconds of each answer's stages and "whole", each with a new layer; one more is a warm-up.

    Raises:
        CDCError: a layer was not received.
    """
    from cdc_mmpg.device import Device  # noqa: PLC0415  the other series do not need onnxruntime

    device, times = Device(bundle, url, key=key, deadline=ANSWER_TIMEOUT_SECONDS), []
    for _ in range(requests + 1):
        device.new_session()
        start = time.perf_counter()
        answer = device.answer(video, question)
        whole = 1000 * (time.perf_counter() - start)
        if answer.origin != "adapted":
            raise CDCError(f"{bundle}: {answer.trouble}")
        times.append({**answer.milliseconds, "whole": whole})
    device.close()
    return times[1:]


def _time_request(
    connection: httpx2.Client, url: str, layout: Layout, versions: Versions, key: Ed25519PublicKey
) -> dict[str, float]:
    """Request and verify a layer, and return the milliseconds "whole", "compute" and "verify".

    Raises:
        CDCError: the service refused the upload, or the layer is invalid.
    """
    feature = np.random.default_rng().uniform(-1, 1, FEATURE_DIM).astype(np.float32)
    upload = encode_upload(feature, layout, versions)
    start = time.perf_counter()
    reply = connection.post(url, content=upload)
    end = time.perf_counter()
    if reply.status_code != 200:
        raise CDCError(f"{url}: {reply.status_code} {reply.text}")
    decode_layer(reply.content, upload, layout, versions, key)
    verified = time.perf_counter()
    compute = sum(read_server_timing(reply.headers["Server-Timing"]).values())
    return {"whole": 1000 * (end - start), "compute": compute, "verify": 1000 * (verified - end)}


def read_server_timing(timing: str) -> dict[str, float]:
    """Parse a `Server-Timing` header into milliseconds by name."""
    return {name: float(value) for name, value in TIMING_PATTERN.findall(timing)}


if __name__ == "__main__":
    sys.exit(run_to_exit_code(serve_client))
