"""results.json: what a run was and what came out, written last, so that it marks a finished run."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cdc_mmpg.files import atomic_write, file_digest

RESULTS = "results.json"
RESUME = "resume"  # folder of a run with its last two complete states; gone when it has results
ANNOTATIONS = (".json", ".jsonl", ".csv", ".txt")
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "timm", "av", "tokenizers", "numpy")


def write_json(content: Any, path: Path) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


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


def annotations_digest(root: Path) -> str:
    """Of the content of a dataset's annotation files, in its folder and in those just below."""
    digest = hashlib.sha256()
    for pattern in ("*", "*/*"):
        for path in sorted(root.glob(pattern)):
            if path.suffix.lower() in ANNOTATIONS and path.is_file():
                digest.update(f"{path.relative_to(root)} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def read_results(run: Path) -> dict[str, Any] | None:
    """The results of a finished run, None of any other."""
    try:
        results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) else None


def provenance() -> dict[str, Any]:
    """The commit and the versions that made a result."""
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "HEAD")
    if commit and _git(here, "status", "--porcelain", "--untracked-files=no"):
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
