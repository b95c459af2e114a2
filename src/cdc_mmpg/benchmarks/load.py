"""Load of well-behaved clients: each sends its next request, on its own connection, after the last reply."""

import asyncio
import itertools
import re
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, NamedTuple

from cdc_mmpg.deployment.local import read_page
from cdc_mmpg.errors import CDCError
from cdc_mmpg.wire.messages import LAYER_PATH, Layout, Versions, decode_layer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

WARM_UP_SHARE = 0.25  # duration of the warm-up before a turn, as share of the turn
VERIFY_EVERY = 50  # one reply in this many is verified


class ExpectedLayer(NamedTuple):
    """Data to verify a reply."""

    layout: Layout
    versions: Versions
    key: "Ed25519PublicKey"


class LoadOutcome(NamedTuple):
    """Figures of a server in a turn."""

    milliseconds: list[float]  # latency of each reply
    seconds: float  # duration of the turn
    processor: float  # CPU seconds of the client
    batch: float | None  # mean uploads per batch; None for the plain endpoint, which does not count them


def measure_load(
    port: int, uploads: Sequence[bytes], expected: ExpectedLayer, concurrency: int, seconds: float
) -> LoadOutcome:
    """Measure a server under `concurrency` clients, each of which sends its next request after the last reply.

    Raises:
        CDCError: a reply is not a valid layer, or the server ended.
    """
    before = read_batch_counts(port)
    milliseconds, duration, processor, kept = asyncio.run(run_clients(port, uploads, expected, concurrency, seconds))
    after = read_batch_counts(port)
    for upload, reply in kept:  # outside the timed turn, since it takes as long as generating one
        decode_layer(reply, upload, expected.layout, expected.versions, expected.key)
    batch = (after[0] - before[0]) / (after[1] - before[1]) if before and after else None
    return LoadOutcome(milliseconds, duration, processor, batch)


def read_batch_counts(port: int) -> tuple[float, float] | None:
    """Read sum and number of a service's batch sizes, weighted by upload; return None if it does not count them."""
    page = read_page(f"http://127.0.0.1:{port}/metrics") or ""
    counts = [re.search(rf"^cdc_mmpg_batch_{name} (\S+)", page, re.MULTILINE) for name in ("sum", "count")]
    return (float(counts[0][1]), float(counts[1][1])) if counts[0] and counts[1] else None


async def run_clients(
    port: int, uploads: Sequence[bytes], expected: ExpectedLayer, concurrency: int, seconds: float
) -> tuple[list[float], float, float, list[tuple[bytes, bytes]]]:
    """Return the milliseconds of replies in a turn, its seconds, the client's CPU seconds, and some exchanges.

    Raises:
        CDCError: a reply has another length than a layer, or the server ended.
    """
    loop, numbers = asyncio.get_running_loop(), itertools.count()
    milliseconds: list[float] = []
    kept: list[tuple[bytes, bytes]] = []
    start = time.perf_counter() + WARM_UP_SHARE * seconds
    end = start + seconds
    cpu_seconds = 0.0

    async def client(connection: socket.socket) -> None:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        view = memoryview(bytearray(expected.layout.message_bytes + 4096))
        while (sent := time.perf_counter()) < end:
            number = next(numbers)
            upload = uploads[number % len(uploads)]
            reply = await exchange_upload(loop, connection, upload, view)
            if len(reply) != expected.layout.message_bytes:
                raise CDCError(f"received a layer of {len(reply)} bytes, expected {expected.layout.message_bytes}")
            received = time.perf_counter()
            if start <= received < end:
                milliseconds.append(1000 * (received - sent))
            if number % VERIFY_EVERY == 0:
                kept.append((upload, bytes(reply)))

    async def measure_cpu() -> None:
        nonlocal cpu_seconds
        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        before = time.process_time()
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        cpu_seconds = time.process_time() - before

    try:
        with ExitStack() as stack:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(measure_cpu())
                for _ in range(concurrency):
                    connection = stack.enter_context(closing(socket.socket()))
                    connection.setblocking(False)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    tasks.create_task(client(connection))
    except ExceptionGroup as group:
        first = group.exceptions[0]
        if isinstance(first, OSError):
            raise CDCError(f"connection to the server lost: {first}") from first
        raise first from None
    return milliseconds, seconds, cpu_seconds, kept


async def exchange_upload(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, upload: bytes, view: memoryview
) -> memoryview:
    """Send an upload and return the reply's body in `view`; cheap, since client and servers share processors.

    Raises:
        CDCError: the reply is incomplete, too long, or a refusal.
    """
    headers = f"POST {LAYER_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    await loop.sock_sendall(connection, f"{headers}Content-Length: {len(upload)}\r\n\r\n".encode() + upload)
    total = body = received = 0
    while not total or received < total:
        if received == len(view):
            raise CDCError("the reply is longer than a layer")
        size = await loop.sock_recv_into(connection, view[received:])
        if not size:
            raise CDCError("the server closed the connection in the middle of a reply")
        received += size
        if not total and (head_end := bytes(view[:received][:4096]).find(b"\r\n\r\n")) >= 0:
            head = bytes(view[:head_end])
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                raise CDCError(f"the server refused: {bytes(view[:received][:500])!r}")
            body = head_end + 4
            total = body + int(length[1])
    return view[body:total]
