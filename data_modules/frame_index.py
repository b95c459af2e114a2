"""The index of the frame cache: one entry per clip, and the name of the file with its frames."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.errors import CDCError, DataError

ARRAY_FILE_NAME = re.compile(r"[A-Za-z0-9_-]*\.[0-9a-f]{12}\.\d+\.npy")  # see `array_file_name`


class Entry(NamedTuple):
    """The entry of a clip in the index."""

    size: int  # bytes
    mtime_ns: int
    frames: int  # number of frames that can be decoded; 0 if decoding failed
    sha256: str  # digest of the content; "" if the file was never read to its end
    error: str = ""  # why there are no frames


NOT_DECODED = Entry(-1, 0, 0, "", "not decoded")  # entry of a clip that is to be decoded the next time


class FrameIndex:
    """The index of a folder of frames: an append-only file with one line per clip.

    Args:
        folder: folder of the frames; the index is `index.jsonl` in it.

    Attributes:
        entries: entry of each clip, after `read`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "index.jsonl"
        self.entries: dict[str, Entry] = {}

    def find(self, name: str) -> Entry:
        """Return the entry of a clip.

        Raises:
            DataError: the clip is not in the index.
        """
        if (entry := self.entries.get(name)) is None:
            raise DataError(f"{name}: not in {self.path}: run `make data`")
        return entry

    def array_file(self, name: str) -> str:
        """Return the name of the file with the frames of an indexed clip."""
        return array_file_name(name, self.entries[name].sha256, self.entries[name].frames)

    def read(self, repair: bool) -> None:
        """Read all complete lines; the last line of a clip counts. `repair` cuts off an incomplete line at the end.

        If another process appends at the same time, its lines may be lost; `decode_clip` recovers them.

        Raises:
            DataError: a line is damaged; names it.
            CDCError: the file cannot be read or repaired.
        """
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            *lines, rest = content.split(b"\n")
            if rest and repair:
                os.truncate(self.path, len(content) - len(rest))
        except OSError as error:
            raise CDCError(f"{self.path}: cannot be read or repaired ({error.strerror}): check the file") from error
        self.entries = {}
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
                name, entry = fields.pop("name"), Entry(**fields)
                if [type(value) for value in (name, *entry)] != [str, int, int, int, str, str]:
                    raise TypeError("a value of another type")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    f"{self.path}:{number}: the index is damaged ({error}): delete the file and run `make data`; "
                    "the clips are hashed again, but not decoded again"
                ) from error
            self.entries[name] = entry

    def append(self, descriptor: int, name: str, entry: Entry) -> None:
        """Append the entry of a clip, atomically.

        Args:
            descriptor: descriptor of the index file, opened in append mode.
            name: name of the clip.
            entry: entry of the clip.

        Raises:
            CDCError: the disk is full or not writable.
        """
        line = (json.dumps({"name": name, **entry._asdict()}) + "\n").encode()
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(0, "only part of a line was written")
        except OSError as error:
            raise CDCError(
                f"{self.path}: cannot be written ({error.strerror}): free disk space and re-run the same command"
            ) from error
        self.entries[name] = entry


def file_stem(name: str) -> str:
    """Return the stem of a clip's files: at most 100 letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100]


def array_file_name(name: str, digest: str, frames: int) -> str:
    """Return the name of the file with a clip's frames; the index can be rebuilt from it."""
    return f"{file_stem(name)}.{digest[:12]}.{frames}.npy"
