"""Release opened for use: fetched, verified against its digests, unpacked. Opening it runs no code in it.

A release is an archive of `cdc-mmpg release`, a folder with its content, or the address of an archive.
"""

import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.files import atomic_write, expand_home, hash_file
from cdc_mmpg.progress import track

MANIFEST = "release.json"
FORMAT = 1
DEFAULT_ROOT = "checkpoints"  # folder of the runs in a default checkout
BLOCK = 1 << 20  # bytes read at once
TIMEOUT_SECONDS = 60  # of a server that does not answer
MAX_MANIFEST_BYTES = 16_000_000
ADDRESS = re.compile("https?://", re.IGNORECASE)  # what an address begins with
PINNED_ADDRESS = re.compile(r"(?P<address>https?://[^#]+)(#sha256=(?P<digest>[0-9a-f]{64}))?", re.IGNORECASE)
# Files of a release: nothing else is packed or unpacked.
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
BUNDLE_CONTENT = re.compile(
    r"cloud/(cloud\.json|generator\.safetensors)|demo/(session\.json|[\w-]+\.mp4)|"
    r"device(-int8)?/((bundle|tokenizer|answers)\.json|(encoder|head)\.onnx|(shared|basis)\.bin)"
)
RUN_CONTENT = (
    r"results\.json|config\.yaml|inputs\.json|best\.ckpt|(adr|encoder|reading)\.safetensors|predictions\.test\.csv|"
    rf"(answers|vocab)\.txt|CARD\.md|deployment/(export\.json|{BUNDLE_CONTENT.pattern})"
)
CONTENT = re.compile(
    rf"worlds\.md|{NAME}/(tables?\.md|report\.(html|json))|{NAME}/{NAME}/seed\d+/({RUN_CONTENT})", re.ASCII
)
LEFTOVER_SECONDS = 86_400  # after which the folder of a killed unpacking is deleted
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, RuntimeError)


def is_release(place: str) -> bool:
    """Return whether a path or address names a release, and not another kind of file."""
    if not place:
        return False
    path = Path(expand_home(place))
    if ADDRESS.match(place) or (path / MANIFEST).is_file():
        return True
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return MANIFEST in archive.namelist()
    return False


def open_release(place: str, cache: Path) -> Path:
    """Return the folder with the runs of a release; the first call unpacks it there and verifies every file.

    The cloud bundles get a new signing key, and the device bundles beside them its public part.

    Args:
        place: path of an archive or of a folder with its content, or an https address of an archive; `#sha256=<hex>`
            after the address pins the archive's digest.
        cache: folder for downloads and unpacked releases.

    Raises:
        ConfigError: there is no release at this place, or the address cannot be used.
        CheckpointError: the release is damaged, or of another version.
        CDCError: the folder cannot be written.
    """
    fetched = ADDRESS.match(place)
    source = _download(place, cache) if fetched else Path(expand_home(place))
    try:
        with _reading(source, place) as read:
            return _unpack(read, place, cache)
    except CheckpointError:
        if fetched:
            source.unlink(missing_ok=True)  # so that the next command fetches it again
        raise


def _unpack(read: Callable[[str], Any], place: str, cache: Path) -> Path:
    """Unpack a release, unless it has been; return its folder."""
    with read(MANIFEST) as file:
        content = file.read(MAX_MANIFEST_BYTES)
    files = _check_manifest(content, place)
    folder = cache / sha256(content).hexdigest()[:16]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = sum(entry["bytes"] for entry in files.values()), shutil.disk_usage(cache).free
    if needed > free:
        raise ConfigError(
            f"{place}: unpacked it takes {needed:,} bytes, {free:,} are free in {cache}: make room (OUT=)"
        )
    for leftover in cache.glob(".unpacking-*"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(prefix=".unpacking-", dir=cache) as scratch:
        unpacked = Path(scratch) / "release"
        for name, entry in track(files.items(), "unpacking"):
            with read(name) as file, atomic_write(unpacked / name) as target:
                _copy(file, target, entry, f"{place}: {name}")
        for cloud in unpacked.glob("*/*/*/deployment/cloud"):
            _renew_key(cloud)
        with atomic_write(unpacked / MANIFEST) as target:
            target.write(content)
        try:
            os.replace(unpacked, folder)
        except OSError:
            if not folder.is_dir():  # else another command was faster
                raise
    return folder


def find_encoder(release: Path, seed: int) -> Path:
    """Return the pretrained encoder of a seed in an unpacked release.

    Raises:
        ConfigError: the release has none of this seed; names those that it has.
    """
    encoders = {path.parent.name: path for path in release.glob("*/encoder_pretraining/seed*/encoder.safetensors")}
    if f"seed{seed}" not in encoders:
        has = ", ".join(sorted(encoders)) or "none"
        raise ConfigError(f"CHECKPOINT: the release has no pretrained encoder of seed{seed}, but {has} (ENCODER_SEED=)")
    return encoders[f"seed{seed}"]


def _check_manifest(content: bytes, place: str) -> dict[str, dict[str, Any]]:
    """Return the files of a release by name, each with its bytes and SHA-256.

    Raises:
        CheckpointError: the manifest is damaged or of another version, or names a file outside the release.
    """
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{place}: a release of format {manifest['format']}, not {FORMAT}: use the suite of "
                                  f"commit {manifest.get('commit')}")  # fmt: skip
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in files.items():
            if not CONTENT.fullmatch(name):
                raise CheckpointError(
                    f"{place}: refused, it has a file that does not belong in a release: {name!r:.200}"
                )
            size = entry["bytes"]
            if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"entry of {name}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: {MANIFEST} is damaged ({error}): fetch the release again") from error
    return files


@contextmanager
def _reading(source: Path, place: str) -> Iterator[Callable[[str], Any]]:
    """Yield a function that opens a file of a release by name, from an archive or a folder."""
    damaged = f"{place}: damaged or incomplete, fetch the release again"
    try:
        if source.is_dir():
            yield lambda name: (source / name).open("rb")
            return
        with zipfile.ZipFile(source) as archive:
            yield archive.open
    except FileNotFoundError as error:
        problem = "no such release" if not source.exists() else f"{damaged}: no {Path(error.filename or '').name}"
        raise ConfigError(f"{place}: {problem}; make release writes one") from error
    except DAMAGE as error:
        raise CheckpointError(f"{damaged} ({error})") from error


def _copy(file: BinaryIO, target: BinaryIO, entry: dict[str, Any], name: str) -> None:
    """Copy a file; raise CheckpointError if its size or digest is another one than the manifest's."""
    digest, left = sha256(), entry["bytes"]
    while block := file.read(min(BLOCK, left + 1)):
        left -= len(block)
        if left < 0:
            break
        digest.update(block)
        target.write(block)
    if left or digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{name}: another content than the manifest's: fetch the release again")


def _renew_key(cloud: Path) -> None:
    """Create a signing key in a cloud bundle, and write its public part into the settings of all bundles beside it."""
    # Late imports: torch and onnxruntime take seconds, and most commands open no release.
    from cdc_mmpg.deployment.bundle_files import CLOUD_SETTINGS, SIGNING_KEY, write_settings  # noqa: PLC0415
    from cdc_mmpg.deployment.cloud_bundle import load_or_create_key  # noqa: PLC0415
    from cdc_mmpg.device.model import BUNDLE_FILE  # noqa: PLC0415
    from cdc_mmpg.device.page import DEVICE_FOLDERS  # noqa: PLC0415

    (cloud / SIGNING_KEY).unlink(missing_ok=True)
    public = load_or_create_key(cloud / SIGNING_KEY).public_key().public_bytes_raw().hex()
    for path in (cloud / CLOUD_SETTINGS, *(cloud.parent / name / BUNDLE_FILE for name in DEVICE_FOLDERS.values())):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("digest")
        write_settings(settings | {"public_key": public}, path)


def _download(place: str, cache: Path) -> Path:
    """Fetch an archive once; return its path.

    Raises:
        ConfigError: the address is not one of https, or the server refuses; or the digest is not the pinned one.
    """
    match = PINNED_ADDRESS.fullmatch(place)
    pinned = match and (match["digest"] or "").lower()
    if not match or not (place.lower().startswith("https://") or pinned):
        raise ConfigError(f"{place}: an https address is needed, or one that ends in #sha256=<the archive's digest>")
    path = cache / "downloads" / f"{sha256(place.encode()).hexdigest()[:16]}.zip"
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(match["address"], timeout=TIMEOUT_SECONDS) as reply:
            if not (pinned or reply.geturl().lower().startswith("https://")):
                raise ConfigError(f"{place}: leads to {reply.geturl()}, which is not https: add #sha256=<digest>")
            with atomic_write(path) as file:
                for block in _read_blocks(reply, match["address"]):
                    file.write(block)
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        raise ConfigError(f"{match['address']}: cannot be fetched ({error})") from error
    if pinned and hash_file(path) != pinned:
        path.unlink()
        raise CheckpointError(f"{place}: the archive has another SHA-256 than the address says: ask for the right one")
    return path


def _read_blocks(reply: Any, address: str) -> Iterator[bytes]:
    """Yield the content of a reply; a ConfigError says that it broke off."""
    expected, received = int(reply.headers.get("Content-Length") or 0), 0
    blocks = track(iter(lambda: reply.read(BLOCK), b""), f"fetching {address} (MiB)", -(-expected // BLOCK) or None)
    try:
        for block in blocks:
            received += len(block)
            yield block
    except (OSError, HTTPException) as error:
        raise ConfigError(f"{address}: the connection broke off ({error}): run the same command again") from error
    if received < expected:
        raise ConfigError(f"{address}: the connection broke off after {received:,} of {expected:,} bytes: try again")
