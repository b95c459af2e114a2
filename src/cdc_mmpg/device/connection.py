"""The HTTP connection to the cloud: a POST with a hard deadline, whatever the server sends or withholds.

HTTP clients restart their timeout with every read, so a server that sends one byte per second blocks its client
forever. The core of httpx2 accepts a custom network backend: the one here enforces the deadline of the request.
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

KEEP_ALIVE_SECONDS = 5.0  # time that an idle connection stays open for the next request
MAX_SHOWN_CHARACTERS = 300  # longest excerpt of a text from another machine


class Unreachable(CDCError):
    """Transient failure: the cloud did not answer; a retry may succeed."""


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]  # names in lower case
    content: bytes  # at most one chunk more than the limit
    waited_seconds: float  # from the start of the request to the end of the response headers
    read_seconds: float  # duration of reading the content


class Connection:
    """A connection to one endpoint of a cloud.

    Loopback addresses are never reached through a proxy; others follow HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.
    The environment and the certificates are read at the first request, which reports any error in them.

    Attributes:
        bytes_up: bytes in the bodies of all requests that were answered.
        bytes_down: bytes in the bodies of all responses.
        proxy: URL of the proxy in use, without credentials; "" without a proxy.

    Args:
        url: "http://..." or "https://...", with the path of the service's root if it has one.
        path: path of the endpoint, relative to the service's root.
        key: access key of the cloud, if it requires one.

    Raises:
        ConfigError: the URL or the key is invalid; the message contains neither key nor password.
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
        self._backend = _DeadlineBackend()
        self.proxy = ""
        self.bytes_up = self.bytes_down = 0

    def post(self, content: bytes, limit_bytes: int, end: float) -> Reply:
        """Post a body and return the reply, whose body is read up to `limit_bytes` plus one chunk.

        Args:
            content: body of the request.
            limit_bytes: maximum length of the reply's body.
            end: deadline on the clock of `time.monotonic`; only a DNS lookup may exceed it.

        Raises:
            Unreachable: transient failure: no connection, no reply in time, or invalid HTTP.
            CDCError: permanent failure: a retry would fail in the same way.
        """
        self._backend.end.at = end
        headers = [*self._headers, (b"Content-Length", str(len(content)).encode())]
        start = time.perf_counter()
        try:
            pool = self._pool
            timeouts = {"timeout": {"pool": max(0.0, end - time.monotonic())}}
            with pool.stream("POST", str(self._url), headers=headers, content=content, extensions=timeouts) as response:
                self.bytes_up += len(content)
                headers_end, body = time.perf_counter(), bytearray()
                for chunk in response.iter_stream():
                    body += chunk
                    self.bytes_down += len(chunk)
                    if len(body) > limit_bytes:
                        break
                fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                body_seconds = time.perf_counter() - headers_end
                return Reply(response.status, fields, bytes(body), headers_end - start, body_seconds)
        except CDCError:
            raise
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError) as error:
            raise Unreachable(f"{self._url.host}: {type(error).__name__}: {error}{self.route}") from error
        except Exception as error:  # no failure of the environment or the cloud may stop the device
            raise CDCError(f"{self._url.host}: {type(error).__name__}: {error}{self.route}") from error

    @property
    def route(self) -> str:
        """Suffix of messages that names the proxy; "" without a proxy."""
        return f" (through the proxy {self.proxy})" if self.proxy else ""

    def make_safe(self, text: str) -> str:
        """Return a text safe to print: shortened, without secrets and control characters."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return make_printable(text)

    def close(self) -> None:
        """Close all open connections."""
        if "_pool" in self.__dict__:
            self._pool.close()

    @cached_property
    def _pool(self) -> httpcore2.ConnectionPool:
        """Connection pool, created at the first request.

        Raises:
            CDCError: a proxy or certificates of the environment cannot be used.
        """
        proxy = None
        if proxy_url := find_proxy(self._url):
            self._secrets += [text for text in (proxy_url.username, proxy_url.password) if len(text) > 2]
            self.proxy = f"{proxy_url.scheme}://{proxy_url.netloc.decode()}"
            logger.info("requests to %s go through the proxy %s", self._url.host, self.proxy)
            if proxy_url.scheme not in ("http", "https", "socks5", "socks5h"):
                raise CDCError(f"the environment's proxy {self.proxy} is not supported: use http, https or socks5")
            plain = f"{self.proxy}/"
            auth = (proxy_url.username, proxy_url.password) if proxy_url.userinfo else None
            proxy = httpcore2.Proxy(plain, auth=auth)
        certificates = _load_certificates() if self._url.scheme == "https" else None
        return httpcore2.ConnectionPool(
            certificates, proxy=proxy, keepalive_expiry=KEEP_ALIVE_SECONDS, network_backend=self._backend
        )


def check_url(url: str) -> httpx2.URL:
    """Parse and validate the URL of a cloud.

    Raises:
        ConfigError: the URL is invalid. The message does not repeat text that may contain a password.
    """
    shown = repr(make_printable(url)) if isinstance(url, str) and not set("@?#") & set(url) else "the given value"
    remedy = "use http://<host>[:<port>] or https://... (CLOUD=)"
    try:
        if not isinstance(url, str) or not url.isprintable() or " " in url:
            raise ValueError("not a string, or it contains spaces or control characters")
        parsed = httpx2.URL(url)
        if parsed.scheme not in ("http", "https"):
            raise ValueError("the scheme must be http or https")
        if not parsed.host:
            raise ValueError("the host is missing")
        if parsed.port is not None and not 0 < parsed.port < 65_536:
            raise ValueError("the port must be from 1 to 65535")
        host = parsed.raw_host.decode()
        if ":" in host:
            ip_address(host)
        elif not set(host) <= set(ascii_letters + digits + "-._"):
            raise ValueError("invalid characters in the host name")
        host.encode("idna")  # as the DNS lookup does
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        reason = "" if shown == "the given value" else f" ({error})"
        raise ConfigError(f"{shown} is not a valid URL of a cloud{reason}: {remedy}") from None
    if parsed.userinfo:
        raise ConfigError(f"the cloud's URL contains a user or password, which logs show: pass key= instead; {remedy}")
    if parsed.query or parsed.fragment:
        raise ConfigError(f"the cloud's URL contains a query or fragment (? or #), which is never sent: {remedy}")
    return parsed


def check_key(key: str) -> None:
    """Refuse a key that cannot be sent in an HTTP header.

    Raises:
        ConfigError: the key is empty or contains invalid characters; the message does not repeat the key.
    """
    remedy = "copy it again, or leave it out if the cloud requires none (CDC_MMPG_KEY)"
    if not isinstance(key, str) or not key:
        raise ConfigError(f"the key is empty or not a string: {remedy}")
    invalid = [i for i, letter in enumerate(key) if not "!" <= letter <= "~"]
    if invalid:
        raise ConfigError(
            f"the key contains a space, a line break or another character that is not visible ASCII, the first at "
            f"character {invalid[0] + 1} of {len(key)}: {remedy}"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: localhost, 127.0.0.0/8, ::1 or unspecified, in any notation."""
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
    """Return the proxy that the environment sets for a URL, if any.

    Raises:
        CDCError: the environment variable is not a valid URL.
    """
    proxies = getproxies()
    chosen = proxies.get(url.scheme) or proxies.get("all")
    no_proxy = proxies.get("no", "")
    if not chosen or is_loopback(url.host) or proxy_bypass(url.host) or _is_in_no_proxy(url.host, no_proxy):
        return None
    try:
        return httpx2.URL(chosen if "://" in chosen else f"http://{chosen}")
    except (httpx2.InvalidURL, ValueError) as error:
        raise CDCError(f"the environment's {url.scheme.upper()}_PROXY or ALL_PROXY is not a valid URL") from error


def _is_in_no_proxy(host: str, no_proxy: str) -> bool:
    """Return whether NO_PROXY lists a network that contains an address."""
    for entry in no_proxy.split(","):
        try:
            if ip_address(host) in ip_network(entry.strip(), strict=False):
                return True
        except ValueError:  # host or entry is a name
            continue
    return False


def _load_certificates() -> Any:
    """Return a TLS context with the certificates of the system or of SSL_CERT_FILE and SSL_CERT_DIR.

    Raises:
        CDCError: the certificates cannot be read.
    """
    try:
        return httpcore2.default_ssl_context()
    except (OSError, ValueError) as error:
        variables = [f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        remedy = f"check {' and '.join(variables)}" if variables else "install the system's CA certificates"
        raise CDCError(f"CA certificates cannot be loaded ({error}): {remedy}") from error


def make_printable(text: str) -> str:
    """Return a text as one printable line: unprintable characters become "?", and long texts are cut."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[: MAX_SHOWN_CHARACTERS + 1])
    return shown if len(shown) <= MAX_SHOWN_CHARACTERS else f"{shown[:MAX_SHOWN_CHARACTERS]}..."


class _DeadlineBackend(httpcore2.NetworkBackend):
    """Network backend whose sockets never block beyond the deadline of their thread's request."""

    def __init__(self) -> None:
        self._plain = httpcore2.SyncBackend()
        self.end = threading.local()  # .at: deadline of this thread's request

    def seconds_left(self, error: type[Exception]) -> float:
        """Return the seconds until the deadline of this thread's request.

        Raises:
            error: the deadline has passed.
        """
        if (left := self.end.at - time.monotonic()) <= 0:
            raise error("the deadline has passed")
        return float(left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address of a host that answers; each attempt gets an equal share of the time left."""
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(f"no address found for {host} ({error})") from error
        for others, (*_, address) in zip(range(len(addresses) - 1, -1, -1), addresses, strict=True):
            share = self.seconds_left(httpcore2.ConnectTimeout) / (others + 1)
            try:
                stream = self._plain.connect_tcp(str(address[0]), port, share, local_address, socket_options)
                return _DeadlineStream(stream, self)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if not others:
                    raise
        raise httpcore2.ConnectError(f"no address found for {host}")


class _DeadlineStream(httpcore2.NetworkStream):
    """Socket of a `_DeadlineBackend`."""

    def __init__(self, stream: httpcore2.NetworkStream, backend: _DeadlineBackend) -> None:
        self._stream, self._backend = stream, backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read at most `max_bytes` of the available data."""
        return self._stream.read(max_bytes, self._backend.seconds_left(httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send the whole buffer."""
        self._stream.write(buffer, self._backend.seconds_left(httpcore2.WriteTimeout))

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """Return this connection with TLS."""
        left = self._backend.seconds_left(httpcore2.ConnectTimeout)
        return _DeadlineStream(self._stream.start_tls(ssl_context, server_hostname, left), self._backend)

    def close(self) -> None:
        """Close the socket."""
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        """Return a property of the socket by its httpcore name."""
        return self._stream.get_extra_info(info)
