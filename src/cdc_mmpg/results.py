"""results.json: what a run was and what came out, written last, so that it marks a finished run."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cdc_mmpg.files import atomic_write

RESULTS = "results.json"
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "timm", "av", "tokenizers", "numpy")


def write_json(content: Any, path: Path) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def file_digests(arguments: Sequence[str]) -> dict[str, str]:
    """Digests of the weights that a command begins with, by the argument that names them."""
    digests = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name.startswith("model.") and Path(value).is_file():
            digests[f"content of {name}"] = hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return digests


def fingerprint(arguments: Sequence[str]) -> str:
    """A digest of a command: its arguments, and the content of the weights and configurations that they name."""
    digest = hashlib.sha256(repr((list(arguments), file_digests(arguments))).encode())
    for argument in arguments:
        name = argument.partition("=")[2] or argument
        if name.endswith((".yaml", ".yml")) and Path(name).is_file():
            digest.update(Path(name).read_bytes())
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
