"""Hostile load: many clients at once on new connections, slow bodies, slow headers.

One thread with a selector drives thousands of connections, since a client slower than the service would measure itself.
Several addresses of this machine (127.0.0.2 and following) stand for several hosts; Linux has them all.
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
REPLY_SECONDS = 30.0  # maximum wait of a client for its reply
PIECE_SECONDS = 1.0  # interval between the bytes of a slow client
SLOW_HEADER_BYTES = 40  # header bytes that a client with slow headers sends at first
READ_BYTES = 1 << 20  # size of a read


class HostileOutcome(NamedTuple):
    """Counts and times of the requests of a group of clients."""

    layers: dict[bytes, bytes]  # last layer received for each upload
    milliseconds: list[float]  # from the start of a connection to the end of its layer, for each served request
    refused: int  # number of 503 replies
    lost: int  # number of requests with a broken connection, no reply or another status
    seconds: float  # duration of the load

    @property
    def served_share(self) -> float:
        """Share of all requests that were answered with a layer."""
        return len(self.milliseconds) / max(1, len(self.milliseconds) + self.refused + self.lost)


class LoadRequest:
    """A request on a new connection.

    Args:
        port: port of the service.
        source: IP address of the client.
        upload: body of the request.
    """

    def __init__(self, port: int, source: str, upload: bytes) -> None:
        self.source, self.upload, self.reply, self.sent = source, upload, bytearray(), False
        self.start = time.perf_counter()
        self.connection = begin_connection(port, source)

    def advance(self) -> bool:
        """Send or receive without blocking; return whether the exchange has ended."""
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
        """Status of a complete reply; 0 if there is none."""
        return int(self.reply[9:12]) if self.reply.startswith(b"HTTP/1.1 ") and self._is_complete() else 0

    @property
    def body(self) -> bytes:
        """Body of a complete reply."""
        return bytes(self.reply[self.reply.find(b"\r\n\r\n") + 4 :])


def read_content_length(head: bytes) -> int:
    """Return the Content-Length of a reply's headers; 0 if there is none."""
    _, name, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if name else 0


def begin_connection(port: int, source: str) -> socket.socket:
    """Return a socket that has started to connect from an address."""
    connection = socket.socket()
    connection.setblocking(False)
    if hasattr(socket, "IP_BIND_ADDRESS_NO_PORT"):  # a local port may then serve several destinations
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
    connection.bind((source, 0))
    with suppress(BlockingIOError):
        connection.connect(("127.0.0.1", port))
    return connection


def ask_many(
    port: int, sources: Sequence[str], uploads: Sequence[bytes], clients: int, seconds: float
) -> HostileOutcome:
    """Run `clients` concurrent clients for `seconds`, each of which opens a new connection for every request."""
    layers: dict[bytes, bytes] = {}
    milliseconds: list[float] = []
    counts: Counter[int] = Counter()
    start = time.perf_counter()
    end, started = start + seconds, 0
    with selectors.DefaultSelector() as selector:

        def begin() -> None:
            nonlocal started
            request = LoadRequest(port, sources[started % len(sources)], uploads[started % len(uploads)])
            selector.register(request.connection, selectors.EVENT_WRITE, request)
            started += 1

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
        unfinished = [key.data.connection for key in selector.get_map().values()]
    for connection in unfinished:
        connection.close()
    lost = sum(number for status, number in counts.items() if status not in (200, 503)) + len(unfinished)
    return HostileOutcome(layers, milliseconds, counts[503], lost, time.perf_counter() - start)


def find_local_addresses(number: int) -> list[str]:
    """Return at most `number` addresses of this machine; systems other than Linux may have only one."""
    addresses = []
    for last in range(2, 2 + number):
        with socket.socket() as connection, suppress(OSError):
            connection.bind((f"127.0.0.{last}", 0))
            addresses.append(f"127.0.0.{last}")
    return addresses or ["127.0.0.1"]


@contextmanager
def hold_slow_clients(port: int, sources: Sequence[str], number: int) -> Iterator[None]:
    """Keep `number` slow bodies and `number` slow headers at a service during the block."""
    stopped = threading.Event()
    thread = threading.Thread(target=_send_slowly, args=(port, sources, number, stopped))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _send_slowly(port: int, sources: Sequence[str], number: int, stopped: threading.Event) -> None:
    """Send a byte on each connection every `PIECE_SECONDS`, and reopen connections that the service closes."""
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
