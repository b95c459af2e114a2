"""`Device(bundle, cloud_url).answer(video, question)`: sessions, the request for a layer, and what to do without."""

import logging
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.device.state import Layer, Origin, State
from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.wire import PATH, WeightsRejected, decode_layer, encode_upload

logger = logging.getLogger(__name__)

BACKOFF_SECONDS = 0.05  # before the second attempt of a request, twice as long before each further one
PAUSE_SECONDS = (1.0, 300.0)  # after a request that failed: the first pause, doubled each time, and the longest
LATEST_SECONDS = 30.0  # that a session's layer may take to come, when nobody waits for it any more
SESSION = 64  # most recent clips that count; after as many new ones a layer is asked for in any case
BEST = 5  # answers that are told


class Answer(NamedTuple):
    """What a device says, and how it came to it."""

    text: str
    ranked: list[tuple[str, float]]  # the best answers with their probabilities
    origin: Origin  # of the last layer: for this session or sample, kept from an earlier one, or shared by all devices
    anchors: int  # clips whose features the layer was made from
    unadapted: str  # what the shared layer says
    bytes_up: int  # of bodies, in this call
    bytes_down: int
    milliseconds: dict[str, float]  # by stage
    trouble: str  # why there is no newer layer, "" where there is no trouble


class Trouble(CDCError):
    """No layer came: the cloud was not reached in time, refused, or sent what cannot be used."""


class Device:
    """A device with a bundle: answers questions about clips, with a last layer from the cloud where one can be had.

    A bundle for sessions collects the anchor features of the clips it sees, and asks for a new layer when they are
    twice as many as the last one was made from; one for samples asks with every question. What arrives is verified in
    memory (`wire.decode_layer`), installed by a single assignment and kept in `state`. Without the cloud a session goes
    on with its last layer, else the kept one, else the shared one; a sample, whose layer fits no other, with the shared
    one. `answer` waits for a layer no longer than `deadline`; a session's that comes later serves the next question.

    Methods may be called from several threads.

    Args:
        bundle: folder of a device bundle.
        cloud_url: "http://..." or "https://..."; None never asks.
        key: for the cloud, where it wants one.
        state: folder in which session and layer survive a restart; None keeps nothing.
        deadline: seconds that an answer may wait for a layer.
        threads: of one inference; 0 is as many as there are processors.

    Raises:
        CheckpointError: the bundle is none, or damaged.
        ConfigError: a URL that is none, or a deadline that is not positive.
    """

    def __init__(
        self,
        bundle: str | Path,
        cloud_url: str | None = None,
        *,
        key: str | None = None,
        state: str | Path | None = None,
        deadline: float = 2.0,
        threads: int = 0,
    ) -> None:
        if cloud_url is not None and not cloud_url.startswith(("http://", "https://")):
            raise ConfigError(f"{cloud_url!r} is no address of a cloud: http://... or https://... (CLOUD=)")
        if not deadline > 0:
            raise ConfigError(f"a deadline of {deadline} seconds: it must be positive (DEADLINE=)")
        self.model = DeviceModel(Path(bundle), threads)
        self.deadline = deadline
        self._state = State(Path(state), self.model) if state is not None else None
        headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(base_url=cloud_url, headers=headers) if cloud_url else None
        self._lock = threading.Lock()
        self._shared = Layer(self.model.shared, 0, "shared")
        self._anchors = self._state.anchors() if self._state else []
        self._layer = (self._state.layer() if self._state else None) or self._shared
        self._seen = max(len(self._anchors), self._layer.anchors)  # clips of this session
        self._session = 0  # which: a layer that comes late is not for the next
        self._asking: threading.Thread | None = None
        self._pause, self._next_attempt, self._trouble = PAUSE_SECONDS[0], 0.0, ""
        self._bytes = [0, 0]

    def answer(self, video: str | Path, question: str, choices: Sequence[str] = ()) -> Answer:
        """The answer to a question about a clip, or the choice that fits it.

        Raises:
            DataError: the clip is absent or cannot be decoded.
            ConfigError: no question, or choices that do not go with the bundle.
        """
        clock = Clock()
        end = time.monotonic() + self.deadline
        with self._lock:
            texts = self.model.texts(question, choices)
            before = tuple(self._bytes)
            with clock("decode"):
                frames = self.model.frames(Path(video))
            with clock("encode"):
                features = self.model.features(frames, texts)
            if self.model.unit == "session":
                with clock("anchor"):
                    self._add(self.model.anchor(frames))
                self._adapt(end, clock)
                layer = self._layer
            else:
                layer = self._of_sample(self.model.upload(features), end, clock)
            with clock("answer"):
                scores = self.model.scores(features, layer.matrix)
            plain = self.model.scores(features, self.model.shared)
            up, down = (now - then for now, then in zip(self._bytes, before, strict=True))
        words = self.model.answers or list(choices)
        likely = np.exp(scores - scores.max())
        likely /= likely.sum()
        best = np.argsort(-likely, kind="stable")[:BEST].tolist()
        ranked = [(words[i], float(likely[i])) for i in best]
        return Answer(ranked[0][0], ranked, layer.origin, layer.anchors, words[int(plain.argmax())], up, down,
                      dict(clock.milliseconds), self._trouble)  # fmt: skip

    def observe(self, video: str | Path) -> None:
        """Add a clip to the session without asking anything about it; a layer is asked for with the next question.

        Raises:
            DataError: the clip is absent or cannot be decoded.
        """
        if self.model.unit == "session":
            frames = self.model.frames(Path(video))
            with self._lock:
                self._add(self.model.anchor(frames))

    def new_session(self) -> None:
        """Forget the clips and the layer: the camera is another, or somewhere else."""
        with self._lock:
            self._anchors, self._seen, self._layer = [], 0, self._shared
            self._session += 1
            if self._state:
                self._state.clear()

    def close(self) -> None:
        """Let the connection go."""
        if self._client is not None:
            self._client.close()

    def _add(self, anchor: NDArray[np.float32]) -> None:
        """Count a clip, unless it was there before."""
        if any(np.array_equal(anchor, own) for own in self._anchors):
            return
        self._anchors = [*self._anchors, anchor][-SESSION:]
        self._seen += 1
        if self._state:
            self._state.keep_anchors(self._anchors)

    @property
    def _is_worth_it(self) -> bool:
        """Each doubling halves the variance of the mean; what single clips add is soon not worth a request."""
        return self._seen >= self._layer.anchors + min(max(1, self._layer.anchors), SESSION)

    def _adapt(self, end: float, clock: "Clock") -> None:
        """Install a new layer for the session, if one is worth it and comes in time."""
        if self._client is None or not self._anchors:
            return
        if self._asking is None or not self._asking.is_alive():
            if not self._is_worth_it or time.monotonic() < self._next_attempt:
                return
            latest = max(end, time.monotonic() + LATEST_SECONDS)
            feature, asked = np.mean(self._anchors, axis=0), (self._seen, self._session)
            self._asking = threading.Thread(target=self._ask, args=(feature, *asked, latest, clock), daemon=True)
            self._asking.start()
            self._asking.join(max(0.0, end - time.monotonic()))
        if self._asking.is_alive() and not self._trouble:
            self._trouble = "the cloud has not answered yet"

    def _ask(self, feature: NDArray[np.float32], anchors: int, session: int, end: float, clock: "Clock") -> None:
        """In a thread of its own, since looking up a name knows no deadline."""
        try:
            layer, content = self._fetch(feature, anchors, end, clock)
        except Trouble as error:
            self._fail(error)
            return
        self._succeed()
        if session != self._session:
            return
        self._layer = layer
        if self._state:
            with clock("keep"):
                self._state.keep_layer(content, anchors)

    def _of_sample(self, feature: NDArray[np.float32], end: float, clock: "Clock") -> Layer:
        """The layer for this sample, or the shared one."""
        if self._client is None or time.monotonic() < self._next_attempt:
            return self._shared
        found: list[Layer] = []

        def ask() -> None:
            try:
                found.append(self._fetch(feature, 1, end, clock)[0])
                self._succeed()
            except Trouble as error:
                self._fail(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(max(0.0, end - time.monotonic()))
        return found[0] if found else self._shared

    def _fail(self, error: Trouble) -> None:
        self._trouble = str(error)
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, PAUSE_SECONDS[1])
        logger.info("no new layer: %s", error)

    def _succeed(self) -> None:
        self._trouble, self._pause, self._next_attempt = "", PAUSE_SECONDS[0], 0.0

    def _fetch(self, feature: NDArray[np.float32], anchors: int, end: float, clock: "Clock") -> tuple[Layer, bytes]:
        """A layer for a feature, verified and ready to be installed, and the message it came in.

        Raises:
            Trouble: there is none until `end`.
        """
        upload = encode_upload(feature, self.model.layout, self.model.versions)
        content = self._request(upload, end, clock)
        try:
            with clock("verify"):
                matrices = decode_layer(content, upload, self.model.layout, self.model.versions, self.model.cloud)
            with clock("swap"):
                return Layer(self.model.install(matrices, self.model.layout), anchors, "adapted"), content
        except WeightsRejected as error:
            raise Trouble(f"the cloud's reply was rejected ({error})") from error

    def _request(self, upload: bytes, end: float, clock: "Clock") -> bytes:
        """The reply to an upload, asked for again and again until `end`.

        Raises:
            Trouble: none came, or the cloud refused.
        """
        wait, problem = BACKOFF_SECONDS, "there was no time to ask"
        while (left := end - time.monotonic()) > 0:
            pause = wait * random.uniform(0.5, 1.5)
            try:
                reply = self._attempt(upload, end, left, clock)
                if isinstance(reply, bytes):
                    return reply
                problem, least = reply
                pause = max(pause, least)
            except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:  # the last when `close` came first
                problem = f"{type(error).__name__}: {error}"
            self._trouble = f"the cloud has not answered yet ({problem})"
            wait *= 2
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
        raise Trouble(f"no layer in time ({problem})")

    def _attempt(self, upload: bytes, end: float, left: float, clock: "Clock") -> bytes | tuple[str, float]:
        """A reply, or what was wrong for now and how many seconds to wait at least.

        Raises:
            Trouble: the cloud refused.
            httpx.HTTPError: it was not reached, or took too long.
        """
        assert self._client is not None
        due, content = self.model.layout.message_bytes, bytearray()
        start = time.perf_counter()
        with self._client.stream("POST", PATH, content=upload, timeout=left) as response:
            self._bytes[0] += len(upload)
            generating = _server_milliseconds(response.headers.get("server-timing", ""))
            came = time.perf_counter()
            for chunk in response.iter_raw():
                content += chunk
                self._bytes[1] += len(chunk)
                if len(content) > due or time.monotonic() > end:
                    break
            if response.status_code == 200:
                if len(content) < due and time.monotonic() > end:
                    return "it came too slowly", 0.0
                clock.add("upload", 1000 * (came - start) - generating)
                clock.add("generate", generating)
                clock.add("download", 1000 * (time.perf_counter() - came))
                return bytes(content)
            problem = f"{response.status_code} {bytes(content[:200]).decode('utf-8', 'replace')}"
            if response.status_code in (408, 429) or response.status_code >= 500:
                after = response.headers.get("retry-after", "")
                return problem, float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0
        raise Trouble(f"the cloud refused: {problem}")


class Clock:
    """Milliseconds by stage; a stage that comes again adds to its own."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the block as this stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, 1000 * (time.perf_counter() - start))

    def add(self, stage: str, milliseconds: float) -> None:
        """Count so many more."""
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + milliseconds


def _server_milliseconds(header: str) -> float:
    """The sum of a Server-Timing header's durations."""
    return sum(float(value) for value in re.findall(r"dur=(\d+(?:\.\d+)?)", header))
