"""`Device(bundle, cloud_url).answer(video, question)`: sessions, layer requests, and the fallback without a cloud."""

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

BACKOFF_SECONDS = 0.05  # delay before the first retry of a request, doubled for each further retry
FAILURE_PAUSE_SECONDS = (1.0, 300.0)  # first and longest pause after failed requests; doubled after each failure
MAX_LAYER_SECONDS = 30.0  # time limit of a request for a session's layer that no answer waits for any more
DEFAULT_DEADLINE_SECONDS, MAX_DEADLINE_SECONDS = 2.0, 86_400.0
MAX_REASON_BYTES = 2_000  # of a refusal; shown shorter, but only after secrets are replaced
RANKED_ANSWERS = 5  # number of answers in `Answer.ranked`


class Answer(NamedTuple):
    """An answer of a device, and how it was produced."""

    text: str
    ranked: list[tuple[str, float]]  # the best answers with their probabilities
    # Origin of the last layer: generated for this session or sample, loaded from disk, or shared by all devices.
    origin: LayerOrigin
    anchors: int  # number of clips whose features the layer was generated from
    unadapted: str  # answer of the shared layer
    bytes_up: int  # bodies of the requests that were answered during this call
    bytes_down: int  # bodies of the replies that arrived during this call
    milliseconds: dict[str, float]  # by stage
    trouble: str  # why there is no newer layer; "" if nothing failed. Printable, without keys or passwords
    unknown_words: list[str]  # words of the question and the choices that are not in this bundle's vocabulary


class LayerUnavailable(CDCError):
    """Failure to get a layer: the cloud was not reached in time, refused the request, or sent an unusable layer."""


class Device:
    """A device with a bundle: answers questions about clips, with a last layer from the cloud if one is available.

    A session bundle collects the anchor features of the clips it sees, and requests a new layer when their number has
    doubled since the last layer; a sample bundle requests a layer for every question. A received layer is verified in
    memory (`decode_layer`), installed by a single assignment and saved in `state`. Without the cloud, a session uses
    its last layer, else the saved one, else the shared one; a sample uses the shared one, since another sample's layer
    does not fit. `answer` waits at most `deadline` for a layer; a session layer that arrives later is used for the next
    question. Failures of the cloud, the network, the environment or the state folder never prevent an answer.

    Methods are thread-safe. Processes may share a state folder and then share its session; once one process begins a
    new session, the others stop writing to the folder.

    Args:
        bundle: folder of a device bundle.
        cloud_url: "http://..." or "https://..."; with None, no layer is ever requested. Requests use the proxy of the
            environment, except to this machine.
        key: access key of the cloud, if it requires one.
        state: folder that stores the session and its layer across restarts; None stores nothing.
        deadline: maximum seconds that an answer waits for a layer.
        threads: threads per inference; 0 means one per processor.

    Raises:
        CheckpointError: the folder is not a device bundle, or is damaged.
        ConfigError: an invalid URL or key, a deadline that is not positive, or a negative number of threads.
    """

    def __init__(
        self,
        bundle: str | Path,
        cloud_url: str | None = None,
        *,
        key: str | None = None,
        state: str | Path | None = None,
        deadline: float = DEFAULT_DEADLINE_SECONDS,
        threads: int = 0,
    ) -> None:
        if not isinstance(deadline, int | float) or not 0 < deadline <= MAX_DEADLINE_SECONDS:
            raise ConfigError(
                f"deadline of {deadline!r} seconds: must be above 0 and at most {MAX_DEADLINE_SECONDS:.0f} (--deadline)"
            )
        if not isinstance(threads, int) or threads < 0:
            raise ConfigError(f"{threads!r} threads: must be 0 (one per processor) or more")
        self._connection = None if cloud_url is None else Connection(cloud_url, LAYER_PATH, key)
        self.model = DeviceModel(Path(bundle), threads)
        self.deadline = deadline
        self._state = State(Path(state), self.model) if state is not None else None
        self._lock = threading.Lock()
        self._install_lock = threading.Lock()  # session number, layer and stored state change together
        self._shared = Layer(self.model.shared, 0, "shared")
        self._anchors = self._state.load_anchors() if self._state else []
        self._layer = (self._state.load_layer() if self._state else None) or self._shared
        self._clips_seen = max(len(self._anchors), self._layer.anchors)  # number of clips in this session
        self._clips_at_request = self._layer.anchors  # number of clips when the layer was requested
        self._session = 0  # session number: a layer that arrives late must not go to the next session
        self._request_thread: threading.Thread | None = None
        self._pause, self._next_attempt, self._trouble = FAILURE_PAUSE_SECONDS[0], 0.0, ""

    def answer(self, video: str | Path, question: str, choices: Sequence[str] = ()) -> Answer:
        """Answer a question about a clip, or choose one of several answers.

        Raises:
            DataError: the clip is missing or cannot be decoded.
            ConfigError: the question is empty, or the choices do not match the bundle's task.
        """
        clock = StageClock()
        end = time.monotonic() + self.deadline
        with self._lock:
            texts = self.model.tokenize(question, choices)
            before = self._bytes
            with clock("decode"):
                frames = self.model.decode_frames(Path(video))
            with clock("encode"):
                features = self.model.encode(frames, texts)
            if self.model.unit == "session":
                with clock("anchor"):
                    self._add_anchor(self.model.encode_anchor(frames))
                self._adapt(end, clock)
                layer = self._layer
            else:
                layer = self._fetch_sample_layer(self.model.compute_upload(features), end, clock)
            with clock("answer"):
                scores = self.model.compute_scores(features, layer.matrix)
            plain = self.model.compute_scores(features, self.model.shared)
            up, down = (now - then for now, then in zip(self._bytes, before, strict=True))
            trouble = self._trouble
        words = self.model.answers or list(choices)
        likely = np.exp(scores - scores.max())
        likely /= likely.sum()
        best = np.argsort(-likely, kind="stable")[:RANKED_ANSWERS].tolist()
        ranked = [(words[i], float(likely[i])) for i in best]
        return Answer(ranked[0][0], ranked, layer.origin, layer.anchors, words[int(plain.argmax())], up, down,
                      dict(clock.milliseconds), trouble, self.model.find_unknown_words(question, choices))  # fmt: skip

    def observe(self, video: str | Path) -> None:
        """Add a clip to the session without a question; the next question requests a layer if one is due.

        Raises:
            DataError: the clip is missing or cannot be decoded.
        """
        if self.model.unit == "session":
            frames = self.model.decode_frames(Path(video))
            with self._lock:
                self._add_anchor(self.model.encode_anchor(frames))

    def new_session(self) -> None:
        """Discard the clips and the layer, because the camera or its location changed."""
        with self._lock, self._install_lock:
            self._anchors, self._clips_seen, self._layer, self._clips_at_request = [], 0, self._shared, 0
            self._session += 1
            self._request_thread = None
            self._clear_failure()
            if self._state:
                self._state.clear()

    def close(self) -> None:
        """Close the connection to the cloud."""
        if self._connection is not None:
            self._connection.close()

    @property
    def _bytes(self) -> tuple[int, int]:
        """Number of body bytes sent and received so far."""
        return (0, 0) if self._connection is None else (self._connection.bytes_up, self._connection.bytes_down)

    def _add_anchor(self, anchor: NDArray[np.float32]) -> None:
        """Add the anchor of a clip to the session, unless it is already there."""
        if any(np.array_equal(anchor, known) for known in self._anchors):
            return
        self._anchors = [*self._anchors, anchor][-MAX_SESSION_CLIPS:]
        self._clips_seen += 1
        if self._state:
            self._state.save_anchors(self._anchors)

    @property
    def _is_layer_due(self) -> bool:
        """Whether enough clips were added for a new layer; each doubling halves the variance of the mean."""
        return self._clips_seen >= self._clips_at_request + min(max(1, self._clips_at_request), MAX_SESSION_CLIPS)

    def _adapt(self, end: float, clock: "StageClock") -> None:
        """Request a new session layer if one is due, and wait for it until `end`."""
        if self._connection is None or not self._anchors:
            return
        if self._request_thread is None or not self._request_thread.is_alive():
            if not self._is_layer_due or time.monotonic() < self._next_attempt:
                return
            latest = max(end, time.monotonic() + MAX_LAYER_SECONDS)
            feature, counts = np.mean(self._anchors, axis=0), (len(self._anchors), self._clips_seen)
            arguments = feature, *counts, self._session, latest, clock
            self._request_thread = self._start_thread(self._fetch_session_layer, *arguments)
            if self._request_thread is None:
                return
            self._request_thread.join(max(0.0, end - time.monotonic()))
        if self._request_thread.is_alive() and not self._trouble:
            self._trouble = "the cloud has not answered yet"

    def _start_thread(self, function: Callable[..., None], *arguments: object) -> threading.Thread | None:
        """Run a request in a separate thread, since DNS lookups have no timeout; return None if no thread starts."""
        thread = threading.Thread(target=function, args=arguments, name="ask for a layer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system cannot start another thread
            self._record_failure(error)
            return None
        return thread

    def _fetch_session_layer(
        self, feature: NDArray[np.float32], anchors: int, seen: int, session: int, end: float, clock: "StageClock"
    ) -> None:
        """Fetch, install and save a session's layer, unless the session has ended in the meantime."""
        try:
            layer, receipt = self._fetch(feature, anchors, session, end, clock)
        except LayerUnavailable as error:
            with self._install_lock:
                if session == self._session:
                    self._record_failure(error)
            return
        with self._install_lock:
            if session != self._session:
                return
            self._clear_failure()
            self._layer, self._clips_at_request = layer, seen
            if self._state:
                with clock("keep"):
                    self._state.save_layer(receipt)

    def _fetch_sample_layer(self, feature: NDArray[np.float32], end: float, clock: "StageClock") -> Layer:
        """Return the layer for this sample, or the shared layer if none arrives by `end`."""
        if self._connection is None or time.monotonic() < self._next_attempt:
            return self._shared
        layers: list[Layer] = []

        def ask() -> None:
            try:
                layers.append(self._fetch(feature, 1, self._session, end, clock)[0])
                self._clear_failure()
            except LayerUnavailable as error:
                self._record_failure(error)

        if thread := self._start_thread(ask):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive() and not self._trouble:
                self._trouble = "the cloud has not answered yet"
        return layers[0] if layers else self._shared

    def _record_failure(self, error: Exception) -> None:
        """Record why there is no layer, and pause further requests."""
        self._trouble = self._make_safe(str(error))
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, FAILURE_PAUSE_SECONDS[1])
        logger.debug("no new layer: %s", self._trouble)  # `Answer.trouble` reports it to the caller

    def _clear_failure(self) -> None:
        """Clear the recorded failure and the pause."""
        self._trouble, self._pause, self._next_attempt = "", FAILURE_PAUSE_SECONDS[0], 0.0

    def _make_safe(self, text: str) -> str:
        """Return an error text without secrets and control characters."""
        return text if self._connection is None else self._connection.make_safe(text)

    def _fetch(
        self, feature: NDArray[np.float32], anchors: int, session: int, end: float, clock: "StageClock"
    ) -> tuple[Layer, Receipt]:
        """Return a verified layer for a feature, and the receipt that proves its origin.

        Raises:
            LayerUnavailable: no valid layer arrived by `end`.
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
            raise LayerUnavailable(f"the layer from the cloud was rejected ({error})") from error
        except CDCError as error:
            raise LayerUnavailable(str(error)) from error
        except Exception as error:  # no failure of the cloud may stop the device
            raise LayerUnavailable(f"{type(error).__name__}: {error}") from error

    def _request(self, upload: bytes, session: int, end: float, clock: "StageClock") -> bytes:
        """Return the reply to an upload, retrying until `end`.

        Raises:
            CDCError: no reply arrived in time, or the cloud refused the upload.
        """
        assert self._connection is not None
        wait, problem = BACKOFF_SECONDS, "the deadline passed before the request was sent"
        while end > time.monotonic() and session == self._session:
            pause = wait * random.uniform(0.5, 1.5)
            try:
                reply = self._connection.post(upload, self.model.layout.message_bytes, end)
            except Unreachable as error:
                problem = str(error)
            else:
                if reply.status == 200:
                    generating = _sum_server_timing(reply.headers.get("server-timing", ""))
                    clock.add("upload", 1000 * reply.waited_seconds - generating)
                    clock.add("generate", generating)
                    clock.add("download", 1000 * reply.read_seconds)
                    return reply.content
                reason = reply.content[:MAX_REASON_BYTES].decode("utf-8", "replace")
                problem = f"{reply.status} {reason}{self._connection.route}"
                if 300 <= reply.status < 400:
                    problem += f" to {reply.headers.get('location', '')}, not followed: check the cloud's URL (CLOUD=)"
                if reply.status not in (408, 429) and reply.status < 500:
                    raise LayerUnavailable(f"the cloud refused: {problem}")
                after = reply.headers.get("retry-after", "")
                pause = max(pause, float(after) if re.fullmatch(r"[0-9]{1,6}", after) else 0.0)
            if session == self._session:
                self._trouble = self._make_safe(f"the cloud has not answered yet ({problem})")
            wait *= 2
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
        raise LayerUnavailable(f"no layer before the deadline ({problem})")


class StageClock:
    """Milliseconds by stage; repeated stages add up."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the duration of a `with` block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, 1000 * (time.perf_counter() - start))

    def add(self, stage: str, milliseconds: float) -> None:
        """Add milliseconds to a stage."""
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + milliseconds


def _sum_server_timing(header: str) -> float:
    """Return the sum of the durations in a Server-Timing header, in milliseconds."""
    return sum(float(value) for value in re.findall(r"dur=([0-9]{1,9}(?:\.[0-9]{1,9})?)", header))
