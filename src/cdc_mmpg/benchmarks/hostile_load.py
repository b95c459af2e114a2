"""Clients that a service should survive: many at once on new connections, slow bodies, slow headers.

One thread and a selector drive thousands of connections: a client that is slower than the service would measure itself.
Several addresses of this machine (127.0.0.2 and on) stand for several hosts; Linux has them all.
"""

import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from cdc_mmpg.wire.messages import LAYER_PATH, UPLOAD_BYTES

REQUEST_HEADERS = (
    f"POST {LAYER_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    f"Content-Length: {UPLOAD_BYTES}\r\n\r\n"
).encode()
REPLY_SECONDS = 30.0  # that a client waits for its reply
PIECE_SECONDS = 1.0  # between two bytes of a slow client
SLOW_HEADER_BYTES = 40  # that a client with slow headers sends at once
READ_BYTES = 1 << 20


class HostileOutcome(NamedTuple):
    """Counts and times of the requests of some clients."""

    layers: dict[bytes, bytes]  # that were served, the last for each upload
    milliseconds: list[float]  # from the start of a connection to the end of its layer, of all that were served
    refused: int  # 503
    lost: int  # cut, without a reply, or with another one
    seconds: float

    @property
    def served_share(self) -> float:
        """Share of all requests that were answered by a layer."""
        return len(self.milliseconds) / max(1, len(self.milliseconds) + self.refused + self.lost)


class LoadRequest:
    """One request on a connection of its own.

    Args:
        port: of the service.
        source: the client's address.
        upload: the body.
    """

    def __init__(self, port: int, source: str, upload: bytes) -> None:
        self.source, self.upload, self.reply, self.sent = source, upload, bytearray(), False
        self.start = time.perf_counter()
        self.connection = begin_connection(port, source)

    def advance(self) -> bool:
        """Send or receive what can be; return whether the exchange has ended."""
        try:
            if not self.sent:
                self.connection.sendall(REQUEST_HEADERS + self.upload)  # fits the socket's buffer
                self.sent = True
                return False
            content = self.connection.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            return True
        self.reply += content
        return not content or self._is_complete()

    def _is_complete(self) -> bool:
        end = self.reply.find(b"\r\n\r\n")
        return end >= 0 and len(self.reply) >= end + 4 + read_content_length(bytes(self.reply[:end]))

    @property
    def status(self) -> int:
        """Status of a complete reply; 0 of none."""
        return int(self.reply[9:12]) if self.reply.startswith(b"HTTP/1.1 ") and self._is_complete() else 0

    @property
    def body(self) -> bytes:
        """Body of a complete reply."""
        return bytes(self.reply[self.reply.find(b"\r\n\r\n") + 4 :])


def read_content_length(head: bytes) -> int:
    """Return the length that a reply's headers declare; 0 where they declare none."""
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


def begin_connection(port: int, source: str) -> socket.socket:
    """Return a socket that begins to connect from an address."""
    connection = socket.socket()
    connection.setblocking(False)
    if hasattr(socket, "IP_BIND_ADDRESS_NO_PORT"):  # the kernel may use a port for several destinations
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
    connection.bind((source, 0))
    with suppress(BlockingIOError):
        connection.connect(("127.0.0.1", port))
    return connection


def ask_many(
    port: int, sources: Sequence[str], uploads: Sequence[bytes], clients: int, seconds: float
) -> HostileOutcome:
    """Return what came of so many clients at once, each of which asks again on a new connection when it has a reply."""
    layers: dict[bytes, bytes] = {}
    milliseconds: list[float] = []
    counts: Counter[int] = Counter()
    start = time.perf_counter()
    end, begun = start + seconds, 0
    with selectors.DefaultSelector() as selector:

        def begin() -> None:
            nonlocal begun
            request = LoadRequest(port, sources[begun % len(sources)], uploads[begun % len(uploads)])
            selector.register(request.connection, selectors.EVENT_WRITE, request)
            begun += 1

        for _ in range(clients):
            begin()
        while selector.get_map() and time.perf_counter() < end + REPLY_SECONDS:
            for key, _ in selector.select(1):
                request: LoadRequest = key.data
                if not request.advance():
                    if request.sent:
                        selector.modify(request.connection, selectors.EVENT_READ, request)
                    continue
                selector.unregister(request.connection)
                request.connection.close()
                counts[request.status] += 1
                if request.status == 200:
                    milliseconds.append(1000 * (time.perf_counter() - request.start))
                    layers[request.upload] = request.body
                if time.perf_counter() < end:
                    begin()
        left = [key.data.connection for key in selector.get_map().values()]
    for connection in left:
        connection.close()
    lost = sum(number for status, number in counts.items() if status not in (200, 503)) + len(left)
    return HostileOutcome(layers, milliseconds, counts[503], lost, time.perf_counter() - start)


def find_local_addresses(number: int) -> list[str]:
    """Return so many addresses of this machine; systems other than Linux may have one alone."""
    found = []
    for last in range(2, 2 + number):
        with socket.socket() as connection, suppress(OSError):
            connection.bind((f"127.0.0.{last}", 0))
            found.append(f"127.0.0.{last}")
    return found or ["127.0.0.1"]


@contextmanager
def hold_slow_clients(port: int, sources: Sequence[str], number: int) -> Iterator[None]:
    """Keep so many slow bodies and so many slow headers at a service until the end of the block."""
    stopped = threading.Event()
    thread = threading.Thread(target=_send_slowly, args=(port, sources, number, stopped))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _send_slowly(port: int, sources: Sequence[str], number: int, stopped: threading.Event) -> None:
    """Send a byte on each connection from time to time; open those anew that the service has closed."""
    starts = (REQUEST_HEADERS, REQUEST_HEADERS[:SLOW_HEADER_BYTES])
    held: dict[int, socket.socket] = {}
    while not stopped.is_set():
        for place in range(2 * number):
            try:
                if place in held:
                    held[place].send(b"0")
                else:
                    source = sources[place // 2 % len(sources)]
                    held[place] = socket.create_connection(("127.0.0.1", port), REPLY_SECONDS, (source, 0))
                    held[place].sendall(starts[place % 2])
            except OSError:
                if place in held:
                    held.pop(place).close()
        stopped.wait(PIECE_SECONDS)
    for connection in held.values():
        connection.close()
