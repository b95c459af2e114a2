"""The names of a bundle's files, and how they are written: whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.files import atomic_write, json_digest
from cdc_mmpg.results import write_json

CLOUD_SETTINGS, GENERATOR, SIGNING_KEY, EXPORT_REPORT = (
    "cloud.json",
    "generator.safetensors",
    "signing_key.pem",
    "export.json",
)
DEVICE_FOLDERS = {"float32": "device", "int8": "device-int8"}


def write_settings(settings: dict[str, Any], path: Path) -> None:
    """Write settings with their own digest, so that their reader notices what was changed by accident."""
    written = json.loads(json.dumps(settings))  # numbers and keys as they will be read
    write_json({**written, "digest": json_digest(written)}, path)


def write_content(path: Path, content: bytes) -> None:
    """Write bytes to a file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, whole or not at all."""
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)


def count_folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
