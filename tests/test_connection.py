"""The device with a broken cloud, network or environment: it answers, reports the reason, and leaks no secret."""

import contextlib
import gzip
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from cdc_mmpg.device import Device, client
from cdc_mmpg.device.connection import check_url, find_proxy, is_loopback
from cdc_mmpg.errors import ConfigError
from conftest import write_clip
from deployments import open_device

QUESTION = "what is the man doing?"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _without_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper() in PROXIES or name.startswith("SSL_CERT"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@contextlib.contextmanager
def serve(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Yield the port of a server that handles every connection with `talk` until the block ends."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    connection, _ = server.accept()
                    threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                talk(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        stop.set()
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "key", ["", "secret\r\n", "sec ret", "\tsecret", "s\u00e9cret", "secret\0", "secret\x7f", " ", 7, b"secret"]
)
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(deployed, key):
    with pytest.raises(ConfigError, match="the key") as error:
        open_device(deployed, "http://127.0.0.1:1", key=key)
    assert "secret" not in repr(error.value)
    assert "ret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["", " ", "localhost:8000", "ftp://host", "ftp://user:secret@host", "http://", "http:///v1", "http:host",
     "http://a b",
     "http://host:99999", "http://host:0", "http://host:secret@", "http://user:secret@host", "http://host?key=secret",
     "http://host/#secret", "http://" + "a" * 64, "http://a..b", "http://ho\u202est", "http://h\r\nX: y", "http://%00",
     "http://[::1", "http://[nothing:]", "http://user:secret@host:port", "unix:///socket", 5, b"http://host"],
)  # fmt: skip
def test_an_invalid_address_is_refused_without_repeating_its_password(deployed, url):
    with pytest.raises(ConfigError, match="CLOUD=") as error:
        open_device(deployed, url)
    assert "secret" not in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "url", ["http://host", "HTTP://HOST/", "https://host:8443/a/b/", "http://[::1]:80", "http://b\u00fccher.de"]
)
def test_a_valid_address_is_accepted(url):
    assert check_url(url).host


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "2", None, 1e9])
def test_an_invalid_deadline_is_refused(deployed, deadline):
    with pytest.raises(ConfigError, match="deadline"):
        open_device(deployed, None, deadline=deadline)


def test_an_invalid_number_of_threads_is_refused(deployed):
    for threads in (-1, 1.5, "2"):
        with pytest.raises(ConfigError, match="threads"):
            Device(deployed / "session" / "device", threads=threads)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("LOCALHOST.", True), ("a.localhost", True), ("127.0.0.1", True), ("127.200.3.4", True),
     ("127.1", True), ("2130706433", True), ("0.0.0.0", True), ("::1", True), ("::", True), ("::ffff:127.0.0.1", True),
     ("128.0.0.1", False), ("localhost.example", False), ("10.0.0.1", False), ("::2", False), ("notlocalhost", False)],
)  # fmt: skip
def test_loopback_is_recognized_in_every_spelling(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("environment", "url", "expected_host"),
    [
        ({"HTTP_PROXY": "http://p:1"}, "http://cloud", "p"),
        ({"http_proxy": "p:1"}, "http://cloud", "p"),
        ({"HTTP_PROXY": "http://p:1"}, "https://cloud", None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://cloud", "p"),
        ({"ALL_PROXY": "socks5://p:1"}, "https://cloud", "p"),
        ({"ALL_PROXY": "http://p:1"}, "http://127.0.0.1:8000", None),
        ({"ALL_PROXY": "http://p:1"}, "http://[::1]:8000", None),
        ({"ALL_PROXY": "http://p:1"}, "http://localhost:8000", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "cloud"}, "http://cloud", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": ".example"}, "http://cloud.example", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://10.1.2.3", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3", "p"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, "http://cloud", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "[::bad,http://[,,*x,/,10.0.0.0/99"}, "http://cloud", "p"),
        ({"ALL_PROXY": ""}, "http://cloud", None),
    ],
)
def test_the_proxy_comes_from_the_environment_and_is_never_used_for_this_machine(
    monkeypatch, environment, url, expected_host
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy_url = find_proxy(httpx2.URL(url))
    assert (proxy_url.host if proxy_url else None) == expected_host


def test_requests_to_this_machine_bypass_the_proxy(deployed, fake, clip, monkeypatch):
    proxy_requests = []
    with serve(lambda connection: proxy_requests.append(connection.recv(100))) as port:
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        assert open_device(deployed, fake.url, key="secret", deadline=20.0).answer(clip, QUESTION).origin == "adapted"
    assert proxy_requests == []


def test_a_proxy_that_refuses_is_named_without_its_password(deployed, clip, monkeypatch):
    def refuse(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with serve(refuse) as port:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{port}")
        for scheme in ("http", "https"):
            answer = open_device(deployed, f"{scheme}://cloud.invalid", deadline=20.0).answer(clip, QUESTION)
            assert answer.origin == "shared"
            assert "403" in answer.trouble
            assert f"through the proxy http://127.0.0.1:{port})" in answer.trouble
            assert "secret" not in answer.trouble


def test_a_proxy_that_works_is_named_in_the_log(deployed, fake, clip, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HTTP_PROXY", fake.url.replace("http://", "http://user:secret@"))
    answer = open_device(deployed, "http://cloud.invalid", deadline=20.0).answer(clip, QUESTION)
    assert (answer.origin, answer.trouble) == ("adapted", "")
    assert f"cloud.invalid go through the proxy {fake.url}" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ALL_PROXY": "socks5://user:secret@127.0.0.1:1"}, "socks5://127.0.0.1:1"),
        ({"HTTPS_PROXY": "gopher://user:secret@host"}, "gopher://host"),
        ({"HTTPS_PROXY": "http://user:secret@host:port"}, "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "http://127.0.0.1:1"}, "http://127.0.0.1:1"),
        ({"SSL_CERT_FILE": "/nowhere/certificates.pem"}, "SSL_CERT_FILE=/nowhere/certificates.pem"),
        ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE"),
    ],
)
def test_the_device_answers_despite_a_broken_environment(deployed, clip, monkeypatch, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    device = open_device(deployed, "https://cloud.invalid", deadline=1.0)
    answer = device.answer(clip, QUESTION)
    assert answer.origin == "shared"
    assert reason in answer.trouble
    assert "secret" not in answer.trouble
    device.close()


def test_a_missing_certificate_file_does_not_matter_without_tls(deployed, fake, clip, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
    assert open_device(deployed, fake.url, deadline=20.0).answer(clip, QUESTION).origin == "adapted"


def drip(connection: socket.socket, pieces: Iterator[bytes]) -> None:
    """Send the pieces of a content slowly."""
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(0.01)


ENDLESS_REPLIES: dict[str, Callable[[socket.socket], None]] = {
    "bytes of a header": lambda connection: drip(
        connection, itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"y"))
    ),
    "headers": lambda connection: drip(
        connection, itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X: y\r\n"))
    ),
    "informational replies": lambda connection: drip(
        connection, itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)
    ),
    "bytes of a body": lambda connection: drip(
        connection,
        itertools.chain([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\nx\r\n")),
    ),
    "bytes of an error": lambda connection: drip(
        connection, itertools.chain([b"HTTP/1.1 500 No\r\nContent-Length: 500\r\n\r\n"], itertools.repeat(b"x"))
    ),
    "chunk lengths": lambda connection: drip(
        connection, itertools.chain([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"0"))
    ),
}


@pytest.mark.parametrize("kind", ["session", "sample"])
@pytest.mark.parametrize("reply", ENDLESS_REPLIES)
def test_an_endless_reply_blocks_neither_the_answer_nor_the_thread(deployed, clip, monkeypatch, reply, kind):
    monkeypatch.setattr(client, "MAX_LAYER_SECONDS", 0.3)
    threads_before = set(threading.enumerate())
    with serve(ENDLESS_REPLIES[reply]) as port:
        answer = open_device(deployed, f"http://127.0.0.1:{port}", kind, deadline=0.2).answer(clip, QUESTION)
        assert answer.origin == "shared"
        assert answer.trouble
        request_threads = [thread for thread in set(threading.enumerate()) - threads_before if "ask" in thread.name]
        for thread in request_threads:
            thread.join(5)
            assert not thread.is_alive()


def test_an_endless_handshake_blocks_no_thread(deployed, clip, monkeypatch):
    monkeypatch.setattr(client, "MAX_LAYER_SECONDS", 0.3)
    handshake = itertools.chain([b"\x16\x03\x03\x40\x00"], itertools.repeat(b"\0"))
    with serve(lambda connection: drip(connection, handshake)) as port:
        device = open_device(deployed, f"https://127.0.0.1:{port}", deadline=0.2)
        assert device.answer(clip, QUESTION).origin == "shared"
        device._request_thread.join(5)
        assert not device._request_thread.is_alive()


def test_refusal_texts_are_shown_without_control_characters_or_keys(deployed, fake, clip):
    fake.change = lambda layer: (403, {}, "\x1b[2J\x07 of\u202e \x9b1m s3cr3t-key\r\n".encode() + b"\xff\xfe")
    answer = open_device(deployed, fake.url, key="s3cr3t-key", deadline=20.0).answer(clip, QUESTION)
    assert "the cloud refused: 403" in answer.trouble
    assert answer.trouble.isprintable()
    assert "s3cr3t" not in answer.trouble


def test_a_redirect_is_not_followed(deployed, fake, clip):
    fake.change = lambda layer: (307, {"Location": "http://evil.example/v1/layer"}, b"")
    answer = open_device(deployed, fake.url, key="secret", deadline=20.0).answer(clip, QUESTION)
    assert len(fake.uploads) == 1
    assert "to http://evil.example/v1/layer, not followed" in answer.trouble


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"X": "y" * 300_000}, b""),
        ({"Content-Encoding": "gzip"}, gzip.compress(bytes(10**7))),
        ({"Server-Timing": "generate;dur=" + "9" * 5000}, b"x"),
        ({"Content-Length": "-1"}, b"x"),
        ({"Content-Length": "1, 2"}, b"x"),
        ({"Transfer-Encoding": "gzip"}, b"x"),
    ],
)
def test_a_malformed_reply_is_not_used(deployed, fake, clip, headers, body):
    fake.change = lambda layer: (200, headers, body)
    answer = open_device(deployed, fake.url, deadline=0.5).answer(clip, QUESTION)
    assert answer.origin == "shared"
    assert answer.trouble


def test_the_device_answers_when_no_thread_can_be_started(deployed, fake, clip, monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    device = open_device(deployed, fake.url)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    answer = device.answer(clip, QUESTION)
    monkeypatch.undo()
    assert (answer.origin, answer.trouble) == ("shared", "can't start new thread")
