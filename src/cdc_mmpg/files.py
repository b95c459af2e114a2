"""Files that are whole or absent, whatever happens to the process that writes them."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from cdc_mmpg.errors import CDCError, listing

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


def remove_leftovers(folder: Path) -> None:
    """Delete temporaries in `folder` of this machine's processes that no longer run."""
    for temporary in folder.glob(f".*.{HOST}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdigit() and not _is_running(int(pid)):
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
