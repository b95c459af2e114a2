"""Files that are whole or absent, whatever happens to the process that writes them."""

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

from cdc_mmpg.errors import CDCError, ConfigError, listing

logger = logging.getLogger(__name__)

LOCK = ".lock"  # in a folder that one process at a time may write: who has it, or had it last
NO_SUCH_PATH = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.ELOOP)  # no disk could hold it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has none
HOST = "".join(letter for letter in socket.gethostname() if letter.isalnum()) or "host"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and leaves nothing behind otherwise.

    The temporary lies in the same folder, so that the replacement is one rename; file and folder are synchronised to
    the disk. A process killed in between leaves `.<name>.<host>.<pid>.tmp`, which `remove_leftovers` clears.

    Raises:
        CDCError: it cannot be written; what was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
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
            f"{path}: cannot be written ({error.strerror or error}), and what was there is untouched: make room, or "
            "make the folder writable, and type the same command again"
        ) from error


def write_listing(names: Sequence[str], path: Path) -> str:
    """Write names into a file, a name a line; return the first of them as `errors.listing` does, with where all are.

    Raises:
        CDCError: see `atomic_write`.
    """
    with atomic_write(path) as file:
        file.write("".join(f"{name}\n" for name in names).encode(errors="backslashreplace"))
    return listing(names, f", all named in {path}")


def expand_home(path: str) -> str:
    """Return a path with ~ written out.

    Raises:
        ConfigError: there is no such user, or no home.
    """
    try:
        return os.fspath(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}") from error


def file_digest(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(content: Any) -> str:
    """Return the sha256 of what JSON says, however it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a folder for this process alone while the block runs, and clear what killed processes left in it.

    A record lock (fcntl): the kernel releases it however the process ends, and forked children do not inherit it. It
    holds between machines where the shared file system passes locks on (NFS 4, or NFS 3 with its lock daemon; not
    where it is mounted with `nolock`); where there are no locks at all a warning says so.

    Raises:
        ConfigError: another process has it, which is named; or no file system can hold such a path.
        CDCError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+b", buffering=0)
    except ValueError as error:  # a zero byte, a letter that the locale has not
        raise ConfigError(f"{str(folder)!r}: not a path ({error})") from error
    except OSError as error:
        if error.errno in NO_SUCH_PATH or isinstance(error, FileExistsError):
            raise ConfigError(f"{folder}: not a usable folder ({error.strerror}): name another one (OUT=)") from error
        raise CDCError(f"{folder}: cannot be written ({error.strerror}): make room, or make it writable") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise ConfigError(
                    f"{folder} is in use by {holder}: wait until that command ends, or stop it; two may not write one "
                    "folder"
                ) from error
            logger.warning("%s: the file system has no locks (%s): start no second command here", folder, error)
        else:
            remove_leftovers(folder, locked=True)
            with suppress(OSError):  # a full disk: whatever is written next says so
                file.truncate(0)
                now = datetime.now(UTC).isoformat(" ", "seconds")
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        yield


def remove_leftovers(folder: Path, locked: bool = False) -> None:
    """Delete temporaries in `folder` of this machine's processes that no longer run; where it is `locked`, all."""
    for temporary in folder.glob(f".*.{'*' if locked else HOST}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdigit() and (locked or not _is_running(int(pid))):
            with suppress(OSError):  # a folder that may not be written
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
    except OSError:  # no Linux, or gone meanwhile
        return True
    return not state.startswith("Z")  # dead, and nobody has asked how
