"""`python -m cdc_mmpg.cloud`: validate bundle, keys, certificate and address, then serve until SIGTERM or SIGINT."""

import argparse
import json
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

try:
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from cdc_mmpg.cloud.app import METRICS_VARIABLE, SETTINGS_VARIABLE, Settings
    from cdc_mmpg.cloud.keys import read_keys
    from cdc_mmpg.cloud.limits import ACCEPTS_PER_TURN, DEFAULT_PLACES, KEEP_ALIVE_SECONDS, raise_file_limit
    from cdc_mmpg.cloud.logs import configure_logs, logger
    from cdc_mmpg.cloud.model import WEIGHT_PRECISIONS, load_model
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"ConfigError: the service needs additional packages ({error}): pip install '.[serve]'", file=sys.stderr)
    sys.exit(2)

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.program import run_to_exit_code

GRACE_SECONDS = 30  # time to finish accepted requests after SIGTERM
WORKER_START_SECONDS = 60  # time that a worker may take to start before its supervisor replaces it


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a bundle until SIGTERM or SIGINT; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description="cloud service: features in, weights of last layers out")
    parser.add_argument("bundle", type=Path, help="the cloud/ folder of an export")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; default: 8000")
    parser.add_argument("--workers", type=int, default=1, help="processes; with 2 or more, a crashed one restarts")
    parser.add_argument("--places", type=int, default=DEFAULT_PLACES, help="maximum requests in flight per process")
    parser.add_argument(
        "--keys", default="", help="file with one key per line; without it, everyone on this machine has access"
    )
    parser.add_argument("--weights", choices=WEIGHT_PRECISIONS, default="", help="default: the bundle's precision")
    parser.add_argument("--certificate", help="certificate for HTTPS (PEM)")
    parser.add_argument("--certificate-key", help="private key for HTTPS (PEM)")
    parser.add_argument(
        "--web", type=Path, help="folder of the export: also serve the browser's page, its device bundles and demo"
    )
    parser.add_argument(
        "--origin",
        action="append",
        default=[],
        help="another origin whose pages may request layers, such as https://lab.example; repeatable; default: none",
    )
    options = parser.parse_args(arguments)
    return run_to_exit_code(lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    """Validate the options and the bundle, then serve.

    Raises:
        CheckpointError: the folder is not a valid cloud bundle.
        ConfigError: an option is invalid, or options contradict each other.
    """
    if options.workers < 1 or options.places < 1:
        raise ConfigError("workers and places must be at least 1 (WORKERS=, ARGS=--places=)")
    if not options.keys and not is_local_only(options.host):
        raise ConfigError(
            f"{options.host} is reachable from other machines, and without keys everyone has access: give a file of "
            "keys (KEYS=), or serve on 127.0.0.1"
        )
    check_certificate(options.certificate, options.certificate_key)
    read_keys(options.keys)
    check_origins(options.origin)
    if options.web:
        from cdc_mmpg.cloud.pages import Page  # noqa: PLC0415  it imports the device's packages

        Page(options.web)
    load_model(options.bundle, options.weights)
    listener = listen(options.host, options.port)
    configure_logs()
    if options.keys and not options.certificate and not is_local_only(options.host):
        logger.warning("keys are sent unencrypted: enable HTTPS here (CERTIFICATE=) or in a reverse proxy")
    raise_file_limit()
    supervisor = os.getpid() if options.workers > 1 else 0
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http{'s' if options.certificate else ''}://{host}:{listener.getsockname()[1]}"
    settings = Settings(
        str(options.bundle),
        options.keys,
        options.places,
        options.weights,
        supervisor,
        address,
        str(options.web or ""),
        tuple(options.origin),
    )
    os.environ[SETTINGS_VARIABLE] = json.dumps(settings._asdict())
    config = uvicorn.Config(
        "cdc_mmpg.cloud.app:app",
        factory=True,
        workers=options.workers,
        loop="cdc_mmpg.cloud.limits:Loop",
        http="cdc_mmpg.cloud.limits:Protocol",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # clients could forge these headers: only the peer address counts
        backlog=ACCEPTS_PER_TURN,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
        timeout_worker_healthcheck=WORKER_START_SECONDS,
        h11_max_incomplete_event_size=16_384,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.certificate_key,
    )
    with listener, tempfile.TemporaryDirectory() as counts:
        if options.workers == 1:
            try:
                uvicorn.Server(config).run([listener])  # raises the signal again that stopped it
            except KeyboardInterrupt:
                raise SystemExit(128 + signal.SIGINT) from None
        else:
            os.environ[METRICS_VARIABLE] = counts
            Multiprocess(config, [listener]).run()
            raise SystemExit(128 + signal.SIGTERM)


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Refuse files that are not a certificate and its key.

    Raises:
        ConfigError: only one is given, or a file is missing, damaged, encrypted or does not match the other.
    """
    if not certificate and not key:
        return
    if not certificate or not key:
        raise ConfigError("HTTPS needs both a certificate and its key (CERTIFICATE=, CERTIFICATE_KEY=)")
    for path in (certificate, key):
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file (CERTIFICATE=, CERTIFICATE_KEY=)")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate and its unencrypted key in PEM format ({error}): check "
            "CERTIFICATE= and CERTIFICATE_KEY="
        ) from error


def check_origins(origins: Sequence[str]) -> None:
    """Refuse an origin that no browser would send.

    Raises:
        ConfigError: it is not https://<host> or http://<host>, with a port if it is not the scheme's.
    """
    for origin in origins:
        if not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
            raise ConfigError(f"--origin={origin}: write https://<host>[:<port>] in lower case, without a path or *")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        ConfigError: the address is not one of this machine, or is in use.
    """
    try:
        return socket.create_server((host, port), family=choose_family(host))
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}): choose others with HOST= and PORT=") from error


def choose_family(host: str) -> socket.AddressFamily:
    """Return the address family of an address or a host name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_local_only(host: str) -> bool:
    """Return whether an address or a host name is reachable from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
