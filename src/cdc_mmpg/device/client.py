"""`Device(bundle, cloud_url).answer(video, question)`: sessions, the request for a layer, and what to do without."""

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.device.connection import Connection, Unreachable
from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.device.state import MAX_SESSION_CLIPS, Layer, LayerOrigin, Receipt, State, encode_counted_upload
from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.wire.messages import LAYER_PATH, WeightsRejected, decode_layer

logger = logging.getLogger(__name__)

BACKOFF_SECONDS = 0.05  # before the second attempt of a request, twice as long before each further one
PAUSE_SECONDS = (1.0, 300.0)  # after a request that failed: the first pause, doubled each time, and the longest
MAX_LAYER_SECONDS = 30.0  # that a session's layer may take when no answer waits for it any more
MAX_DEADLINE_SECONDS = 86_400.0
RANKED_ANSWERS = 5  # that an answer lists


class Answer(NamedTuple):
    """What a device says, and how it came to it."""

    text: str
    ranked: list[tuple[str, float]]  # the best answers with their probabilities
    origin: (
        LayerOrigin  # of the last layer: for this session or sample, kept from an earlier one, or shared by all devices
    )
    anchors: int  # clips whose features the layer was made from
    unadapted: str  # what the shared layer says
    bytes_up: int  # of bodies, in this call
    bytes_down: int
    milliseconds: dict[str, float]  # by stage
    trouble: str  # why there is no newer layer, "" where there is no trouble; printable, without keys or passwords
    unknown_words: list[str]  # of the question and the choices, which this bundle's vocabulary does not hold


class LayerUnavailable(CDCError):
    """No layer came: the cloud was not reached in time, refused, or sent what cannot be used."""


class Device:
    """A device with a bundle: answers questions about clips, with a last layer from the cloud where one can be had.

    A bundle for sessions collects the anchor features of the clips it sees, and asks for a new layer when they are
    twice as many as the last one was made from; one for samples asks with every question. What arrives is verified in
    memory (`decode_layer`), installed by a single assignment and kept in `state`. Without the cloud a session goes
    on with its last layer, else the kept one, else the shared one; a sample, whose layer fits no other, with the shared
    one. `answer` waits for a layer no longer than `deadline`; a session's that comes later serves the next question.
    Neither the cloud, the network, the environment nor the folder of the state is ever a reason for no answer.

    Methods may be called from several threads, and several processes may share a state: they share its session, and
    none writes to it any more once another has begun a new one.

    Args:
        bundle: folder of a device bundle.
        cloud_url: "http://..." or "https://..."; None never asks. Through the proxy that the environment names, unless
            it is on this machine.
        key: for the cloud, where it wants one.
        state: folder in which session and layer survive a restart; None keeps nothing.
        deadline: seconds that an answer may wait for a layer.
        threads: of one inference; 0 is as many as there are processors.

    Raises:
        CheckpointError: the bundle is none, or damaged.
        ConfigError: a URL or a key that cannot be one, a deadline that is not positive, a negative number of threads.
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
        if not isinstance(deadline, int | float) or not 0 < deadline <= MAX_DEADLINE_SECONDS:
            raise ConfigError(
                f"a deadline of {deadline!r} seconds: more than 0, at most {MAX_DEADLINE_SECONDS:.0f} (DEADLINE=)"
            )
        if not isinstance(threads, int) or threads < 0:
            raise ConfigError(f"{threads!r} threads: 0, for as many as there are processors, or more")
        self._connection = None if cloud_url is None else Connection(cloud_url, LAYER_PATH, key)
        self.model = DeviceModel(Path(bundle), threads)
        self.deadline = deadline
        self._state = State(Path(state), self.model) if state is not None else None
        self._lock = threading.Lock()
        self._installing = threading.Lock()  # which session it is, its layer and what is kept of it change together
        self._shared = Layer(self.model.shared, 0, "shared")
        self._anchors = self._state.anchors() if self._state else []
        self._layer = (self._state.layer() if self._state else None) or self._shared
        self._seen = max(len(self._anchors), self._layer.anchors)  # clips of this session
        self._seen_by_layer = self._layer.anchors  # of these, when the layer was asked for
        self._session = 0  # which: a layer that comes late is not for the next
        self._asking: threading.Thread | None = None
        self._pause, self._next_attempt, self._trouble = PAUSE_SECONDS[0], 0.0, ""

    def answer(self, video: str | Path, question: str, choices: Sequence[str] = ()) -> Answer:
        """Answer a question about a clip, or choose what fits it.

        Raises:
            DataError: the clip is absent or cannot be decoded.
            ConfigError: no question, or choices that do not go with the bundle.
        """
        clock = StageClock()
        end = time.monotonic() + self.deadline
        with self._lock:
            texts = self.model.texts(question, choices)
            before = self._bytes
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
            trouble = self._trouble
        words = self.model.answers or list(choices)
        likely = np.exp(scores - scores.max())
        likely /= likely.sum()
        best = np.argsort(-likely, kind="stable")[:RANKED_ANSWERS].tolist()
        ranked = [(words[i], float(likely[i])) for i in best]
        return Answer(ranked[0][0], ranked, layer.origin, layer.anchors, words[int(plain.argmax())], up, down,
                      dict(clock.milliseconds), trouble, self.model.unknown_words(question, choices))  # fmt: skip

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
        with self._lock, self._installing:
            self._anchors, self._seen, self._layer, self._seen_by_layer = [], 0, self._shared, 0
            self._session += 1
            self._asking = None
            self._succeed()
            if self._state:
                self._state.clear()

    def close(self) -> None:
        """Let the connection go."""
        if self._connection is not None:
            self._connection.close()

    @property
    def _bytes(self) -> tuple[int, int]:
        """Bytes of bodies so far, up and down."""
        return (0, 0) if self._connection is None else (self._connection.bytes_up, self._connection.bytes_down)

    def _add(self, anchor: NDArray[np.float32]) -> None:
        """Count a clip, unless it was there before."""
        if any(np.array_equal(anchor, own) for own in self._anchors):
            return
        self._anchors = [*self._anchors, anchor][-MAX_SESSION_CLIPS:]
        self._seen += 1
        if self._state:
            self._state.keep_anchors(self._anchors)

    @property
    def _is_worth_it(self) -> bool:
        """Each doubling halves the variance of the mean; what single clips add is soon not worth a request."""
        return self._seen >= self._seen_by_layer + min(max(1, self._seen_by_layer), MAX_SESSION_CLIPS)

    def _adapt(self, end: float, clock: "StageClock") -> None:
        """Install a new layer for the session, if one is worth it and comes in time."""
        if self._connection is None or not self._anchors:
            return
        if self._asking is None or not self._asking.is_alive():
            if not self._is_worth_it or time.monotonic() < self._next_attempt:
                return
            latest = max(end, time.monotonic() + MAX_LAYER_SECONDS)
            feature, clips = np.mean(self._anchors, axis=0), (len(self._anchors), self._seen)
            self._asking = self._begin(self._ask, feature, *clips, self._session, latest, clock)
            if self._asking is None:
                return
            self._asking.join(max(0.0, end - time.monotonic()))
        if self._asking.is_alive() and not self._trouble:
            self._trouble = "the cloud has not answered yet"

    def _begin(self, function: Callable[..., None], *arguments: object) -> threading.Thread | None:
        """Run a request in a thread of its own, since looking up a name knows no deadline; None where there is none."""
        thread = threading.Thread(target=function, args=arguments, name="ask for a layer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._fail(error)
            return None
        return thread

    def _ask(
        self, feature: NDArray[np.float32], anchors: int, seen: int, session: int, end: float, clock: "StageClock"
    ) -> None:
        """Ask for a session's layer, install and keep it, unless the session is over by then."""
        try:
            layer, receipt = self._fetch(feature, anchors, session, end, clock)
        except LayerUnavailable as error:
            with self._installing:
                if session == self._session:
                    self._fail(error)
            return
        with self._installing:
            if session != self._session:
                return
            self._succeed()
            self._layer, self._seen_by_layer = layer, seen
            if self._state:
                with clock("keep"):
                    self._state.keep_layer(receipt)

    def _of_sample(self, feature: NDArray[np.float32], end: float, clock: "StageClock") -> Layer:
        """Return the layer for this sample, or the shared one."""
        if self._connection is None or time.monotonic() < self._next_attempt:
            return self._shared
        found: list[Layer] = []

        def ask() -> None:
            try:
                found.append(self._fetch(feature, 1, self._session, end, clock)[0])
                self._succeed()
            except LayerUnavailable as error:
                self._fail(error)

        if thread := self._begin(ask):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive() and not self._trouble:
                self._trouble = "the cloud has not answered yet"
        return found[0] if found else self._shared

    def _fail(self, error: Exception) -> None:
        """Note why there is no layer, and ask no more for a while."""
        self._trouble = self._make_safe(str(error))
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, PAUSE_SECONDS[1])
        logger.debug("no new layer: %s", self._trouble)  # the answer says it

    def _succeed(self) -> None:
        """Forget what went wrong before."""
        self._trouble, self._pause, self._next_attempt = "", PAUSE_SECONDS[0], 0.0

    def _make_safe(self, text: str) -> str:
        """Return what may be shown of an error: no secret, nothing that moves a terminal's cursor."""
        return text if self._connection is None else self._connection.make_safe(text)

    def _fetch(
        self, feature: NDArray[np.float32], anchors: int, session: int, end: float, clock: "StageClock"
    ) -> tuple[Layer, Receipt]:
        """Return a layer for a feature, verified and ready to be installed, and what proves it.

        Raises:
            LayerUnavailable: there is none until `end`.
        """
        model = self.model
        try:
            upload, salt = encode_counted_upload(feature, anchors, model)
            content = self._request(upload, session, end, clock)
            with clock("verify"):
                matrices = decode_layer(content, upload, model.layout, model.versions, model.cloud)
            with clock("swap"):
                layer = Layer(model.install(matrices, model.layout), anchors, "adapted")
            return layer, Receipt(content, upload, salt, anchors)
        except WeightsRejected as error:
            raise LayerUnavailable(f"the cloud's reply was rejected ({error})") from error
        except CDCError as error:
            raise LayerUnavailable(str(error)) from error
        except Exception as error:  # whatever it is, the device goes on
            raise LayerUnavailable(f"{type(error).__name__}: {error}") from error

    def _request(self, upload: bytes, session: int, end: float, clock: "StageClock") -> bytes:
        """Return the reply to an upload, asked for again and again until `end`.

        Raises:
            CDCError: none came, or the cloud refused.
        """
        assert self._connection is not None
        wait, problem = BACKOFF_SECONDS, "there was no time to ask"
        while end > time.monotonic():
            pause = wait * random.uniform(0.5, 1.5)
            try:
                reply = self._connection.post(upload, self.model.layout.message_bytes, end)
            except Unreachable as error:
                problem = str(error)
            else:
                if reply.status == 200:
                    generating = _server_milliseconds(reply.headers.get("server-timing", ""))
                    clock.add("upload", 1000 * reply.waited_seconds - generating)
                    clock.add("generate", generating)
                    clock.add("download", 1000 * reply.read_seconds)
                    return reply.content
                problem = f"{reply.status} {reply.content[:200].decode('utf-8', 'replace')}{self._connection.route}"
                if 300 <= reply.status < 400:
                    problem += f" to {reply.headers.get('location', '')}, not followed: is the address right (CLOUD=)?"
                if reply.status not in (408, 429) and reply.status < 500:
                    raise LayerUnavailable(f"the cloud refused: {problem}")
                after = reply.headers.get("retry-after", "")
                pause = max(pause, float(after) if re.fullmatch(r"[0-9]{1,6}", after) else 0.0)
            if session == self._session:
                self._trouble = self._make_safe(f"the cloud has not answered yet ({problem})")
            wait *= 2
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
        raise LayerUnavailable(f"no layer in time ({problem})")


class StageClock:
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
    """Return the sum of a Server-Timing header's durations."""
    return sum(float(value) for value in re.findall(r"dur=([0-9]{1,9}(?:\.[0-9]{1,9})?)", header))
