"""Small deployments with random weights, a fake cloud in this process, and the service as a real process."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, Self

import torch

from cdc_mmpg.cloud.model import generate_layer, load_model
from cdc_mmpg.deployment.bundles import write_bundles
from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle
from cdc_mmpg.deployment.local import LocalService
from cdc_mmpg.deployment.source import SPECIAL_WORDS, Source
from cdc_mmpg.device import Device
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, BasisFDA, LowRankFDA
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.wire.messages import Versions, decode_upload

Kind = Literal["full", "low_rank", "basis"]
OUTPUTS, INPUTS, NUMBER = 17, 96, 4
ENCODER = bytes(range(16))  # digest of a nonexistent encoder


def build_generator(kind: Kind = "low_rank", outputs: int = OUTPUTS, seed: int = 0) -> Generator:
    """Return a generator with random weights whose layers depend on the upload."""
    torch.manual_seed(seed)
    if kind == "full":
        return Generator(ADR(), FDA(INPUTS, outputs, "hyperfan_in", project=True)).eval()
    adaptor = (LowRankFDA if kind == "low_rank" else BasisFDA)(INPUTS, outputs, NUMBER)
    if isinstance(adaptor, LowRankFDA):
        torch.nn.init.normal_(adaptor.hyper.weight, std=0.05)
    return Generator(DeviceAxes(2), adaptor).eval()


def build_cloud_bundle(folder: Path, kind: Kind = "low_rank", outputs: int = OUTPUTS, seed: int = 0) -> Versions:
    """Write a cloud/ folder only, without an encoder or a device bundle, and return its versions."""
    return write_cloud_bundle(build_generator(kind, outputs, seed), ENCODER, f"test/{kind}", folder).versions


WORDS = [*SPECIAL_WORDS, "what", "who", "is", "the", "a", "man", "doing", "?", "red", "green"]


def write_deployment(
    folder: Path,
    method: Literal["cdc_mmpg_session", "cdc_mmpg"] = "cdc_mmpg_session",
    task: Literal["open_ended", "multiple_choice"] = "open_ended",
    kind: Kind = "low_rank",
) -> Path:
    """Write all three bundles of a tiny encoder with random weights, as `make export` does; imports Lightning."""
    from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
    from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
    from cdc_mmpg.models.all_in_one import AllInOne
    from cdc_mmpg.models.heads import MultipleChoice, OpenEnded

    torch.manual_seed(1)
    encoder = AllInOne(image_size=32, depth=1, vocab_size=len(WORDS), text_length=16)
    torch.nn.init.normal_(encoder.transformer.temporal_embed, std=0.5)
    head = OpenEnded(5) if task == "open_ended" else MultipleChoice()
    if method == "cdc_mmpg":
        folder.mkdir(parents=True, exist_ok=True)
        ADR().save(folder / "adr.safetensors")
        module = CDCMMPG(encoder, head, adr=str(folder / "adr.safetensors"))
    else:
        module = CDCMMPGSession(encoder, head, generated=kind, size=2)
        if kind == "low_rank":
            torch.nn.init.normal_(module.fda.hyper.weight, std=0.05)
    frames = {"number": 3, "candidates": 3, "size": 32, "side": 32}
    answers = ["red", "green", "blue", "man", "(unknown)"] if task == "open_ended" else []
    kept_words = [i for i, word in enumerate(WORDS) if word != "green"]
    write_bundles(Source(module.eval(), f"test/{method}", task, answers, WORDS, kept_words, frames, 16), folder)
    return folder


Reply = tuple[int, dict[str, str], bytes]


class FakeCloud:
    """Cloud in this process that replies like the service, or as `change` says, and records its requests."""

    def __init__(self, bundle: Path) -> None:
        self.served = load_model(bundle)
        self.uploads: list[bytes] = []
        self.change: Callable[[bytes], Reply | None] = lambda layer: None  # None: no reply at all
        self.answer_honestly()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                fake.uploads.append(content)
                with contextlib.suppress(OSError):
                    reply = fake.change(fake.build_layer(content))
                    if reply is None:
                        fake.silence.wait(30)
                        return
                    status, headers, body = reply
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.silence = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer_honestly(self) -> None:
        self.change = lambda layer: (200, {}, layer)

    def build_layer(self, content: bytes) -> bytes:
        upload = decode_upload(content, self.served.layouts, self.served.versions)
        return generate_layer(self.served, content, upload)

    def close(self) -> None:
        self.silence.set()
        self.server.shutdown()
        self.server.server_close()


def open_device(deployed: Path, url: str | None, kind: str = "session", **options: object) -> Device:
    """Return the device of one deployment of the fixture `deployed`."""
    return Device(deployed / kind / "device", url, threads=1, **options)  # type: ignore[arg-type]


class Cloud(LocalService):
    """`python -m cdc_mmpg.cloud` on one thread, with timeouts for a busy machine.

    Args:
        bundle: cloud/ folder.
        log: file for the output.
        options: command-line options.
    """

    def __init__(self, bundle: Path, log: Path, *options: str) -> None:
        super().__init__(bundle, log, *options, environment={"OMP_NUM_THREADS": "1"})

    def start(self, seconds: float = 180) -> Self:
        return super().start(seconds)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 40) -> int:
        code = super().stop(number, seconds)
        assert number == signal.SIGKILL or code != -signal.SIGKILL, self.read_log_tail()
        return code

    def read_log(self) -> list[dict[str, object]]:
        """Return the JSON lines of the log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
