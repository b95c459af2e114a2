"""The index of the frame cache: what is known of every clip, and the name of the file with its frames."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.errors import CDCError, DataError

ARRAY_FILE_NAME = re.compile(r"[A-Za-z0-9_-]*\.[0-9a-f]{12}\.\d+\.npy")  # see `array_file_name`


class Entry(NamedTuple):
    """A clip, as the index knows it."""

    size: int  # bytes
    mtime_ns: int
    frames: int  # that can be decoded; 0 where it is no clip
    sha256: str  # of the content; "" where it was never read to its end
    error: str = ""  # why there are no frames


NOT_DECODED = Entry(-1, 0, 0, "", "not decoded")  # of a clip that is to be decoded when it is next asked for


class FrameIndex:
    """The index of a folder of frames, by clip: a file that is only appended to, a line a clip.

    Args:
        folder: of the frames; the index is `index.jsonl` in it.

    Attributes:
        entries: what is known of each clip, after `read`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "index.jsonl"
        self.entries: dict[str, Entry] = {}

    def find(self, name: str) -> Entry:
        """Return what is known of a clip.

        Raises:
            DataError: the index does not have it.
        """
        if (entry := self.entries.get(name)) is None:
            raise DataError(f"{name}: not in {self.path}: run `make data`")
        return entry

    def array_file(self, name: str) -> str:
        """Return the name of the file with the frames of a clip that the index has."""
        return array_file_name(name, self.entries[name].sha256, self.entries[name].frames)

    def read(self, repair: bool) -> None:
        """Read all whole lines, the last one of a clip; `repair` cuts off what a killed process left half-written.

        Another process that appends meanwhile may lose whole lines by it, which `decode_clip` makes good.

        Raises:
            DataError: a line is damaged; names it.
            CDCError: the file cannot be read or mended.
        """
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            *lines, rest = content.split(b"\n")
            if rest and repair:
                os.truncate(self.path, len(content) - len(rest))
        except OSError as error:
            raise CDCError(f"{self.path}: cannot be read or mended ({error.strerror}): mend that") from error
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
                    "the clips are read again, but not decoded"
                ) from error
            self.entries[name] = entry

    def append(self, descriptor: int, name: str, entry: Entry) -> None:
        """Append what is known of a clip, in one piece.

        Args:
            descriptor: of the index's file, opened to append.
            name: of the clip.
            entry: what is known of it.

        Raises:
            CDCError: the disk is full or may not be written.
        """
        line = (json.dumps({"name": name, **entry._asdict()}) + "\n").encode()
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(0, "only a part of a line")
        except OSError as error:
            raise CDCError(
                f"{self.path}: cannot be written ({error.strerror}): make room and type the same command again"
            ) from error
        self.entries[name] = entry


def file_stem(name: str) -> str:
    """Return how the names of a clip's files begin: at most 100 letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100]


def array_file_name(name: str, digest: str, frames: int) -> str:
    """Return the name of the file with a clip's frames: it holds all that the index has to know of them."""
    return f"{file_stem(name)}.{digest[:12]}.{frames}.npy"
