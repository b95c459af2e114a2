"""What one client may hold of a service, and how little a refusal costs: shares, counted refusals, a guarded listener.

A client is an address (of IPv6 the /64 network that one customer has) and, where keys are asked for, also its key.
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

DEFAULT_PLACES = 256  # requests of a process that are computed or sent at once
MAX_FILES = 65_536  # that a process may open at once, where the system allows it
MAX_CONNECTIONS = 8192  # of a process
SPARE_FILES = 128  # of the files that a process may open, which are not for connections
BACKLOG = 4096  # connections that the kernel keeps until they are accepted
ACCEPTS_PER_TURN = 32  # connections that are accepted before the loop looks after the others again
RETRY_SECONDS = 1  # that a client should wait after a 503
LOG_SECONDS = 1.0  # between two lines of the log about refusals of one kind

HEADER_SECONDS = 5.0  # from a connection, or a request's first byte on a kept one, to the end of its headers
KEEP_ALIVE_SECONDS = 60.0  # that a connection is kept for the next request: another one costs round trips
MAX_REPLY_SECONDS = 60.0  # from the headers to the last byte of the reply, which a client may read slowly

JSON_HEADER = (b"content-type", b"application/json")
CLOSE_HEADER = (b"connection", b"close")


class Shares:
    """A bounded number of places, shared so that no client can take all of them.

    A client may take another place while more are free than it holds: one alone gets half of them, two get a third
    each, and a newcomer always finds some free unless there are as many clients as places.

    Args:
        total: number of places.
    """

    def __init__(self, total: int) -> None:
        self.free = total
        self._held: Counter[Hashable] = Counter()

    def has_room(self, *clients: Hashable) -> bool:
        """Return whether each of the names of one client may take another place."""
        return all(self._held[client] < self.free for client in clients)

    def take(self, *clients: Hashable) -> bool:
        """Take a place under all of a client's names and return True, or return False where there is no room."""
        if not self.has_room(*clients):
            return False
        self.free -= 1
        self._held.update(clients)
        return True

    def give_back(self, *clients: Hashable) -> None:
        """Give back a place that was taken under these names."""
        self.free += 1
        self._held.subtract(clients)
        for client in clients:
            if not self._held[client]:
                del self._held[client]


class Refusals:
    """Counts refusals by kind; logs the first of a kind at once and further ones as one line a second.

    Args:
        replies: the metric that counts replies by status.
    """

    def __init__(self, replies: Metric) -> None:
        self._replies = replies
        self._counts: dict[tuple[int, str], int] = {}  # since the last line, by status and reason

    def count(self, status: int, reason: str) -> None:
        """Count a refusal; status 0 is a connection that was closed without a reply."""
        if status:
            self._replies.labels(status).inc()
        kind = status, reason
        self._counts[kind] = self._counts.get(kind, -1) + 1
        if self._counts[kind] == 0:
            self._write(kind, 1)

    def _write(self, kind: tuple[int, str], number: int) -> None:
        status, reason = kind
        logger.info("refused", extra={"fields": {"status": status, "reason": reason, "requests": number}})
        asyncio.get_running_loop().call_later(LOG_SECONDS, self._flush, kind)

    def _flush(self, kind: tuple[int, str]) -> None:
        number = self._counts[kind]
        if number:
            self._counts[kind] = 0
            self._write(kind, number)
        else:
            del self._counts[kind]


class Door:
    """The state that listener, protocol and application of one process share.

    Args:
        places: number of requests that may be computed or sent at once.
        connections: number of connections.
        replies: see `Refusals`.
    """

    def __init__(self, places: int, connections: int, replies: Metric) -> None:
        self.places, self.connections, self.refusals = Shares(places), Shares(connections), Refusals(replies)


def raise_file_limit() -> None:
    """Allow this process and its children as many files as a service may need, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def connection_limit() -> int:
    """Return how many connections this process can keep open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - SPARE_FILES))


def name_network(host: str) -> Hashable:
    """Return what stands for a client's address: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except OSError:
        return host
    return packed[:8] if any(packed[:8]) else packed  # ::1, and IPv4 addresses within IPv6


def encode_refusal(status: str, error: str, detail: str, *headers: tuple[bytes, bytes]) -> bytes:
    """Return a whole reply, after which the connection closes."""
    body = json.dumps({"error": error, "detail": detail}).encode()
    lines = [JSON_HEADER, (b"content-length", str(len(body)).encode()), CLOSE_HEADER, *headers]
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *(b"%s: %s" % line for line in lines), b"", body])


FULL_DETAIL = "all places are taken, or this client has its share of them"
FULL_REPLY = encode_refusal(
    "503 Service Unavailable", "full", FULL_DETAIL, (b"retry-after", str(RETRY_SECONDS).encode())
)  # fmt: skip


class CountedConnection(socket.socket):
    """An accepted connection, which calls `on_close` once when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close, and give the client's share back."""
        super().close()
        if self.on_close is not None:
            self.on_close()
            self.on_close = None


class Listener(socket.socket):
    """A listening socket that bounds connections by client, and refuses an upload before anything is built for it.

    When its client has no room an upload that has come whole is answered by one `send`: an overload then takes a tenth
    of the time that parsing and refusing it takes, and the loop is left to the requests that are inside.

    Args:
        listener: a bound socket, which is taken over.
        door: whom to let in.
    """

    def __init__(self, listener: socket.socket, door: Door) -> None:
        super().__init__(listener.family, listener.type, listener.proto, fileno=listener.detach())
        self._door = door

    def listen(self, backlog: int = 0) -> None:  # asyncio's is how many it accepts at once
        """Listen with a long queue."""
        super().listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection that is let in.

        Raises:
            BlockingIOError: there is none now, or it is time to look after those that are inside.
        """
        for _ in range(ACCEPTS_PER_TURN):
            connection, address = super().accept()
            client = name_network(address[0])
            if not self._door.connections.has_room(client):
                connection.close()
                self._door.refusals.count(0, "connections")
            elif not self._refuse_upload(connection, client):
                self._door.connections.take(client)
                kept = CountedConnection(self.family, self.type, self.proto, fileno=connection.detach())
                kept.on_close = partial(self._door.connections.give_back, client)
                return kept, address
        raise BlockingIOError

    def _refuse_upload(self, connection: socket.socket, client: Hashable) -> bool:
        """Refuse an upload that is here whole and has no room; return whether it was refused."""
        if self._door.places.has_room(client):
            return False
        with suppress(OSError):
            content = connection.recv(PEEK_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            end = content.find(b"\r\n\r\n")
            if content.startswith(UPLOAD_START) and 0 <= end <= len(content) - 4 - UPLOAD_BYTES:
                connection.recv(PEEK_BYTES, socket.MSG_DONTWAIT)  # what is not read makes the kernel drop the reply
                connection.send(FULL_REPLY, socket.MSG_DONTWAIT)
                connection.close()
                self._door.refusals.count(503, "full")
                return True
        return False


UPLOAD_START = f"POST {LAYER_PATH} HTTP/1.1\r\n".encode()
PEEK_BYTES = 16_384  # headers and body of an ordinary upload


class Loop(asyncio.SelectorEventLoop):
    """asyncio's event loop, whose servers listen through a `Listener`; `door` is set before the first of them."""

    door: Door

    async def create_server(  # type: ignore[override]  # of its forms the one that uvicorn uses
        self, *arguments: Any, sock: socket.socket, ssl: Any = None, **options: Any
    ) -> Any:
        """Serve a bound socket; a TLS handshake has as long as a request's headers."""
        seconds = HEADER_SECONDS if ssl else None
        return await super().create_server(
            *arguments, sock=Listener(sock, self.door), ssl=ssl, ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=seconds, **options,
        )  # fmt: skip


class Protocol(H11Protocol):
    """uvicorn's HTTP with a clock: it has none between a connection and the end of a request's headers."""

    _clock: asyncio.TimerHandle | None = None
    _idle = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers."""
        transport.set_write_buffer_limits(1, 0)  # a reply is sent when its last byte is in the socket's buffer
        # asyncio does so, but not for the sockets that several processes share: 40 ms between headers and body.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self.client = transport.get_extra_info("peername")[:2]  # uvicorn has none where the client has left already
        self._restart_clock(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Wait for a request's headers from its first bytes on."""
        if self._idle:
            self._idle = False
            self._restart_clock(HEADER_SECONDS)
        super().data_received(data)

    def handle_events(self) -> None:
        """Wait for the reply to a request that came."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._idle = False
            self._restart_clock(MAX_REPLY_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._idle = True
        self._restart_clock(KEEP_ALIVE_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock; count a client that left before its reply was complete."""
        if self._clock is not None:
            self._clock.cancel()
        if self._is_busy and not self.cycle.disconnected:
            self._refusals.count(0, "left")
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP as everything else is refused."""
        self._refusals.count(400, "http")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of a reply there is nothing to say
            self.transport.write(encode_refusal("400 Bad Request", "http", msg))
        if self.cycle is not None:
            self.cycle.disconnected = True  # whoever waits for the rest of a body is told that none comes
            self.cycle.message_event.set()
        self.transport.close()

    def _restart_clock(self, seconds: float) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if not self._idle and not self._is_busy:
            self._refusals.count(0, "slow")
        self.transport.abort()

    @property
    def _is_busy(self) -> bool:
        """Whether a request waits for the end of its reply."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _refusals(self) -> Refusals:
        assert isinstance(self.loop, Loop)
        return self.loop.door.refusals
