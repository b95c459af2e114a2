"""Reading annotation files: text, rows with checked fields, and detection of the file format."""

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
# A published number; if several official editions differ, each number with the name of its edition.
Count = int | Mapping[int, str]
Published = Mapping[str, Mapping[str, Mapping[str, Count]]]  # see `VideoTextDataModule.PUBLISHED`

DAMAGED_FILE = "the file is damaged or cut short; fetch it again"
# Characters that some program treats as a line end, or that are invisible.
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
JSON_LIST, JSON_OBJECT, JSON_LINES = "a JSON list", "a JSON object", "JSON lines, one object per line"
TAB_SEPARATED, COMMA_SEPARATED = "a TAB-separated table", "a comma-separated table"
FILE_BEGINNINGS = {  # pattern of the beginning of a file, by kind of file
    "a Git LFS pointer instead of the file (fetch it with `git lfs pull`)": "version https://git-lfs",
    "a web page": r"(?i)<!doctype|<html|<\?xml",
    JSON_LINES: r"\{.*\}\s*\n\s*\{",
    JSON_LIST: r"\[\s*([\[{\"\d-]|\])",
    JSON_OBJECT: r"\{",
    TAB_SEPARATED: r".*\t",
    COMMA_SEPARATED: r".*,",
    "a semicolon-separated table": r".*;",
}
KIND_NAMES: dict[type, str] = {str: "a text", int: "an integer", float: "a number", bool: "a truth value",
                               list: "a list", dict: "an object"}  # fmt: skip
PLAIN_NAME = "a plain file name (no slash, not empty)"
WHERE_FORMATS = "the dataset's file in data_modules/ lists the supported formats (docstring of its class)"
QUESTION_WORDS = ("what", "who", "how", "when", "where")


class AnnotationRow(NamedTuple):
    """A row of an annotation file."""

    place: str  # for messages: "<path>, line 4", or "<path>: [3]" of a JSON list
    fields: dict[str, Any]

    def value(self, *keys: str) -> Any:
        """Return the value of the first key that is present; None if no key is."""
        return next((self.fields[key] for key in keys if key in self.fields), None)

    def refusal(self, keys: Sequence[str], expected: str) -> DataError:
        """Return the error for a field: its value and what was expected."""
        where = f"{self.place}{'.' if self.place.endswith(']') else ': '}{' or '.join(keys)}"
        if not any(key in self.fields for key in keys):
            there = ", ".join(map(str, self.fields))
            return DataError(
                f"{where} is missing, found only {there:.200}; fix the file, or convert it: {WHERE_FORMATS}"
            )
        return DataError(f"{where} is {self.value(*keys)!r:.80}, not {expected}; fix the file, or fetch it again")

    def field(self, kind: type[Field], *keys: str) -> Field:
        """Return the field of the first key that is present: file formats name the same field differently.

        Raises:
            DataError: it is absent, of another type, or invalid text.
        """
        value = self.value(*keys)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refusal(keys, KIND_NAMES[kind])
        if isinstance(value, str):
            self._check(keys, value)
        return value

    def line(self, *keys: str) -> str:
        """Return a text field that has no line feeds or other control characters: answers are stored one per line.

        Raises:
            DataError: see `field`; also if it holds a control character.
        """
        text = self.field(str, *keys)
        if CONTROL_CHARACTERS.search(text):
            raise self.refusal(keys, "a text on one line, without control characters")
        return text

    def texts(self, number: int, key: str) -> tuple[str, ...]:
        """Return a field that is a list of `number` texts; refuse anything else."""
        values = self.value(key)
        if not isinstance(values, list) or len(values) != number or not all(isinstance(text, str) for text in values):
            raise self.refusal([key], f"a list of {number} texts")
        for text in values:
            self._check([key], text)
        return tuple(values)

    def clip(self, *keys: str) -> str:
        """Return the name of a clip.

        Raises:
            DataError: see `field`; also if it is not a plain file name.
        """
        name = self.field(str, *keys)
        if is_outside_folder(name):
            raise self.refusal(keys, PLAIN_NAME)
        return name

    def index_below(self, number: int, *keys: str) -> int:
        """Return a field that is an index from 0 to `number` - 1, stored as a number or as its digits."""
        value = self.value(*keys)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < number:
            raise self.refusal(keys, f"a whole number from 0 to {number - 1}")
        return value

    def question_id(self, key: str) -> str:
        """Return the id of a question, stored as text or number; "" without the field."""
        value = self.value(key)
        if value is None:
            return ""
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise self.refusal([key], "a text or an integer")
        return str(value).strip()

    def _check(self, keys: Sequence[str], text: str) -> None:
        """Refuse half of a surrogate pair: JSON can express it, but no tokenizer accepts it."""
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise self.refusal(keys, "text: it holds half of a character")


def is_outside_folder(name: str) -> bool:
    """Return whether a clip name is not a plain file name, and so might point outside the clips' folder."""
    return "/" in name or "\\" in name or name in ("", ".", "..")


def read_question_type(row: AnnotationRow, question: str) -> str:
    """Return the annotated type, or else the question's first word if it is in `QUESTION_WORDS`, or else "other"."""
    for key in ("type", "answer_type"):
        if key in row.fields:
            return row.field(str, key)
    first = re.search(r"\w+", question)
    word = first[0].lower() if first else ""
    return word if word in QUESTION_WORDS else "other"


def explain_unsupported_format(expected: str) -> str:
    """Return the message part for a complete file whose format is not supported."""
    return f"unsupported format, expected {expected}; {WHERE_FORMATS}"


def name_kind(content: Any) -> str:
    """Return the kind of JSON content, for messages."""
    return KIND_NAMES.get(type(content), "null")


def recognise_format(text: str) -> str:
    """Return the kind of `FILE_BEGINNINGS` that the beginning of a text matches; "" if none matches."""
    start = text[:10_000].lstrip()
    return next((kind for kind, pattern in FILE_BEGINNINGS.items() if re.match(pattern, start)), "")


def refuse_other_kind(text: str, path: Path, expected: Sequence[str]) -> None:
    """Refuse a text whose beginning shows another kind of file than expected.

    Args:
        text: the file's content.
        path: the file.
        expected: kinds of `FILE_BEGINNINGS` that the caller can read.

    Raises:
        DataError: names both kinds.
    """
    kind = recognise_format(text)
    if kind and kind not in expected:
        raise DataError(f"{path}: this is {kind}: {explain_unsupported_format(expected[0])}")


def is_file(path: Path) -> bool:
    """Return whether a file exists; False for a broken or circular link, and for a name that is too long.

    Raises:
        DataError: permission to read its folder is missing.
    """
    try:
        return path.is_file()
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): fix the permissions") from error
    except OSError:
        return False


def find_file(paths: Sequence[Path]) -> Path | None:
    """Return the first of the files that exists, None if none does; log its name if there were alternatives."""
    found = next((path for path in paths if is_file(path)), None)
    if found is not None and len(paths) > 1:
        logger.info("reading %s", found)
    return found


def choose_file(paths: Sequence[Path], remedy: str) -> Path:
    """Return the first of the files that exists, see `find_file`.

    Raises:
        DataError: none exists; the message ends with `remedy`.
    """
    found = find_file(paths)
    if found is None:
        names = list(dict.fromkeys(path.name for path in paths))
        others = f", nor {', '.join(names[1:])}" if len(names) > 1 else ""
        raise DataError(f"{paths[0]}: no such file{others}\n{remedy}")
    return found


def list_clips(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the clips of a folder by name without suffix; earlier suffixes have priority.

    A folder that does not exist has no clips. Broken and circular links are ignored.

    Raises:
        DataError: the folder cannot be read.
    """
    rank = {suffix: place for place, suffix in enumerate(suffixes)}
    try:
        with os.scandir(folder) as entries:
            paths = [path for entry in entries if is_file(path := Path(entry.path))]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}): fix the permissions") from error
    paths = [path for path in paths if path.suffix.lower() in rank]
    return {path.stem: path for path in sorted(paths, key=lambda path: (-rank[path.suffix.lower()], path.suffix))}


def read_text(path: Path) -> str:
    """Read the text of an annotation file, with or without a byte order mark; any line ending becomes a line feed.

    Raises:
        DataError: it is not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8; save it as UTF-8, or fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def read_json(path: Path) -> Any:
    """Read the content of a JSON file.

    Raises:
        DataError: it is not valid JSON; names line and column.
    """
    text = read_text(path)
    try:
        return _parse(text, str(path))
    except DataError:
        refuse_other_kind(text, path, (JSON_LIST, JSON_OBJECT))
        raise


def as_rows(content: Any, path: Path, key: str = "") -> list[AnnotationRow]:
    """Return a list of JSON objects as rows: the content of a file, or of one key in it.

    Raises:
        DataError: the content is anything else, or an empty list.
    """
    place = f"{path}: {key}"
    if not isinstance(content, list) or not content:
        if content == []:
            raise DataError(f"{path}: {key or 'the file'} is an empty list; fetch it again")
        kind = f"an object of {', '.join(content):.200}" if isinstance(content, dict) else name_kind(content)
        raise DataError(f"{path}: {key or 'the file'} is {kind}: {explain_unsupported_format('a list of objects')}")
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise DataError(f"{place}[{number}] is {row!r:.80}, not an object; fix the file, or fetch it again")
    return [AnnotationRow(f"{place}[{number}]", row) for number, row in enumerate(content)]


def read_json_list(path: Path) -> list[AnnotationRow]:
    """Read the rows of a file that is a JSON list of objects.

    Raises:
        DataError: see `read_json` and `as_rows`.
    """
    return as_rows(read_json(path), path)


def read_json_lines(path: Path) -> list[AnnotationRow]:
    """Read the rows of a file with one JSON object per line; blank lines are skipped.

    Raises:
        DataError: a line is damaged; names it.
    """
    rows, text = [], read_text(path)
    refuse_other_kind(text, path, (JSON_LINES, JSON_OBJECT))  # a single line is an object
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, str(path), number)
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {row!r:.80} is not an object; fix the file, or fetch it again")
        rows.append(AnnotationRow(f"{path}, line {number}", row))
    if not rows:
        raise DataError(f"{path}: empty; fetch it again")
    return rows


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[AnnotationRow]:
    """Read the rows of a csv file with a header; blank lines are skipped.

    In a TAB-separated file every line is a row and quotes are ordinary characters, so that a stray quote cannot swallow
    the rows after it; only a field that is entirely quoted is unquoted.

    Args:
        path: the file.
        columns: names of the columns that must be present; others are kept, too.
        delimiter: character between two fields.

    Raises:
        DataError: a line is damaged, or a column is missing; names the line.
    """
    text, tabs = read_text(path), delimiter == "\t"
    if len(columns) > 1 or tabs:  # a table of one column has no delimiter
        refuse_other_kind(text, path, (TAB_SEPARATED if tabs else COMMA_SEPARATED,))
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
                        f"{explain_unsupported_format(wanted)}"
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
    """Return a quoted field without its quotes and with doubled quotes undone; any other field unchanged."""
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def _parse(text: str, path: str, line: int | None = None) -> Any:
    """Parse JSON; `line` is the line number if the text is one line of the file."""
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line or error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        place = f"{path}{f', line {line}' if line else ''}: nested too deeply"
    except ValueError as error:  # a number with thousands of digits, a repeated key, NaN
        place = f"{path}{f', line {line}' if line else ''}: {error}"
    raise DataError(f"{place}: {DAMAGED_FILE}")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse repeated keys, because it is undefined which of the values counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return fields


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which are not valid JSON."""
    raise ValueError(f"{name} is not valid JSON")
