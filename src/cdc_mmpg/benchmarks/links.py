"""Links of a known rate and delay between two processes: a throttling proxy, or network namespaces with a shaped veth.

Namespaces need root and iproute2; they and everything in them are deleted after the block.
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
CONGESTION = "cubic"  # TCP congestion control, the default of most machines
FRAME_BYTES = 1514  # largest packet allowed: a token bucket would pass a packet of 64 KB as one
BURST_SECONDS = 150e-6  # burst of a token bucket as seconds of its rate; at least two frames
QUEUE_LIMIT = "16mb"  # queue of the link, large enough that nothing is dropped
CHUNK_BYTES = 16_384  # size of the proxy's reads
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


class LinkCounts(NamedTuple):
    """Bytes and packets that passed a link since its creation."""

    up_bytes: int
    down_bytes: int
    up_packets: int  # 0 if the link does not count packets
    down_packets: int
    dropped: int


class Link(NamedTuple):
    """A link from the client to a service."""

    url: str
    counts: Callable[[], LinkCounts]


class Line:
    """One direction of a link: bytes are sent one after another at its rate, and arrive after its delay.

    Args:
        rate: rate in bytes per second.
        delay: delay in seconds.
    """

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay, self.passed_bytes, self._free = rate, delay, 0, 0.0

    def schedule_arrival(self, count_bytes: int, now: float) -> float:
        """Send `count_bytes` at the time `now`, and return the time of their arrival."""
        self.passed_bytes += count_bytes
        self._free = max(self._free, now) + count_bytes / self.rate
        return self._free + self.delay


class LoopThread:
    """An event loop in a separate thread, for the forwarding between two processes."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> "LoopThread":
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the thread and return its result."""
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
    """Run a throttling proxy in front of a local port; yield the proxy's port, and its lines up and down.

    The proxy terminates TCP connections, so handshakes and small initial windows cost no round trip over it.

    Args:
        port: port of the service.
        rate: rate in bytes per second, in each direction.
        delay: delay in seconds, in each direction.
    """
    up, down = Line(rate, delay), Line(rate, delay)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
        loop = asyncio.get_running_loop()
        end = 0.0
        with suppress(ConnectionError):
            while content := await reader.read(CHUNK_BYTES):
                end = line.schedule_arrival(len(content), loop.time())
                loop.call_at(end, writer.write, content)
        await asyncio.sleep(end - loop.time())  # let writes that are already scheduled run first
        with suppress(OSError, RuntimeError):
            writer.write_eof()

    async def handle_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            service_reader, service_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.gather(carry(reader, service_writer, up), carry(service_reader, writer, down))
        finally:
            writer.close()
            service_writer.close()

    with LoopThread() as thread:
        server = thread.run(asyncio.start_server(handle_connection, "127.0.0.1", 0))
        try:
            yield server.sockets[0].getsockname()[1], up, down
        finally:
            thread.loop.call_soon_threadsafe(server.close)


class Network(Protocol):
    """A network that connects service and client."""

    kind: str
    host: str  # address at which the service listens

    def command_prefix(self, side: str) -> list[str]:
        """Return the words before a command of a side, "server" or "client"."""

    def direct_url(self, port: int) -> str:
        """Return the URL of a service that bypasses the measured link."""

    def link(self, port: int, rate: int, delay: float) -> Any:
        """Yield a `Link` to a service during a block; rate in MiB/s, delay in seconds each way."""

    def read_settings(self) -> dict[str, str]:
        """Return the kernel's TCP settings."""


class Loopback:
    """Service and client on this machine's loopback device, with a proxy between them."""

    kind, host = "proxy", "127.0.0.1"

    def command_prefix(self, side: str) -> list[str]:
        """See `Network`."""
        return []

    def direct_url(self, port: int) -> str:
        """See `Network`."""
        return f"http://127.0.0.1:{port}"

    @contextmanager
    def link(self, port: int, rate: int, delay: float) -> Iterator[Link]:
        """See `Network`."""
        with run_proxy(port, rate * MIB, delay) as (proxy, up, down):
            yield Link(f"http://127.0.0.1:{proxy}", lambda: LinkCounts(up.passed_bytes, down.passed_bytes, 0, 0, 0))

    def read_settings(self) -> dict[str, str]:
        """See `Network`."""
        return read_tcp_settings([])


class Namespaces:
    """Two network namespaces during a block, connected by a veth pair with a token bucket at each end.

    Args:
        congestion: TCP congestion control.

    Raises:
        CDCError: the namespaces cannot be created; with the reason.
    """

    kind, host = "namespaces", "0.0.0.0"
    CLIENT, SERVER = "10.231.0.1", "10.231.0.2"
    FAR_CLIENT, FAR_SERVER = "10.231.0.5", "10.231.0.6"

    def __init__(self, congestion: str = CONGESTION) -> None:
        self.congestion = congestion
        self._names = {side: f"cdc-delay-{os.getpid()}-{side}" for side in ("client", "server")}

    def __enter__(self) -> "Namespaces":
        try:
            self._create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _create(self) -> None:
        for name in self._names.values():
            _run_tool("ip", "netns", "add", name)
        client, server = self._names["client"], self._names["server"]
        _run_tool("ip", "link", "add", "near", "netns", client, "type", "veth", "peer", "name", "near", "netns", server)
        for side, address in (("client", self.CLIENT), ("server", self.SERVER)):
            name = self._names[side]
            _run_tool("ip", "-n", name, "link", "set", "lo", "up")
            # Disables packets larger than a frame, which `delay.measure_cell` checks.
            _run_tool("ip", "-n", name, "link", "set", "dev", "near", "gso_max_segs", "1")
            self._configure_address(side, "near", address)

    def __exit__(self, *_: object) -> None:
        with suppress_stop_signals():
            for name in self._names.values():
                with suppress(CDCError):
                    _run_tool("ip", "netns", "del", name)

    def _configure_address(self, side: str, device: str, address: str) -> None:
        """Assign an address to a network device, and set the congestion control of its route."""
        name = self._names[side]
        _run_tool("ip", "-n", name, "addr", "add", f"{address}/30", "dev", device, "noprefixroute")
        _run_tool("ip", "-n", name, "link", "set", device, "up")
        net = str(ip_network(f"{address}/30", strict=False))
        _run_tool("ip", "-n", name, "route", "add", net, "dev", device, "congctl", self.congestion)

    def _limit_rate(self, side: str, rate: int) -> None:
        burst = max(2 * FRAME_BYTES, int(BURST_SECONDS * rate * MIB))
        self._run(side, "tc", "qdisc", "replace", "dev", "near", "root", "tbf",
                  "rate", f"{rate * MIB}bps", "burst", str(burst), "limit", QUEUE_LIMIT)  # fmt: skip

    def _run(self, side: str, *command: str) -> str:
        return _run_tool("ip", "netns", "exec", self._names[side], *command)

    def command_prefix(self, side: str) -> list[str]:
        """See `Network`."""
        return [_find_program("ip"), "netns", "exec", self._names[side]]

    def direct_url(self, port: int) -> str:
        """See `Network`."""
        return f"http://{self.SERVER}:{port}"

    @contextmanager
    def link(self, port: int, rate: int, delay: float) -> Iterator[Link]:
        """See `Network`."""
        if delay:
            with self._run_far_link(rate, delay):
                yield Link(f"http://{self.FAR_SERVER}:{port}", lambda: self._read_counts("far"))
            return
        for side in self._names:
            self._limit_rate(side, rate)
        yield Link(self.direct_url(port), lambda: self._read_counts("near"))

    def _read_counts(self, device: str) -> LinkCounts:
        folder = f"/sys/class/net/{device}/statistics"
        files = [f"{folder}/{name}" for name in ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")]
        dropped = 0
        if device == "near":
            outputs = [self._run(side, "tc", "-s", "-j", "qdisc", "show", "dev", device) for side in self._names]
            dropped = sum(int(queue["drops"]) for output in outputs for queue in json.loads(output))
        up, down, up_packets, down_packets = (int(value) for value in self._run("client", "cat", *files).split())
        return LinkCounts(up, down, up_packets, down_packets, dropped)

    @contextmanager
    def _run_far_link(self, rate: int, delay: float) -> Iterator[None]:
        """Run a link of two TUN devices, between which this process forwards packets."""
        with ExitStack() as stack:
            ends = [
                stack.enter_context(self._open_tun(side, address))
                for side, address in (("client", self.FAR_CLIENT), ("server", self.FAR_SERVER))
            ]
            thread = stack.enter_context(LoopThread())

            def carry(source: int, target: int, line: Line) -> None:
                with suppress(BlockingIOError):
                    while packet := os.read(source, 65_536):
                        arrival = line.schedule_arrival(len(packet), thread.loop.time())
                        thread.loop.call_at(arrival, _write_packet, target, packet)

            async def begin() -> None:
                for source, target in (ends, ends[::-1]):
                    thread.loop.add_reader(source, carry, source, target, Line(rate * MIB, delay))

            async def end() -> None:
                for source in ends:
                    thread.loop.remove_reader(source)

            thread.run(begin())
            try:
                yield
            finally:
                thread.run(end())

    @contextmanager
    def _open_tun(self, side: str, address: str) -> Iterator[int]:
        """Create a TUN device in a namespace and yield its file descriptor."""
        device = f"cdc{side[0]}{os.getpid()}"
        name = self._names[side]
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        try:
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
            _run_tool("ip", "link", "set", device, "netns", name)
            _run_tool("ip", "-n", name, "link", "set", device, "name", "far", "txqueuelen", "20000")
            self._configure_address(side, "far", address)
            yield descriptor
        finally:
            os.close(descriptor)  # also deletes the device

    def read_settings(self) -> dict[str, str]:
        """See `Network`."""
        return {**read_tcp_settings(self.command_prefix("server")), "tcp_congestion_control": self.congestion}


def _write_packet(target: int, packet: bytes) -> None:
    with suppress(OSError):  # queue full or device deleted: the packet is lost, as on a real link
        os.write(target, packet)


def read_tcp_settings(prefix: Sequence[str]) -> dict[str, str]:
    """Read TCP's settings in the namespace of a command prefix."""
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
    """Return the path of a program, also searching /usr/sbin and /sbin.

    Raises:
        CDCError: the program is not installed.
    """
    path = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if path is None:
        raise CDCError(f"program {program} not found: install iproute2")
    return path


def _run_tool(program: str, *arguments: str) -> str:
    """Run a program and return its output.

    Raises:
        CDCError: the program is not installed, or failed.
    """
    done = subprocess.run([_find_program(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CDCError(f"{program} {' '.join(arguments)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
