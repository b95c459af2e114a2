"""results.json: what a run was and what came out, written last, so that it marks a finished run."""

import hashlib
import json
import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import atomic_write, file_digest

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"  # of a run: its whole configuration
INPUTS = "inputs.json"  # digests of what it began with
RESULTS = "results.json"
ANNOTATED = "content of data.init_args.root (annotations)"  # in `INPUTS`
RESUME = "resume"  # folder of a run with its last two complete states; gone when it has results
ANNOTATIONS = (".json", ".jsonl", ".csv", ".txt")
SOURCES = ("src", "experiments", "data_modules")  # folders of the repository whose files make a run

# Where and how fast a run computes, not what: these may change between a run and its resumption.
SURROUNDINGS = (
    "data.init_args.root", "data.init_args.cache_dir", "data.init_args.num_workers", "data.init_args.vocab",
    "data.init_args.per_device", "data.init_args.frame_cache", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.enable_progress_bar", "trainer.log_every_n_steps",
)  # fmt: skip

# Types of what others read of results.json, where it is there and not null; "*" stands for every other key.
Shape = Any
NUMBER = (int, float)
_CELLS = {"*": {"*": {"*": {"*": NUMBER}}}}  # by case, group of devices, type of question
SHAPE: Shape = {
    **dict.fromkeys(("dataset", "method", "task", "protocol", "monitor", "machine", "devices", "commit", "finished",
                     "encoder", "reasoner", "fingerprint"), str),
    **dict.fromkeys(("seed", "best_epoch", "epochs"), int),
    **{key: {"*": NUMBER} for key in ("metrics", "questions", "parameters", "bytes", "seconds", "labels")},
    **{key: {"*": str} for key in ("splits", "versions")},
    "accuracy": _CELLS, "floors": _CELLS, "median_rank": {"*": {"*": NUMBER}}, "payloads": {"*": {"bytes": NUMBER}},
    "data": {"*": {"ceiling": NUMBER, "left_out": NUMBER}},
    "domains": {"kind": str, "held_out": [str]},
    "published": [{"split": str, "what": str, "published": NUMBER, "here": NUMBER, "same": bool}],
    "probes": [{"what": str, "from": str, **dict.fromkeys(
        ("accuracy", "degrees", "low", "high", "chance", "majority", "number"), NUMBER)}],
}  # fmt: skip
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "timm", "av", "tokenizers", "numpy")


def write_json(content: Any, path: Path) -> None:
    """Write JSON, whole or not at all; numbers that are not finite, which JSON lacks, become null and are named."""
    lost: list[str] = []
    content = _finite(content, "", lost)
    if lost:
        logger.warning("%s: not finite, written as null: %s", path, ", ".join(lost))
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def _finite(content: Any, place: str, lost: list[str]) -> Any:
    """Return JSON content with None for numbers that are not finite, whose places are added to `lost`."""
    if isinstance(content, dict):
        return {key: _finite(value, f"{place}/{key}", lost) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value, f"{place}/{number}", lost) for number, value in enumerate(content)]
    if isinstance(content, float) and not math.isfinite(content):
        lost.append(place)
        return None
    return content


def fingerprint(arguments: Sequence[str]) -> str:
    """A digest of a command: its arguments, and the content of the weights and configurations that they name."""
    digest = hashlib.sha256(repr(list(arguments)).encode())
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        path = Path(value if equals else following)
        if name.startswith(("--model.", "--config", "-c")) and path.is_file():
            digest.update(file_digest(path).encode())
        if name == "--data.init_args.root" and path.is_dir():
            digest.update(annotations_digest(path).encode())
    return digest.hexdigest()


def find_dataset_config(arguments: Sequence[str]) -> Path | None:
    """Return the file with the dataset's configuration that a command line names, None where it names none."""
    paths = (Path(name.removeprefix("--config=")) for name in arguments)
    return next((path for path in paths if path.parent.name == "datasets" and path.is_file()), None)


def annotations_digest(root: Path) -> str:
    """Of the content of a dataset's annotation files, in its folder and in those just below."""
    digest, root = hashlib.sha256(), root.expanduser()
    for pattern in ("*", "*/*"):
        for path in sorted(root.glob(pattern)):
            try:
                if path.suffix.lower() in ANNOTATIONS and path.is_file():
                    digest.update(f"{path.relative_to(root)} {file_digest(path)}\n".encode(errors="surrogateescape"))
            except OSError as error:
                raise DataError(f"{path}: may not be read ({error.strerror}): mend that") from error
    return digest.hexdigest()


def find_results(folder: Path, pattern: str) -> list[Path]:
    """Return the results.json of the runs in a folder, in the order of their paths.

    Path.glob fails on the first entry that cannot be looked into, such as a link in a circle; here it is no run.

    Args:
        folder: where to look.
        pattern: of the runs below it, such as "*/seed*".
    """
    return sorted(folder / name for name in glob(f"{pattern}/{RESULTS}", root_dir=folder))


def read_results(run: Path) -> dict[str, Any] | None:
    """Return the results of a finished run, None of any other; damaged ones count as none, with a warning."""
    path = run / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if (place := find_misfit(results)) is not None:
            raise ValueError(f"{place or 'the whole'} is not what a test writes there")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: damaged (%s): left out; delete the folder and train anew", path, error)
        return None
    found: dict[str, Any] = results
    return found


def find_misfit(results: Any, shape: Shape = SHAPE) -> str | None:
    """Return the place (a JSON pointer) of the first value of another type than `SHAPE` says, None where all fit."""
    if not isinstance(results, dict):
        return ""
    for cases in (results.get("accuracy"), results.get("floors")):
        for groups in cases.values() if isinstance(cases, dict) else ():
            for kinds in groups.values() if isinstance(groups, dict) else ():
                for cell in kinds.values() if isinstance(kinds, dict) else ():
                    if not isinstance(cell, dict) or any(cell.get(key) is None for key in ("value", "low", "high")):
                        return "/accuracy or /floors"
    return _misfit(results, shape, "")


def _misfit(value: Any, shape: Shape, place: str) -> str | None:
    if value is None or shape is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return place
    if isinstance(shape, dict | list):
        if not isinstance(value, type(shape)):
            return place
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            inner = shape[0] if isinstance(shape, list) else shape.get(key, shape.get("*"))
            if (found := _misfit(part, inner, f"{place}/{key}")) is not None:
                return found
        return None
    return None if isinstance(value, shape) else place


def read_settings(run: Path) -> dict[str, Any]:
    """Return the configuration of a run.

    Raises:
        ConfigError: it is damaged.
    """
    import yaml  # noqa: PLC0415  the device has none

    path = run / CONFIG
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"holds a {type(settings).__name__}")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not the configuration of a run ({reason}): put it back, or train anew") from error
    return settings


def read_inputs(run: Path) -> dict[str, str]:
    """Return the digests of what a run began with, none of a run that noted none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run / INPUTS
    try:
        inputs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(inputs, dict):
            raise TypeError(f"holds a {type(inputs).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}): put it back, or delete {run} to train anew") from error
    return inputs


def provenance() -> dict[str, Any]:
    """The commit and the versions that made a result."""
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "HEAD")
    untracked = [f":/{folder}" for folder in SOURCES]  # from the top of the repository
    if commit and (
        _git(here, "status", "--porcelain", "--untracked-files=no")
        or _git(here, "status", "--porcelain", "--untracked-files=all", "--", *untracked)
    ):
        commit += "-dirty"
    return {
        "commit": commit or "unknown",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
