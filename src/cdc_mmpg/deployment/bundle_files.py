"""Names of a bundle's files, and functions that write them atomically."""

import json
from pathlib import Path
from typing import Any

from cdc_mmpg.deployment.opened_release import BUNDLE_CONTENT
from cdc_mmpg.device.page import DEVICE_FOLDERS
from cdc_mmpg.files import atomic_write, hash_json
from cdc_mmpg.results import write_json
from cdc_mmpg.training.wandb_record import Content, name_artifact

CLOUD_SETTINGS, GENERATOR, SIGNING_KEY, EXPORT_REPORT = (
    "cloud.json",
    "generator.safetensors",
    "signing_key.pem",
    "export.json",
)


def write_settings(settings: dict[str, Any], path: Path) -> None:
    """Write settings together with their digest, so that accidental changes are detected."""
    written = json.loads(json.dumps(settings))  # numbers and keys as a reader will parse them
    write_json({**written, "digest": hash_json(written)}, path)


def write_content(path: Path, content: bytes) -> None:
    """Write bytes to a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def count_folder_bytes(folder: Path) -> int:
    """Return the total size of the files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def describe_bundles(run: Path, out: Path) -> Content:
    """Return the artifact with the bundles of an export, without the cloud's signing key, which must stay secret."""
    dataset, method, seed = run.absolute().parts[-3:]
    folders = (*DEVICE_FOLDERS.values(), "cloud")
    paths = {f"{name}/{path.name}": path for name in folders for path in sorted((out / name).glob("*"))}
    files = {name: path for name, path in paths.items() if BUNDLE_CONTENT.fullmatch(name)}
    return Content(name_artifact(dataset, method, seed, "bundles"), "bundle", files)
