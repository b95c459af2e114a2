"""Limits per client and cheap refusals: fair shares, counted refusals, a listener that refuses before parsing.

A client is an address (for IPv6 its /64 network, which one customer has) and, if keys are required, also its key.
"""

import asyncio
import json
import resource
import socket
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any

import h11
from prometheus_client import Counter as Metric
from uvicorn.protocols.http.h11_impl import H11Protocol

from cdc_mmpg.cloud.logs import logger
from cdc_mmpg.wire.messages import LAYER_PATH, UPLOAD_BYTES

DEFAULT_PLACES = 256  # maximum requests in flight per process
MAX_FILES = 65_536  # open files per process that are requested from the system
MAX_CONNECTIONS = 8192  # per process
SPARE_FILES = 128  # open files per process that are reserved for other uses than connections
BACKLOG = 4096  # connections that the kernel queues until they are accepted
ACCEPTS_PER_TURN = 32  # connections accepted per turn of the event loop
RETRY_SECONDS = 1  # value of Retry-After in a 503
LOG_SECONDS = 1.0  # interval of the log lines about refusals of one kind

HEADER_SECONDS = 5.0  # time limit for headers, from the connection or the first byte of a further request
KEEP_ALIVE_SECONDS = 60.0  # time that an idle connection stays open, since a new one costs round trips
MAX_REPLY_SECONDS = 60.0  # time limit from the headers to the last byte of the reply, which a client may read slowly
MAX_FILE_SECONDS = 600.0  # the same for a GET: a phone loads 8 MB of the page's files

JSON_HEADER = (b"content-type", b"application/json")
CLOSE_HEADER = (b"connection", b"close")


class Shares:
    """A bounded number of places, shared so that no client can take all of them.

    A client may take another place while more are free than it holds: a single client gets half of them, two get a
    third each, and a new client always finds free places unless there are as many clients as places.

    Args:
        total: number of places.
    """

    def __init__(self, total: int) -> None:
        self.free = total
        self._held: Counter[Hashable] = Counter()

    def has_room(self, *clients: Hashable) -> bool:
        """Return whether a client may take another place under each of its names."""
        return all(self._held[client] < self.free for client in clients)

    def take(self, *clients: Hashable) -> bool:
        """Take a place under all names of a client; return whether there was room."""
        if not self.has_room(*clients):
            return False
        self.free -= 1
        self._held.update(clients)
        return True

    def give_back(self, *clients: Hashable) -> None:
        """Release a place that was taken under these names."""
        self.free += 1
        self._held.subtract(clients)
        for client in clients:
            if not self._held[client]:
                del self._held[client]


class Refusals:
    """Counter of refusals by kind, which logs the first of a kind at once and then one line per second.

    Args:
        replies: metric that counts replies by status.
    """

    def __init__(self, replies: Metric) -> None:
        self._replies = replies
        self._counts: dict[tuple[int, str], int] = {}  # since the last log line, by status and reason

    def count(self, status: int, reason: str) -> None:
        """Count a refusal; status 0 means a connection closed without a reply."""
        if status:
            self._replies.labels(status).inc()
        kind = status, reason
        self._counts[kind] = self._counts.get(kind, -1) + 1
        if self._counts[kind] == 0:
            self._log_count(kind, 1)

    def _log_count(self, kind: tuple[int, str], number: int) -> None:
        status, reason = kind
        logger.info("refused", extra={"fields": {"status": status, "reason": reason, "requests": number}})
        asyncio.get_running_loop().call_later(LOG_SECONDS, self._flush, kind)

    def _flush(self, kind: tuple[int, str]) -> None:
        number = self._counts[kind]
        if number:
            self._counts[kind] = 0
            self._log_count(kind, number)
        else:
            del self._counts[kind]


class Door:
    """Admission state that listener, protocol and application of one process share.

    Args:
        places: maximum number of requests in flight.
        connections: maximum number of connections.
        replies: metric that counts replies by status.
    """

    def __init__(self, places: int, connections: int, replies: Metric) -> None:
        self.places, self.connections, self.refusals = Shares(places), Shares(connections), Refusals(replies)


def raise_file_limit() -> None:
    """Raise the open-file limit of this process and its children to `MAX_FILES`, or to the hard limit if lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, target), hard))


def compute_connection_limit() -> int:
    """Return the number of connections that this process can keep open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - SPARE_FILES))


def name_network(host: str) -> Hashable:
    """Return the network that identifies a client: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except OSError:
        return host
    return packed[:8] if any(packed[:8]) else packed  # whole address for ::1 and IPv4-mapped addresses


def encode_refusal(status: str, error: str, detail: str, *headers: tuple[bytes, bytes]) -> bytes:
    """Return a complete HTTP reply that closes the connection."""
    body = json.dumps({"error": error, "detail": detail}).encode()
    lines = [JSON_HEADER, (b"content-length", str(len(body)).encode()), CLOSE_HEADER, *headers]
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *(b"%s: %s" % line for line in lines), b"", body])


FULL_DETAIL = "too many requests in flight, or this client has reached its share: retry later"
FULL_REPLY = encode_refusal(
    "503 Service Unavailable", "full", FULL_DETAIL, (b"retry-after", str(RETRY_SECONDS).encode())
)  # fmt: skip


class CountedConnection(socket.socket):
    """An accepted connection that calls `on_close` once, when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close the socket and call `on_close`."""
        super().close()
        if self.on_close is not None:
            self.on_close()
            self.on_close = None


class Listener(socket.socket):
    """A listening socket that limits connections per client, and refuses uploads before they are parsed.

    If its client has no room, an upload that has arrived completely is refused with a single `send`. Under overload
    this takes a tenth of the time of parsing and refusing it, and leaves the loop to the admitted requests.

    Args:
        listener: bound socket, whose file descriptor is taken over.
        door: admission state of this process.
    """

    def __init__(self, listener: socket.socket, door: Door) -> None:
        super().__init__(listener.family, listener.type, listener.proto, fileno=listener.detach())
        self._door = door

    def listen(self, backlog: int = 0) -> None:  # asyncio passes its accepts per turn
        """Listen with a queue of `BACKLOG` connections."""
        super().listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next admitted connection.

        Raises:
            BlockingIOError: no connection is queued, or `ACCEPTS_PER_TURN` were handled in this turn.
        """
        for _ in range(ACCEPTS_PER_TURN):
            connection, address = super().accept()
            client = name_network(address[0])
            if not self._door.connections.has_room(client):
                connection.close()
                self._door.refusals.count(0, "connections")
            elif not self._refuse_upload(connection, client):
                self._door.connections.take(client)
                admitted = CountedConnection(self.family, self.type, self.proto, fileno=connection.detach())
                admitted.on_close = partial(self._door.connections.give_back, client)
                return admitted, address
        raise BlockingIOError

    def _refuse_upload(self, connection: socket.socket, client: Hashable) -> bool:
        """Refuse an upload that has arrived completely if its client has no room; return whether it was refused."""
        if self._door.places.has_room(client):
            return False
        with suppress(OSError):
            content = connection.recv(PEEK_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            end = content.find(b"\r\n\r\n")
            if content.startswith(UPLOAD_START) and 0 <= end <= len(content) - 4 - UPLOAD_BYTES:
                connection.recv(PEEK_BYTES, socket.MSG_DONTWAIT)  # unread data would make the kernel drop the reply
                connection.send(FULL_REPLY, socket.MSG_DONTWAIT)
                connection.close()
                self._door.refusals.count(503, "full")
                return True
        return False


UPLOAD_START = f"POST {LAYER_PATH} HTTP/1.1\r\n".encode()
PEEK_BYTES = 16_384  # more than the headers and body of a normal upload


class Loop(asyncio.SelectorEventLoop):
    """asyncio event loop whose servers use a `Listener`; `door` must be set before the first server starts."""

    door: Door

    async def create_server(  # type: ignore[override]  # only the form that uvicorn uses
        self, *arguments: Any, sock: socket.socket, ssl: Any = None, **options: Any
    ) -> Any:
        """Serve a bound socket; a TLS handshake has the same time limit as headers."""
        seconds = HEADER_SECONDS if ssl else None
        return await super().create_server(
            *arguments, sock=Listener(sock, self.door), ssl=ssl, ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=seconds, **options,
        )  # fmt: skip


class Protocol(H11Protocol):
    """uvicorn's HTTP protocol with timeouts; uvicorn has none between a connection and the end of the headers."""

    _timer: asyncio.TimerHandle | None = None
    _idle = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the first headers."""
        transport.set_write_buffer_limits(1, 0)  # a reply counts as sent when its last byte is in the socket's buffer
        # asyncio sets this too, but not on sockets shared by processes: without it, the body arrives 40 ms late.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self.client = transport.get_extra_info("peername")[:2]  # uvicorn sets none if the client has disconnected
        self._restart_timer(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Restart the timeout for headers at the first bytes of a further request."""
        if self._idle:
            self._idle = False
            self._restart_timer(HEADER_SECONDS)
        super().data_received(data)

    def handle_events(self) -> None:
        """Start the timeout for the reply when a request has arrived."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._idle = False
            self._restart_timer(MAX_FILE_SECONDS if self.cycle.scope["method"] == "GET" else MAX_REPLY_SECONDS)

    def on_response_complete(self) -> None:
        """Start the timeout for the next request."""
        self._idle = True
        self._restart_timer(KEEP_ALIVE_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout; count a client that disconnected before its reply was complete."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_busy and not self.cycle.disconnected:
            self._refusals.count(0, "left")
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP, with the same JSON body as other refusals."""
        self._refusals.count(400, "http")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # not in the middle of a reply
            self.transport.write(encode_refusal("400 Bad Request", "http", msg))
        if self.cycle is not None:
            self.cycle.disconnected = True  # wakes the reader of a body that will not arrive
            self.cycle.message_event.set()
        self.transport.close()

    def _restart_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if not self._idle and not self._is_busy:
            self._refusals.count(0, "slow")
        self.transport.abort()

    @property
    def _is_busy(self) -> bool:
        """Whether a reply is due or being sent."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _refusals(self) -> Refusals:
        assert isinstance(self.loop, Loop)
        return self.loop.door.refusals
