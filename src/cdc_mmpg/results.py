"""results.json: settings and results of a run. It is written last and so marks a finished run."""

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
from cdc_mmpg.files import atomic_write, hash_file

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"  # in the folder of a run: its complete configuration
INPUTS = "inputs.json"  # digests of the files that the run started from
RESULTS = "results.json"
PREDICTIONS = "predictions.test.csv"  # answers of the test
ANNOTATIONS_KEY = "content of data.init_args.root (annotations)"  # key of `INPUTS`
RESUME = "resume"  # in the folder of a run: its last two complete states, deleted when it has results
ANNOTATION_SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
SOURCE_FOLDERS = ("src", "experiments", "data_modules")  # folders of the repository with the code and settings of a run

# Keys that affect where and how fast a run computes, not what: they may differ when it is resumed.
RUNTIME_ONLY_KEYS = (
    "data.init_args.root", "data.init_args.cache_dir", "data.init_args.num_workers", "data.init_args.vocab",
    "data.init_args.per_device", "data.init_args.frame_cache", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.enable_progress_bar", "trainer.log_every_n_steps",
)  # fmt: skip

# Types of the values of results.json that other code reads, if present and not null; "*" is any other key.
Shape = Any
NUMBER = (int, float)
_CELLS = {"*": {"*": {"*": {"*": NUMBER}}}}  # by condition, group of devices, type of question
RESULTS_SHAPE: Shape = {
    **dict.fromkeys(("dataset", "method", "task", "protocol", "monitor", "machine", "devices", "commit", "finished",
                     "encoder", "reasoner", "fingerprint"), str),
    **dict.fromkeys(("seed", "best_epoch", "epochs"), int),
    **{key: {"*": NUMBER} for key in ("metrics", "questions", "parameters", "bytes", "seconds", "labels")},
    **{key: {"*": str} for key in ("splits", "versions")},
    "accuracy": _CELLS, "floors": _CELLS, "median_rank": {"*": {"*": NUMBER}}, "payloads": {"*": {"bytes": NUMBER}},
    "data": {"*": {"ceiling": NUMBER, "left_out": NUMBER}},
    "domains": {"kind": str, "held_out": [str]},
    "predictions": {"file": str, "sha256": str, "unanswered": int},
    "published": [{"split": str, "what": str, "published": NUMBER, "here": NUMBER, "same": bool}],
    "probes": [{"what": str, "from": str, **dict.fromkeys(
        ("accuracy", "degrees", "low", "high", "chance", "majority", "number"), NUMBER)}],
}  # fmt: skip
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "timm", "av", "tokenizers", "numpy")


def write_json(content: Any, path: Path) -> None:
    """Write JSON atomically; non-finite numbers, which JSON lacks, become null and are named in a warning."""
    lost: list[str] = []
    content = _replace_non_finite(content, "", lost)
    if lost:
        logger.warning("%s: not finite, written as null: %s", path, ", ".join(lost))
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def _replace_non_finite(content: Any, place: str, lost: list[str]) -> Any:
    """Return JSON content with None for non-finite numbers, whose JSON pointers are appended to `lost`."""
    if isinstance(content, dict):
        return {key: _replace_non_finite(value, f"{place}/{key}", lost) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_non_finite(value, f"{place}/{number}", lost) for number, value in enumerate(content)]
    if isinstance(content, float) and not math.isfinite(content):
        lost.append(place)
        return None
    return content


def hash_command(arguments: Sequence[str]) -> str:
    """Return a digest of a command: its arguments, and the weights, configurations and annotations that they name."""
    digest = hashlib.sha256(repr(list(arguments)).encode())
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        path = Path(value if equals else following)
        if name.startswith(("--model.", "--config", "-c")) and path.is_file():
            digest.update(hash_file(path).encode())
        if name == "--data.init_args.root" and path.is_dir():
            digest.update(hash_annotations(path).encode())
    return digest.hexdigest()


def find_dataset_config(arguments: Sequence[str]) -> Path | None:
    """Return the path of the dataset's configuration on a command line, None if there is none."""
    paths = (Path(name.removeprefix("--config=")) for name in arguments)
    return next((path for path in paths if path.parent.name == "datasets" and path.is_file()), None)


def hash_annotations(root: Path) -> str:
    """Return a digest of a dataset's annotation files, down to its subfolders; a DataError names an unreadable one."""
    digest, root = hashlib.sha256(), root.expanduser()
    for pattern in ("*", "*/*"):
        for path in sorted(root.glob(pattern)):
            try:
                if path.suffix.lower() in ANNOTATION_SUFFIXES and path.is_file():
                    digest.update(f"{path.relative_to(root)} {hash_file(path)}\n".encode(errors="surrogateescape"))
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}): make it readable") from error
    return digest.hexdigest()


def find_results(folder: Path, pattern: str) -> list[Path]:
    """Return the results.json of the runs in a folder, in the order of their paths.

    Entries that cannot be opened, such as a circular link, are skipped; Path.glob would fail on the first of them.

    Args:
        folder: folder to search.
        pattern: glob pattern of the runs' folders below it, such as "*/seed*".
    """
    return sorted(folder / name for name in glob(f"{pattern}/{RESULTS}", root_dir=folder))


def read_results(run: Path) -> dict[str, Any] | None:
    """Return the results of a finished run, else None; log a warning for an unusable file and return None."""
    path = run / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if (place := find_misfit(results)) is not None:
            raise ValueError(f"unexpected value at {place or 'the top level'}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning(
            "%s: cannot be used (%s), so this run is ignored: restore the file or its permissions, or delete the "
            "folder and train anew",
            path, error,
        )  # fmt: skip
        return None
    checked: dict[str, Any] = results
    return checked


def find_misfit(results: Any, shape: Shape = RESULTS_SHAPE) -> str | None:
    """Return the JSON pointer of the first value whose type differs from `shape`, None if all match."""
    if not isinstance(results, dict):
        return ""
    for cases in (results.get("accuracy"), results.get("floors")):
        for groups in cases.values() if isinstance(cases, dict) else ():
            for kinds in groups.values() if isinstance(groups, dict) else ():
                for cell in kinds.values() if isinstance(kinds, dict) else ():
                    if not isinstance(cell, dict) or any(cell.get(key) is None for key in ("value", "low", "high")):
                        return "/accuracy or /floors"
    return _find_misfit(results, shape, "")


def _find_misfit(value: Any, shape: Shape, place: str) -> str | None:
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
            if (found := _find_misfit(part, inner, f"{place}/{key}")) is not None:
                return found
        return None
    return None if isinstance(value, shape) else place


def read_settings(run: Path) -> dict[str, Any]:
    """Return the configuration of a run.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    return read_configuration(run / CONFIG, "restore it, or train anew")


def read_configuration(path: Path, remedy: str) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Args:
        path: the file.
        remedy: advice in the error.

    Raises:
        ConfigError: the file is missing or damaged; names the line.
    """
    import yaml  # noqa: PLC0415  not installed on a device

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"holds a {type(settings).__name__}")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise ConfigError(f"{path}: not a configuration ({reason}): {remedy}") from error
    return settings


def read_inputs(run: Path) -> dict[str, str]:
    """Return the digests of the files that a run started from; empty if the run has no `INPUTS`.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run / INPUTS
    try:
        inputs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(inputs, dict):
            raise TypeError(f"holds a {type(inputs).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}): restore it, or delete {run} to train anew") from error
    return inputs


def describe_provenance() -> dict[str, Any]:
    """Return the commit and the package versions that produce a result."""
    here = Path(__file__).parent
    commit = _run_git(here, "rev-parse", "HEAD")
    untracked = [f":/{folder}" for folder in SOURCE_FOLDERS]  # relative to the top of the repository
    if commit and (
        _run_git(here, "status", "--porcelain", "--untracked-files=no")
        or _run_git(here, "status", "--porcelain", "--untracked-files=all", "--", *untracked)
    ):
        commit += "-dirty"
    return {
        "commit": commit or "unknown",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }


def _run_git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
