"""Release opened for use: fetched, verified against its digests, unpacked. No code in it runs, and no pickle is read.

A release is an archive of `cdc-mmpg release`, a folder with its content, or the address of an archive.
"""

import json
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.files import atomic_write, expand_home, hash_file, lock_folder
from cdc_mmpg.progress import track

MANIFEST = "release.json"
FORMAT = 1
DEFAULT_ROOT = "checkpoints"  # folder of the runs in a default checkout
BLOCK = 1 << 20  # bytes read at once
TIMEOUT_SECONDS = 60  # of a server that does not answer
MAX_MANIFEST_BYTES = 16_000_000
PINNED_ADDRESS = re.compile(r"(?P<address>https?://[^#]+)(#sha256=(?P<digest>[0-9a-f]{64}))?", re.IGNORECASE)
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a file or folder in a release


def is_release(place: str) -> bool:
    """Return whether a path or address names a release, and not another kind of file."""
    path = Path(expand_home(place))
    if re.match("https?://", place, re.IGNORECASE) or (path / MANIFEST).is_file():
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
    source = _download(place, cache) if re.match("https?://", place, re.IGNORECASE) else Path(expand_home(place))
    with _reading(source, place) as read:
        with read(MANIFEST) as file:
            content = file.read(MAX_MANIFEST_BYTES)
        files = _check_manifest(content, place)
        folder = cache / sha256(content).hexdigest()[:16]
        if folder.is_dir():
            return folder
        with lock_folder(cache):
            scratch = cache / f".{folder.name}.unpacking"
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
            for name, entry in track(files.items(), "unpacking"):
                with read(name) as file, atomic_write(scratch / name) as target:
                    _copy(file, target, entry, f"{place}: {name}")
            for cloud in scratch.glob("*/*/*/deployment/cloud"):
                _renew_key(cloud)
            with atomic_write(scratch / MANIFEST) as target:
                target.write(content)
            os.replace(scratch, folder)
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
            if not all(SAFE_NAME.fullmatch(part) for part in name.split("/")) or name == MANIFEST:
                raise CheckpointError(f"{place}: refused, it has a file with an unsafe name: {name!r}")
            if not isinstance(entry["bytes"], int) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
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
            yield lambda name: (source / PurePosixPath(name)).open("rb")
            return
        with zipfile.ZipFile(source) as archive:
            yield archive.open
    except FileNotFoundError as error:
        problem = "no such release" if not source.exists() else f"{damaged}: no {Path(error.filename or '').name}"
        raise ConfigError(f"{place}: {problem}; make release writes one") from error
    except (KeyError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
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
    path = cache / "downloads" / f"{sha256(match['address'].encode()).hexdigest()[:16]}.zip"
    if not path.is_file():
        try:
            with urllib.request.urlopen(match["address"], timeout=TIMEOUT_SECONDS) as reply, atomic_write(path) as file:
                blocks = iter(lambda: reply.read(BLOCK), b"")
                total = -(-int(reply.headers.get("Content-Length") or 0) // BLOCK) or None
                for block in track(blocks, f"fetching {match['address']} (MiB)", total):
                    file.write(block)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ConfigError(f"{match['address']}: cannot be fetched ({error})") from error
    if pinned and hash_file(path) != pinned:
        path.unlink()
        raise CheckpointError(f"{place}: the archive has another SHA-256 than the address says: ask for the right one")
    return path
