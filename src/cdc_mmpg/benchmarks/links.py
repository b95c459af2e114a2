"""Links of a known rate and delay between two processes: a throttling proxy, or network namespaces with a shaped veth.

Namespaces need the rights of an administrator and iproute2; they and all that is in them go with the block.
"""

import asyncio
import fcntl
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_network
from typing import Any, NamedTuple, Protocol

from cdc_mmpg.deployment.local import suppress_stop_signals
from cdc_mmpg.errors import CDCError

MIB = 1024 * 1024
CONGESTION = "cubic"  # TCP's congestion control, which is the default of most machines
FRAME_BYTES = 1514  # largest that may pass at once: a bucket would pass a packet of 64 KB as one
BURST_SECONDS = 150e-6  # of a rate, at least two frames, that a token bucket passes at once
QUEUE_LIMIT = "16mb"  # that may wait for the link: nothing is dropped
CHUNK_BYTES = 16_384  # that the proxy carries at once
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


class LinkCounts(NamedTuple):
    """What passed a link since it was made."""

    up_bytes: int
    down_bytes: int
    up_packets: int  # 0 where there are none to count
    down_packets: int
    dropped: int


class Link(NamedTuple):
    """A way from the client to a service."""

    url: str
    counts: Callable[[], LinkCounts]


class Line:
    """One direction of a link: bytes leave it one after another at its rate, and arrive after its delay.

    Args:
        rate: bytes a second.
        delay: seconds.
    """

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay, self.passed_bytes, self._free = rate, delay, 0, 0.0

    def due(self, count_bytes: int, now: float) -> float:
        """Return when so many bytes that come now have arrived."""
        self.passed_bytes += count_bytes
        self._free = max(self._free, now) + count_bytes / self.rate
        return self._free + self.delay


class LoopThread:
    """An event loop in a thread of its own, for what stands between two processes."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> "LoopThread":
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def __exit__(self, *_: object) -> None:
        self.run(_cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def run_proxy(port: int, rate: float, delay: float = 0.0) -> Iterator[tuple[int, Line, Line]]:
    """Run a throttling proxy before a port of this machine; yield its own port, and its lines up and down.

    It ends connections itself: a handshake, and a window that is small at first, cost no round trip over it.

    Args:
        port: of the service.
        rate: bytes a second, either way.
        delay: seconds, either way.
    """
    up, down = Line(rate, delay), Line(rate, delay)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
        loop = asyncio.get_running_loop()
        end = 0.0
        with suppress(ConnectionError):
            while content := await reader.read(CHUNK_BYTES):
                end = line.due(len(content), loop.time())
                loop.call_at(end, writer.write, content)
        await asyncio.sleep(end - loop.time())  # what is on its way is before this in the loop
        with suppress(OSError, RuntimeError):
            writer.write_eof()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_service, of_service = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.gather(carry(reader, of_service, up), carry(to_service, writer, down))
        finally:
            writer.close()
            of_service.close()

    with LoopThread() as own:
        server = own.run(asyncio.start_server(connected, "127.0.0.1", 0))
        try:
            yield server.sockets[0].getsockname()[1], up, down
        finally:
            own.loop.call_soon_threadsafe(server.close)


class Network(Protocol):
    """Where service and client stand."""

    kind: str
    host: str  # that the service listens at

    def command(self, side: str) -> list[str]:
        """Return what a command of "server" or "client" begins with."""

    def direct(self, port: int) -> str:
        """Return the address of a service by a way that is not measured."""

    def link(self, port: int, rate: int, delay: float) -> Any:
        """Yield a `Link` to a service while a block runs; MiB/s, seconds each way."""

    def state(self) -> dict[str, str]:
        """Return the kernel's settings that matter."""


class Loopback:
    """Service and client on this machine's loopback device, with a proxy between them."""

    kind, host = "proxy", "127.0.0.1"

    def command(self, side: str) -> list[str]:
        """Return nothing: see `Network`."""
        return []

    def direct(self, port: int) -> str:
        """See `Network`."""
        return f"http://127.0.0.1:{port}"

    @contextmanager
    def link(self, port: int, rate: int, delay: float) -> Iterator[Link]:
        """See `Network`."""
        with run_proxy(port, rate * MIB, delay) as (own, up, down):
            yield Link(f"http://127.0.0.1:{own}", lambda: LinkCounts(up.passed_bytes, down.passed_bytes, 0, 0, 0))

    def state(self) -> dict[str, str]:
        """See `Network`."""
        return read_tcp_settings([])


class Namespaces:
    """Two network namespaces while a block runs, with a veth pair whose ends a token bucket shapes.

    Args:
        congestion: TCP's congestion control.

    Raises:
        CDCError: they cannot be made; why.
    """

    kind, host = "namespaces", "0.0.0.0"
    CLIENT, SERVER = "10.231.0.1", "10.231.0.2"
    FAR_CLIENT, FAR_SERVER = "10.231.0.5", "10.231.0.6"

    def __init__(self, congestion: str = CONGESTION) -> None:
        self.congestion = congestion
        self._names = {side: f"cdc-delay-{os.getpid()}-{side}" for side in ("client", "server")}

    def __enter__(self) -> "Namespaces":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for name in self._names.values():
            _run_tool("ip", "netns", "add", name)
        client, server = self._names["client"], self._names["server"]
        _run_tool("ip", "link", "add", "near", "netns", client, "type", "veth", "peer", "name", "near", "netns", server)
        for side, address in (("client", self.CLIENT), ("server", self.SERVER)):
            name = self._names[side]
            _run_tool("ip", "-n", name, "link", "set", "lo", "up")
            # Packets of more than a frame are not made; `delay.measure_cell` checks that.
            _run_tool("ip", "-n", name, "link", "set", "dev", "near", "gso_max_segs", "1")
            self._address(side, "near", address)

    def __exit__(self, *_: object) -> None:
        with suppress_stop_signals():
            for name in self._names.values():
                with suppress(CDCError):
                    _run_tool("ip", "netns", "del", name)

    def _address(self, side: str, device: str, address: str) -> None:
        """Give a device its address, and the congestion control to what goes its way."""
        name = self._names[side]
        _run_tool("ip", "-n", name, "addr", "add", f"{address}/30", "dev", device, "noprefixroute")
        _run_tool("ip", "-n", name, "link", "set", device, "up")
        net = str(ip_network(f"{address}/30", strict=False))
        _run_tool("ip", "-n", name, "route", "add", net, "dev", device, "congctl", self.congestion)

    def _shape(self, side: str, rate: int) -> None:
        burst = max(2 * FRAME_BYTES, int(BURST_SECONDS * rate * MIB))
        self._run(side, "tc", "qdisc", "replace", "dev", "near", "root", "tbf",
                  "rate", f"{rate * MIB}bps", "burst", str(burst), "limit", QUEUE_LIMIT)  # fmt: skip

    def _run(self, side: str, *command: str) -> str:
        return _run_tool("ip", "netns", "exec", self._names[side], *command)

    def command(self, side: str) -> list[str]:
        """See `Network`."""
        return [_find_program("ip"), "netns", "exec", self._names[side]]

    def direct(self, port: int) -> str:
        """See `Network`."""
        return f"http://{self.SERVER}:{port}"

    @contextmanager
    def link(self, port: int, rate: int, delay: float) -> Iterator[Link]:
        """See `Network`."""
        if delay:
            with self._far(rate, delay):
                yield Link(f"http://{self.FAR_SERVER}:{port}", lambda: self._counts("far"))
            return
        for side in self._names:
            self._shape(side, rate)
        yield Link(self.direct(port), lambda: self._counts("near"))

    def _counts(self, device: str) -> LinkCounts:
        folder = f"/sys/class/net/{device}/statistics"
        files = [f"{folder}/{name}" for name in ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")]
        dropped = 0
        if device == "near":
            shown = [self._run(side, "tc", "-s", "-j", "qdisc", "show", "dev", device) for side in self._names]
            dropped = sum(int(each["drops"]) for one in shown for each in json.loads(one))
        up, down, up_packets, down_packets = (int(value) for value in self._run("client", "cat", *files).split())
        return LinkCounts(up, down, up_packets, down_packets, dropped)

    @contextmanager
    def _far(self, rate: int, delay: float) -> Iterator[None]:
        """Run a link of two TUN devices; between them packets are carried by this process."""
        with ExitStack() as stack:
            ends = [
                stack.enter_context(self._tun(side, address))
                for side, address in (("client", self.FAR_CLIENT), ("server", self.FAR_SERVER))
            ]
            own = stack.enter_context(LoopThread())

            def carry(source: int, target: int, line: Line) -> None:
                with suppress(BlockingIOError):
                    while packet := os.read(source, 65_536):
                        own.loop.call_at(line.due(len(packet), own.loop.time()), _send, target, packet)

            async def begin() -> None:
                for source, target in (ends, ends[::-1]):
                    own.loop.add_reader(source, carry, source, target, Line(rate * MIB, delay))

            async def end() -> None:
                for source in ends:
                    own.loop.remove_reader(source)

            own.run(begin())
            try:
                yield
            finally:
                own.run(end())

    @contextmanager
    def _tun(self, side: str, address: str) -> Iterator[int]:
        """Yield the descriptor of a TUN device of a namespace."""
        device = f"cdc{side[0]}{os.getpid()}"
        name = self._names[side]
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        try:
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
            _run_tool("ip", "link", "set", device, "netns", name)
            _run_tool("ip", "-n", name, "link", "set", device, "name", "far", "txqueuelen", "20000")
            self._address(side, "far", address)
            yield descriptor
        finally:
            os.close(descriptor)  # and the device is gone

    def state(self) -> dict[str, str]:
        """See `Network`."""
        return {**read_tcp_settings(self.command("server")), "tcp_congestion_control": self.congestion}


def _send(target: int, packet: bytes) -> None:
    with suppress(OSError):  # full, or gone: a packet is lost, as on any link
        os.write(target, packet)


def read_tcp_settings(prefix: Sequence[str]) -> dict[str, str]:
    """Return TCP's settings where a command runs."""
    names = (
        "tcp_available_congestion_control",
        "tcp_congestion_control",
        "tcp_slow_start_after_idle",
        "tcp_rmem",
        "tcp_wmem",
    )
    done = subprocess.run(
        [*prefix, "cat", *(f"/proc/sys/net/ipv4/{name}" for name in names)], capture_output=True, text=True, check=False
    )
    return dict(zip(names, (" ".join(line.split()) for line in done.stdout.splitlines()), strict=False))


def _find_program(program: str) -> str:
    """Return the path of a program, also where only an administrator would look.

    Raises:
        CDCError: there is none.
    """
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if found is None:
        raise CDCError(f"no program {program}: install iproute2")
    return found


def _run_tool(program: str, *arguments: str) -> str:
    """Run a program and return what it prints.

    Raises:
        CDCError: it is not there, or failed.
    """
    done = subprocess.run([_find_program(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CDCError(f"{program} {' '.join(arguments)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
