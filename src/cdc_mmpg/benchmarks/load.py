"""A load of well-behaved clients: each asks again, on its own connection, as soon as it has its reply."""

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

LEAD_SHARE = 0.25  # of a turn's seconds, before its clock starts
VERIFY_EVERY = 50  # every so many replies one signature


class ExpectedLayer(NamedTuple):
    """What a reply has to be."""

    layout: Layout
    versions: Versions
    key: "Ed25519PublicKey"


class LoadOutcome(NamedTuple):
    """What a server did in a turn."""

    milliseconds: list[float]  # of each reply
    seconds: float
    processor: float  # seconds of it that the client took
    batch: float | None  # uploads answered at once, in the mean; the plain one does not count


def measure_load(
    port: int, uploads: Sequence[bytes], expected: ExpectedLayer, concurrency: int, seconds: float
) -> LoadOutcome:
    """Measure a server under so many clients at once, each of which asks again as soon as it has its reply.

    Raises:
        CDCError: a reply is not what it should be.
    """
    before = read_batch_counts(port)
    milliseconds, taken, processor, kept = asyncio.run(run_clients(port, uploads, expected, concurrency, seconds))
    after = read_batch_counts(port)
    for upload, reply in kept:  # after the clock: it takes as long as making one
        decode_layer(reply, upload, expected.layout, expected.versions, expected.key)
    batch = (after[0] - before[0]) / (after[1] - before[1]) if before and after else None
    return LoadOutcome(milliseconds, taken, processor, batch)


def read_batch_counts(port: int) -> tuple[float, float] | None:
    """Return the sum of a service's batch sizes and their number, weighted by upload; None where it counts none."""
    page = read_page(f"http://127.0.0.1:{port}/metrics") or ""
    counts = [re.search(rf"^cdc_mmpg_batch_{name} (\S+)", page, re.MULTILINE) for name in ("sum", "count")]
    return (float(counts[0][1]), float(counts[1][1])) if counts[0] and counts[1] else None


async def run_clients(
    port: int, uploads: Sequence[bytes], expected: ExpectedLayer, concurrency: int, seconds: float
) -> tuple[list[float], float, float, list[tuple[bytes, bytes]]]:
    """Return the milliseconds of replies within the seconds, those seconds, the client's CPU seconds, and some replies.

    Raises:
        CDCError: a reply is not what it should be.
    """
    loop, numbers = asyncio.get_running_loop(), itertools.count()
    milliseconds: list[float] = []
    kept: list[tuple[bytes, bytes]] = []
    start = time.perf_counter() + LEAD_SHARE * seconds
    end = start + seconds
    worked = 0.0

    async def client(connection: socket.socket) -> None:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        view = memoryview(bytearray(expected.layout.message_bytes + 4096))
        while (sent := time.perf_counter()) < end:
            number = next(numbers)
            upload = uploads[number % len(uploads)]
            reply = await exchange_upload(loop, connection, upload, view)
            if len(reply) != expected.layout.message_bytes:
                raise CDCError(f"a layer of {len(reply)} bytes: {expected.layout.message_bytes} are due")
            came = time.perf_counter()
            if start <= came < end:
                milliseconds.append(1000 * (came - sent))
            if number % VERIFY_EVERY == 0:
                kept.append((upload, bytes(reply)))

    async def watch() -> None:
        nonlocal worked
        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        before = time.process_time()
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        worked = time.process_time() - before

    try:
        with ExitStack() as stack:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(watch())
                for _ in range(concurrency):
                    connection = stack.enter_context(closing(socket.socket()))
                    connection.setblocking(False)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    tasks.create_task(client(connection))
    except ExceptionGroup as group:
        first = group.exceptions[0]
        if isinstance(first, OSError):
            raise CDCError(f"a server is not there any more: {first}") from first
        raise first from None
    return milliseconds, seconds, worked, kept


async def exchange_upload(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, upload: bytes, view: memoryview
) -> memoryview:
    """Return the body of the reply to an upload, in `view`, with little work: it runs on the servers' processors.

    Raises:
        CDCError: the reply is none, or a refusal.
    """
    headers = f"POST {LAYER_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    await loop.sock_sendall(connection, f"{headers}Content-Length: {len(upload)}\r\n\r\n".encode() + upload)
    whole = body = came = 0
    while not whole or came < whole:
        if came == len(view):
            raise CDCError("a reply that is longer than a layer")
        size = await loop.sock_recv_into(connection, view[came:])
        if not size:
            raise CDCError("a server closed the connection in the middle of a reply")
        came += size
        if not whole and (ended := bytes(view[:came][:4096]).find(b"\r\n\r\n")) >= 0:
            head = bytes(view[:ended])
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                raise CDCError(f"a server refused: {bytes(view[:came][:500])!r}")
            body = ended + 4
            whole = body + int(length[1])
    return view[body:whole]
