"""What all readers of annotation files share: text, rows, checked fields, and which of several conventions is there."""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cdc_mmpg.errors import DataError

logger = logging.getLogger(__name__)

Field = TypeVar("Field", str, int)
# A published number; where editions differ and all are official, every number with the name of its edition.
Count = int | Mapping[int, str]
Published = Mapping[str, Mapping[str, Mapping[str, Count]]]  # see `VideoTextDataModule.PUBLISHED`

DAMAGED_FILE = "the file is damaged or cut short; fetch it again"
# Characters that end a line somewhere, or show as nothing.
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LIST, OBJECT, LINES = "a JSON list", "a JSON object", "JSON lines, an object a line"
TABS, COMMAS = "a table whose fields are separated by TABs", "a table whose fields are separated by commas"
FILE_BEGINNINGS = {  # of files, by how they begin
    "a pointer of Git LFS in place of the file, which `git lfs pull` fetches": "version https://git-lfs",
    "a web page": r"(?i)<!doctype|<html|<\?xml",
    LINES: r"\{.*\}\s*\n\s*\{",
    LIST: r"\[\s*([\[{\"\d-]|\])",
    OBJECT: r"\{",
    TABS: r".*\t",
    COMMAS: r".*,",
    "a table whose fields are separated by semicolons": r".*;",
}
QUESTION_WORDS = ("what", "who", "how", "when", "where")


class AnnotationRow(NamedTuple):
    """A row of an annotation file."""

    place: str  # for messages: "<path>, line 4", or "<path>: [3]" of a JSON list
    fields: dict[str, Any]

    def value(self, *keys: str) -> Any:
        """Return what is under the first of the keys that is there; None without any."""
        return next((self.fields[key] for key in keys if key in self.fields), None)

    def refusal(self, keys: Sequence[str], expected: str) -> DataError:
        """Return the error that says what a field is and what it should be."""
        where = f"{self.place}{'.' if self.place.endswith(']') else ': '}{' or '.join(keys)}"
        if not any(key in self.fields for key in keys):
            there = ", ".join(map(str, self.fields))
            return DataError(f"{where} is not there, only {there:.200}: {another_convention(keys[0])}")
        return DataError(f"{where} is {self.value(*keys)!r:.80}, not {expected}; mend the file, or fetch it again")

    def field(self, kind: type[Field], *keys: str) -> Field:
        """Return a field, under the first of the keys that is there: conventions call the same thing by several names.

        Raises:
            DataError: it is absent, of another kind, or no proper text.
        """
        value = self.value(*keys)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refusal(keys, f"a {kind.__name__}")
        if isinstance(value, str):
            self._check(keys, value)
        return value

    def line(self, *keys: str) -> str:
        """Return a text without line feeds and other control characters: answers are kept one a line.

        Raises:
            DataError: see `field`; also a control character.
        """
        text = self.field(str, *keys)
        if CONTROL_CHARACTERS.search(text):
            raise self.refusal(keys, "a text on one line, without control characters")
        return text

    def texts(self, number: int, key: str) -> tuple[str, ...]:
        """Return a list of as many texts."""
        values = self.value(key)
        if not isinstance(values, list) or len(values) != number or not all(isinstance(text, str) for text in values):
            raise self.refusal([key], f"a list of {number} texts")
        for text in values:
            self._check([key], text)
        return tuple(values)

    def clip(self, *keys: str) -> str:
        """Return the name of a clip.

        Raises:
            DataError: also where it would lead out of the clips' folder.
        """
        name = self.field(str, *keys)
        if leads_out(name):
            raise self.refusal(keys, "a name within the clips' folder")
        return name

    def which(self, number: int, *keys: str) -> int:
        """Return the place of the right candidate, counted from 0; the file has a number or its digits."""
        value = self.value(*keys)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < number:
            raise self.refusal(keys, f"a whole number from 0 to {number - 1}")
        return value

    def _check(self, keys: Sequence[str], text: str) -> None:
        """Refuse half of a surrogate pair, which JSON can write and no tokenizer takes."""
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise self.refusal(keys, "text: it holds half of a character")


def leads_out(name: str) -> bool:
    """Return whether a clip's name would lead out of the clips' folder."""
    return "/" in name or "\\" in name or name in ("", ".", "..")


def question_type(row: AnnotationRow, question: str) -> str:
    """Return the type that an annotation states, or the question's first word among `QUESTION_WORDS`, or "other"."""
    for key in ("type", "answer_type"):
        if key in row.fields:
            return row.field(str, key)
    first = re.search(r"\w+", question)
    word = first[0].lower() if first else ""
    return word if word in QUESTION_WORDS else "other"


def another_convention(expected: str) -> str:
    """Return what to say of a file that is complete, but follows another convention than the one that is read."""
    return f"another convention than the one that is read here, which has {expected}; the dataset's class names all"


def recognise(text: str) -> str:
    """Return which of `FILE_BEGINNINGS` a text seems to be, as far as its beginning shows; "" for none."""
    start = text[:10_000].lstrip()
    return next((kind for kind, pattern in FILE_BEGINNINGS.items() if re.match(pattern, start)), "")


def refuse_other_kind(text: str, path: Path, expected: Sequence[str]) -> None:
    """Refuse a text that is of another kind than expected, and seems complete.

    Args:
        text: the file's content.
        path: the file.
        expected: those of `FILE_BEGINNINGS` that the reader reads.

    Raises:
        DataError: names both kinds.
    """
    kind = recognise(text)
    if kind and kind not in expected:
        raise DataError(f"{path}: this is {kind}: {another_convention(expected[0])}")


def is_file(path: Path) -> bool:
    """Return whether a file is there; one whose link leads nowhere or in a circle, or whose name is too long, is not.

    Raises:
        DataError: its folder may not be read.
    """
    try:
        return path.is_file()
    except PermissionError as error:
        raise DataError(f"{path}: may not be read ({error.strerror}): mend the permissions") from error
    except OSError:
        return False


def find_file(paths: Sequence[Path]) -> Path | None:
    """Return the first of the files that is there; log which convention that is."""
    found = next((path for path in paths if is_file(path)), None)
    if found is not None and len(paths) > 1:
        logger.info("reading %s", found)
    return found


def choose_file(paths: Sequence[Path], remedy: str) -> Path:
    """See `find_file`.

    Raises:
        DataError: none is there.
    """
    found = find_file(paths)
    if found is None:
        names = list(dict.fromkeys(path.name for path in paths))
        others = f", nor {', '.join(names[1:])}" if len(names) > 1 else ""
        raise DataError(f"{paths[0]}: no such file{others}\n{remedy}")
    return found


def clips_in(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the clips of a folder by their name without suffix, none where it is absent; earlier suffixes go first.

    An entry that leads nowhere or in a circle is absent.

    Raises:
        DataError: the folder may not be read.
    """
    rank = {suffix: place for place, suffix in enumerate(suffixes)}
    try:
        with os.scandir(folder) as entries:
            paths = [path for entry in entries if is_file(path := Path(entry.path))]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{folder}: may not be read ({error.strerror}): mend that") from error
    paths = [path for path in paths if path.suffix.lower() in rank]
    return {path.stem: path for path in sorted(paths, key=lambda path: (-rank[path.suffix.lower()], path.suffix))}


def read_text(path: Path) -> str:
    """Read the text of an annotation file, with or without a byte order mark; lines end in \\n.

    Raises:
        DataError: not UTF-8, or not to be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8; save it as UTF-8, or fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); mend that") from error


def read_json(path: Path) -> Any:
    """Read the content of a JSON file.

    Raises:
        DataError: with line and column.
    """
    text = read_text(path)
    try:
        return _parse(text, str(path))
    except DataError:
        refuse_other_kind(text, path, (LIST, OBJECT))
        raise


def as_rows(content: Any, path: Path, key: str = "") -> list[AnnotationRow]:
    """Return a list of JSON objects as rows: the whole file, or what it has under a key.

    Raises:
        DataError: anything else, or an empty list.
    """
    place = f"{path}: {key}"
    if not isinstance(content, list) or not content:
        if content == []:
            raise DataError(f"{path}: {key or 'the file'} is an empty list; fetch it again")
        kind = f"an object of {', '.join(content):.200}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(f"{path}: {key or 'the file'} is {kind}: {another_convention('a list of objects')}")
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise DataError(f"{place}[{number}] is {row!r:.80}, not an object; mend the file, or fetch it again")
    return [AnnotationRow(f"{place}[{number}]", row) for number, row in enumerate(content)]


def read_json_list(path: Path) -> list[AnnotationRow]:
    """Read the rows of a file that is one JSON list.

    Raises:
        DataError: see `read_json` and `as_rows`.
    """
    return as_rows(read_json(path), path)


def read_json_lines(path: Path) -> list[AnnotationRow]:
    """Read the rows of a file with a JSON object a line; blank lines are skipped.

    Raises:
        DataError: with the line.
    """
    rows, text = [], read_text(path)
    refuse_other_kind(text, path, (LINES, OBJECT))  # a single line is an object
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, str(path), number)
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {row!r:.80} is not an object; mend the file, or fetch it again")
        rows.append(AnnotationRow(f"{path}, line {number}", row))
    if not rows:
        raise DataError(f"{path}: empty; fetch it again")
    return rows


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[AnnotationRow]:
    """Read the rows of a csv file with a header; blank lines are skipped.

    In TAB-separated files a row is a line and a quote is a character, so that a stray one cannot swallow the rows after
    it; only a field that is quoted as a whole is unquoted.

    Args:
        columns: those that must be there; others are kept, too.

    Raises:
        DataError: with the line.
    """
    text, tabs = read_text(path), delimiter == "\t"
    if len(columns) > 1 or tabs:  # a table of one column has no delimiter
        refuse_other_kind(text, path, (TABS if tabs else COMMAS,))
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    header: list[str] = []
    rows = []
    try:
        for values in reader:
            place = f"{path}, line {reader.line_num}"
            if not values:
                continue
            if not header:
                header = values
                if absent := [column for column in columns if column not in header]:
                    shown, wanted = ", ".join(header), f"the columns {', '.join(columns)}"
                    raise DataError(
                        f"{place}: no column {', '.join(absent)} in the header ({shown:.200}): "
                        f"{another_convention(wanted)}"
                    )
                continue
            if len(values) != len(header):
                raise DataError(f"{place}: {len(values)} fields where the header has {len(header)}; {DAMAGED_FILE}")
            rows.append(AnnotationRow(place, dict(zip(header, map(_unquote, values) if tabs else values, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; {DAMAGED_FILE}") from error
    if not rows:
        raise DataError(f"{path}: no rows; fetch it again")
    return rows


def _unquote(field: str) -> str:
    """Return a field without the quotes around it, its own quotes no longer doubled; any other field as it is."""
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def _parse(text: str, path: str, line: int | None = None) -> Any:
    """Parse JSON; `line` where the text is but a line of the file."""
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line or error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        place = f"{path}{f', line {line}' if line else ''}: nested too deep"
    except ValueError as error:  # a number of thousands of digits, a key twice, NaN
        place = f"{path}{f', line {line}' if line else ''}: {error}"
    raise DataError(f"{place}: {DAMAGED_FILE}")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON whose keys are all different; a reader would take one of the values at random."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which JSON does not know."""
    raise ValueError(f"{name} is no number")
