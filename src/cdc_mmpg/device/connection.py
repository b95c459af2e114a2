"""The HTTP connection to the cloud: a POST that is over when its time is, whatever the other side sends or does not.

HTTP clients count a timeout anew with every read, so that a server which drips a byte a second holds its client for
ever. The core of httpx2 takes the sockets' part as an argument: here it is one that knows when a request has to end.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable
from functools import cached_property
from ipaddress import IPv6Address, ip_address, ip_network
from string import ascii_letters, digits
from typing import Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from cdc_mmpg.errors import CDCError, ConfigError

logger = logging.getLogger(__name__)

CONNECTION_KEPT_SECONDS = 5.0  # that an idle connection waits for the next request
MAX_SHOWN_CHARACTERS = 300  # of another machine's text


class Unreachable(CDCError):
    """The cloud did not answer this time; another attempt may succeed."""


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]  # names in lower case
    content: bytes  # no more than a little beyond the limit
    waited_seconds: float  # from the first byte of the request to the last of the reply's headers
    read_seconds: float  # for the content


class Connection:
    """A connection to one address of a cloud.

    Loopback addresses are never reached through a proxy; others as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say.
    Nothing of the environment is read, and no certificate loaded, before the first request: what is wrong with them is
    an error of that request.

    Attributes:
        bytes_up: of the bodies of requests that were answered.
        bytes_down: of the bodies of replies.
        proxy: through which requests go, without its credentials; "" is none.

    Args:
        url: "http://..." or "https://...", with the path of the service's root if it has one.
        path: of what is posted to, below it.
        key: for the cloud, where it wants one.

    Raises:
        ConfigError: a URL or a key that cannot be one; its message holds neither key nor password.
    """

    def __init__(self, url: str, path: str, key: str | None = None) -> None:
        base = check_url(url)
        self._url = base.copy_with(path=base.path.rstrip("/") + path)
        self._headers = [
            (b"Host", self._url.netloc),
            (b"Content-Type", b"application/octet-stream"),
            (b"Accept-Encoding", b"identity"),
        ]
        self._secrets = []
        if key is not None:
            check_key(key)
            self._headers.append((b"Authorization", f"Bearer {key}".encode()))
            self._secrets.append(key)
        self._sockets = _Sockets()
        self.proxy = ""
        self.bytes_up = self.bytes_down = 0

    def post(self, content: bytes, limit_bytes: int, end: float) -> Reply:
        """Send a body and return the reply, read no further than `limit_bytes` and a chunk.

        Args:
            content: the body.
            limit_bytes: of the reply's body.
            end: on `time.monotonic`'s clock; this method is over by then, but for the lookup of a name.

        Raises:
            Unreachable: not connected, no reply in time, or no HTTP.
            CDCError: another attempt would fail in the same way.
        """
        self._sockets.end.at = end
        headers = [*self._headers, (b"Content-Length", str(len(content)).encode())]
        start = time.perf_counter()
        try:
            pool = self._pool
            left = {"timeout": {"pool": max(0.0, end - time.monotonic())}}
            with pool.stream("POST", str(self._url), headers=headers, content=content, extensions=left) as response:
                self.bytes_up += len(content)
                came, body = time.perf_counter(), bytearray()
                for chunk in response.iter_stream():
                    body += chunk
                    self.bytes_down += len(chunk)
                    if len(body) > limit_bytes:
                        break
                found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                return Reply(response.status, found, bytes(body), came - start, time.perf_counter() - came)
        except CDCError:
            raise
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}{self.route}") from error
        except Exception as error:  # nothing of the environment or the cloud may end the device
            raise CDCError(f"{type(error).__name__}: {error}{self.route}") from error

    @property
    def route(self) -> str:
        """The proxy, if there is one, as the end of a message."""
        return f" (through the proxy {self.proxy})" if self.proxy else ""

    def make_safe(self, text: str) -> str:
        """Return a text as it may be printed: no secret, nothing that moves a terminal's cursor, not too long."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return make_printable(text)

    def close(self) -> None:
        """Close the connections that are kept."""
        if "_pool" in self.__dict__:
            self._pool.close()

    @cached_property
    def _pool(self) -> httpcore2.ConnectionPool:
        """The connections, made with the first request.

        Raises:
            CDCError: the environment names a proxy or certificates that cannot be used.
        """
        proxy = None
        if found := find_proxy(self._url):
            self._secrets += [text for text in (found.username, found.password) if len(text) > 2]
            self.proxy = f"{found.scheme}://{found.netloc.decode()}"
            logger.info("requests to %s go through the proxy %s", self._url.host, self.proxy)
            if found.scheme not in ("http", "https", "socks5", "socks5h"):
                raise CDCError(f"the environment names a proxy that is none of http, https and socks5{self.route}")
            plain = f"{self.proxy}/"
            auth = (found.username, found.password) if found.userinfo else None
            proxy = httpcore2.Proxy(plain, auth=auth)
        certificates = _load_certificates() if self._url.scheme == "https" else None
        return httpcore2.ConnectionPool(
            certificates, proxy=proxy, keepalive_expiry=CONNECTION_KEPT_SECONDS, network_backend=self._sockets
        )


def check_url(url: str) -> httpx2.URL:
    """Return the address of a cloud.

    Raises:
        ConfigError: it is none. What may hold a password is not repeated.
    """
    shown = repr(make_printable(url)) if isinstance(url, str) and not set("@?#") & set(url) else "what was given"
    remedy = "http://<host>[:<port>] or https://... is due (CLOUD=)"
    try:
        if not isinstance(url, str) or not url.isprintable() or " " in url:
            raise ValueError("it holds blanks or control characters, or is no text")
        found = httpx2.URL(url)
        if found.scheme not in ("http", "https"):
            raise ValueError("another scheme than http and https, or none")
        if not found.host:
            raise ValueError("it names no host")
        if found.port is not None and not 0 < found.port < 65_536:
            raise ValueError("ports go from 1 to 65535")
        host = found.raw_host.decode()
        if ":" in host:
            ip_address(host)
        elif not set(host) <= set(ascii_letters + digits + "-._"):
            raise ValueError("no host has such a name")
        host.encode("idna")  # as it is looked up
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        why = "" if shown == "what was given" else f" ({error})"
        raise ConfigError(f"{shown} is no address of a cloud{why}: {remedy}") from None
    if found.userinfo:
        raise ConfigError(f"the cloud's address holds a user or a password, which logs would show: give key=; {remedy}")
    if found.query or found.fragment:
        raise ConfigError(f"the cloud's address goes on after ? or #, which no request would send: {remedy}")
    return found


def check_key(key: str) -> None:
    """Refuse what cannot be sent as a key.

    Raises:
        ConfigError: it is empty, or holds what no header holds; the message does not repeat it.
    """
    remedy = "copy it anew, and leave it out where the cloud wants none (CDC_MMPG_KEY)"
    if not isinstance(key, str) or not key:
        raise ConfigError(f"the key is empty, or no text: {remedy}")
    wrong = [place for place, letter in enumerate(key) if not "!" <= letter <= "~"]
    if wrong:
        raise ConfigError(
            f"the key holds a blank, a line end or another character that is not visible ASCII, the first at place "
            f"{wrong[0] + 1} of {len(key)}: {remedy}"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: localhost, 127.0.0.0/8, ::1, the unspecified address, however written."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        try:
            address = ip_address(socket.inet_aton(host))  # 127.1, 0x7f000001
        except (OSError, ValueError):
            return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def find_proxy(url: httpx2.URL) -> httpx2.URL | None:
    """Return the proxy that the environment names for a URL, if there is one.

    Raises:
        CDCError: it names one that is no URL.
    """
    found = getproxies()
    chosen = found.get(url.scheme) or found.get("all")
    if not chosen or is_loopback(url.host) or proxy_bypass(url.host) or _is_excepted(url.host, found.get("no", "")):
        return None
    try:
        return httpx2.URL(chosen if "://" in chosen else f"http://{chosen}")
    except (httpx2.InvalidURL, ValueError) as error:
        raise CDCError(f"the environment's {url.scheme.upper()}_PROXY or ALL_PROXY is no URL") from error


def _is_excepted(host: str, exceptions: str) -> bool:
    """Return whether NO_PROXY holds a network that an address lies in."""
    for entry in exceptions.split(","):
        try:
            if ip_address(host) in ip_network(entry.strip(), strict=False):
                return True
        except ValueError:  # a name on either side
            continue
    return False


def _load_certificates() -> Any:
    """Return the TLS settings, with the certificates of the system or of SSL_CERT_FILE and SSL_CERT_DIR.

    Raises:
        CDCError: they cannot be read.
    """
    try:
        return httpcore2.default_ssl_context()
    except (OSError, ValueError) as error:
        places = [f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        raise CDCError(f"no certificates to check the cloud's with ({error}) {' '.join(places)}".rstrip()) from error


def make_printable(text: str) -> str:
    """Return a text on one line of a terminal: other characters than visible ones and blanks become "?"."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[: MAX_SHOWN_CHARACTERS + 1])
    return shown if len(shown) <= MAX_SHOWN_CHARACTERS else f"{shown[:MAX_SHOWN_CHARACTERS]}..."


class _Sockets(httpcore2.NetworkBackend):
    """Sockets of which none is waited for beyond the end of its thread's request."""

    def __init__(self) -> None:
        self._plain = httpcore2.SyncBackend()
        self.end = threading.local()  # .at: when this thread's request ends

    def seconds_left(self, error: type[Exception]) -> float:
        """Return the seconds that this thread's request has left.

        Raises:
            error: none.
        """
        if (left := self.end.at - time.monotonic()) <= 0:
            raise error("the time is over")
        return float(left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first of a name's addresses that answers; each has its share of the time."""
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(f"{host}: {error}") from error
        for others, (*_, address) in zip(range(len(addresses) - 1, -1, -1), addresses, strict=True):
            share = self.seconds_left(httpcore2.ConnectTimeout) / (others + 1)
            try:
                stream = self._plain.connect_tcp(str(address[0]), port, share, local_address, socket_options)
                return _Stream(stream, self)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if not others:
                    raise
        raise httpcore2.ConnectError(f"{host}: no address")


class _Stream(httpcore2.NetworkStream):
    """A socket of `_Sockets`."""

    def __init__(self, stream: httpcore2.NetworkStream, sockets: _Sockets) -> None:
        self._stream, self._sockets = stream, sockets

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what is there, at most so many bytes."""
        return self._stream.read(max_bytes, self._sockets.seconds_left(httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        self._stream.write(buffer, self._sockets.seconds_left(httpcore2.WriteTimeout))

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """Return the same connection, encrypted."""
        left = self._sockets.seconds_left(httpcore2.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._sockets)

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what the core asks of a socket."""
        return self._stream.get_extra_info(info)
