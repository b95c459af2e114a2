"""Atomic writes, digests, and the lock of a folder: a file is complete or absent even if its writer is killed."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from cdc_mmpg.errors import CDCError, ConfigError, format_names

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"  # in a folder with one writer at a time: names the process that holds or last held it
INVALID_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.ELOOP)
NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system supports no locks
# Letters and digits of the host name: part of the names of temporary files.
HOST_TAG = "".join(letter for letter in socket.gethostname() if letter.isalnum()) or "host"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block succeeds, and is deleted otherwise.

    The temporary file is in the same folder, so that one rename replaces `path`; file and folder are synced to disk. A
    process that is killed in between leaves `.<name>.<host>.<pid>.tmp`, which `remove_leftovers` deletes.

    Raises:
        CDCError: the file cannot be written; an existing file at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{HOST_TAG}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise CDCError(
            f"{path}: cannot be written ({error.strerror or error}); an existing file is unchanged: make room, or make "
            "the folder writable, and run the same command again"
        ) from error


def write_listing(names: Sequence[str], path: Path) -> str:
    """Write names to a file, one a line; return the first of them as `errors.format_names` does, and name the file.

    Raises:
        CDCError: see `atomic_write`.
    """
    with atomic_write(path) as file:
        file.write("".join(f"{name}\n" for name in names).encode(errors="backslashreplace"))
    return format_names(names, f", all named in {path}")


def expand_home(path: str) -> str:
    """Return a path with ~ expanded.

    Raises:
        ConfigError: the user does not exist or has no home folder.
    """
    try:
        return os.fspath(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}") from error


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Any) -> str:
    """Return the sha256 of JSON content, independent of key order and whitespace."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for this process while the block runs, and delete the temporaries of killed processes in it.

    A record lock (fcntl): the kernel releases it however the process ends, and forked children do not inherit it. It
    works across machines if the shared file system forwards locks (NFS 4, or NFS 3 with its lock daemon, unless mounted
    with `nolock`). Without lock support a warning is logged.

    Raises:
        ConfigError: another process, which is named, holds the lock; or the path is invalid.
        CDCError: the folder cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a+b", buffering=0)
    except ValueError as error:  # a null byte, or a character that the locale cannot encode
        raise ConfigError(f"{str(folder)!r}: not a path ({error})") from error
    except OSError as error:
        if error.errno in INVALID_PATH_ERRORS or isinstance(error, FileExistsError):
            raise ConfigError(f"{folder}: not a usable folder ({error.strerror}): name another one (OUT=)") from error
        raise CDCError(f"{folder}: cannot be written ({error.strerror}): make room, or make it writable") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise ConfigError(
                    f"{folder} is in use by {holder}: wait until that command ends, or stop it; two commands may not "
                    "write to one folder"
                ) from error
            if error.errno not in NO_LOCK_ERRORS:
                raise CDCError(f"{folder}: cannot be locked ({error.strerror}): check its file system") from error
            logger.warning("%s: the file system has no locks (%s): do not start a second command here", folder, error)
        else:
            remove_leftovers(folder, locked=True)
            with suppress(OSError):  # on a full disk the next write reports the error
                file.truncate(0)
                now = datetime.now(UTC).isoformat(" ", "seconds")
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        yield


def remove_leftovers(folder: Path, locked: bool = False) -> None:
    """Delete this machine's temporaries in `folder` whose process has ended; if the folder is `locked`, delete all."""
    for temporary in folder.glob(f".*.{'*' if locked else HOST_TAG}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdigit() and (locked or not _is_running(int(pid))):
            with suppress(OSError):  # the folder is read-only
                temporary.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except OSError:  # not Linux, or the process has just ended
        return True
    return not state.startswith("Z")  # a zombie has ended, too
