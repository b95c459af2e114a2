"""The content of W&B's offline files: W&B's records (protocol buffers) in a log of LevelDB's format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto import wandb_internal_pb2

HEADER_BYTES, BLOCK_BYTES, PART_HEADER_BYTES = 7, 32768, 7  # of the file, of its blocks and of their parts
FULL, LAST = 1, 4  # types of the parts that end a record


class LoggedArtifact(NamedTuple):
    """An artifact that a run logged."""

    type: str
    aliases: list[str]
    files: dict[str, str]  # local path by name
    metadata: dict[str, Any]


class LoggedRun(NamedTuple):
    """The content of the file of an offline run."""

    name: str
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    artifacts: dict[str, LoggedArtifact]  # by name
    exit_code: int
    kinds: set[str]  # of all records
    folder: Path  # with the media and the console's log

    def read_table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows of the last table that was logged by a name."""
        content = json.loads((self.folder / "files" / self.summary[f"{name}/path"]).read_text())
        return content["columns"], content["data"]


def read_records(content: bytes) -> Iterator[Any]:
    """Yield the records of a file; a part has a checksum (4 bytes), a length (2) and a type (1) before its data."""
    place, data = HEADER_BYTES, b""
    while place + PART_HEADER_BYTES <= len(content):
        if BLOCK_BYTES - place % BLOCK_BYTES < PART_HEADER_BYTES:  # no room for a part
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        place += PART_HEADER_BYTES
        data += content[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(data)
            data = b""


def read_offline_run(folder: Path) -> LoggedRun:
    """Read the file of the only offline run below a folder."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(read_records(path.read_bytes()))
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    summary: dict[str, Any] = {}
    history, artifacts, code = [], {}, -1
    for record in records:
        if record.HasField("config"):
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        for part in (record.summary.update, record.history.item):
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in part}
            summary |= values
        if record.HasField("history"):
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                            for item in record.history.item})  # fmt: skip
        if record.HasField("artifact"):
            logged = record.artifact
            files = {entry.path: entry.local_path for entry in logged.manifest.contents}
            metadata = json.loads(logged.metadata or "{}")
            artifacts[logged.name] = LoggedArtifact(logged.type, list(logged.aliases), files, metadata)
        if record.HasField("exit"):
            code = record.exit.exit_code
    kinds = {str(record.WhichOneof("record_type")) for record in records}
    return LoggedRun(run.display_name, run.run_group, run.job_type, list(run.tags), config, history, summary, artifacts,
                     code, kinds, path.parent)  # fmt: skip
