"""Reading weights from untrusted files without running any code in them."""

import json
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.files import atomic_write


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write weights as a safetensors file, atomically."""
    with atomic_write(path) as file:
        file.write(save({key: value.detach().cpu().contiguous() for key, value in state.items()}, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata that `save_safetensors` wrote with the weights; empty if there is none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")  # of weight files
FOREIGN_FORMATS = {  # magic bytes of files often mistaken for checkpoints, and what to do about them
    b"\x1f\x8b": "a gzip archive: unpack it and name a checkpoint file",
    b"BZh": "a bzip2 archive: unpack it and name a checkpoint file",
    b"\xfd7zXZ": "an xz archive: unpack it and name a checkpoint file",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it and name a checkpoint file",
    b"7z\xbc\xaf": "a 7z archive: unpack it and name a checkpoint file",
    b"Rar!": "a rar archive: unpack it and name a checkpoint file",
    b"ustar": "a tar archive: unpack it and name a checkpoint file",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow): PyTorch weights are needed",
    b"GGUF": "a GGUF file: PyTorch weights are needed",
    b"\x93NUMPY": "a single numpy array: PyTorch weights are needed",
}
WRAPPER_KEYS = (  # keys under which checkpoints nest their weights
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "weights",
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, onto the CPU: safetensors, a Lightning `.ckpt` or a `.pth`.

    The format is detected from the content, and from the file name only if the content is ambiguous.

    Raises:
        CheckpointError: the file is missing, unreadable, or refers to code.
    """
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
        raise CheckpointError(f"{path}: a folder, not a checkpoint file" + (f": name one in it: {', '.join(inside)}"
                                                                            if inside else ""))  # fmt: skip
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if _is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(_explain_unreadable(path, f"not a complete safetensors file ({error})")) from error
    content: Mapping[Any, Any] = load_checkpoint(path)
    while inner := next((content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None):
        content = inner
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no weights, only {', '.join(map(str, content)) or 'nothing'}")
    return state


def strip_prefix(state: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Strip the prefix that wrappers add to the names of weights (`module.`, `_orig_mod.`, `model.`).

    The prefix is the one that, once stripped, yields most of the `wanted` names; keys without it keep their names.
    """
    names, counts = set(wanted), Counter[str]()
    for key in state:
        parts = key.split(".")
        counts.update(
            "".join(f"{part}." for part in parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in names
        )
    prefix = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return others | {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like safetensors: the length of a JSON header, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return True
    return path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))  # the magic bytes of torch.save


def _explain_unreadable(path: Path, reason: str) -> str:
    """Return a message on an unreadable checkpoint: the format its first bytes reveal, else the `reason`."""
    with path.open("rb") as file:
        start = file.read(1024)
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n").lower()
    if not start:
        reason = "an empty file (0 bytes): fetch it again"
    elif text.startswith("version https://git-lfs"):
        reason = "a Git LFS pointer, a text file instead of the weights: fetch the file itself (git lfs pull)"
    elif text.startswith("<"):
        reason = "a web page, not the file it links to: download the file itself (its raw or download link)"
    elif text.startswith("{"):
        reason = _describe_json(path)
    elif names := _list_zip_names(path):
        if any(name.endswith("constants.pkl") for name in names):
            reason = "a TorchScript program, not weights: save its state_dict (torch.save) and name that file"
        elif not any(name.endswith("data.pkl") for name in names):
            inside = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
            reason = f"a zip archive of something else ({inside}): unpack it and name a checkpoint file"
    else:
        known = (kind for magic, kind in FOREIGN_FORMATS.items() if start.startswith(magic) or start[257:262] == magic)
        reason = next(known, reason)
    return f"{path}: {reason}"


def _list_zip_names(path: Path) -> list[str] | None:
    """Return the names in a zip archive, or None if the file is no zip archive or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def _describe_json(path: Path) -> str:
    """Describe a JSON file in place of weights: an index of shards, with their names, or anything else."""
    try:
        index = json.loads(path.read_bytes())
        shards = sorted(set(map(str, index["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "JSON, not weights: name the weight file next to it"
    named = ", ".join(shards[:3]) + ", ..." * (len(shards) > 3)
    remedy = "name that file" if len(shards) == 1 else "join them in one file (safetensors) and name it"
    return f"an index of {len(shards)} files that hold the weights ({named}), not weights: {remedy}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a file written by `torch.save` and verify every checksum in it.

    Objects that old Lightning versions pickled with the weights (callback classes, hyper-parameters) become inert
    placeholders; everything else that is not data is refused.

    Raises:
        CheckpointError: the file is truncated, damaged, not a checkpoint, or refers to code.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise CheckpointError(f"{path}: damaged, the checksum of {damaged} is wrong")
        # An open file: given a path ending in .safetensors, torch would ignore the content.
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                file.seek(0)
                content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_DataOnly)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # on damaged files the readers raise almost anything
        reason = f"not a readable checkpoint: truncated, damaged or of another format ({type(error).__name__}: {error})"
        raise CheckpointError(_explain_unreadable(path, reason)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


class _Placeholder:
    """Inert stand-in for an object whose class is not imported; accepts any state."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


class _DataUnpickler(pickle.Unpickler):
    """Unpickler for tensors and containers only; `torch.load` resolves storage types before it calls this."""

    ALLOWED: ClassVar = {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
    }
    INERT = ("pytorch_lightning", "lightning", "sacred", "argparse", "pathlib")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        if module.partition(".")[0] in self.INERT:
            return _Placeholder
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which is code: refused, nothing was run. "
            "Save the weights alone (safetensors, or torch.save of the state_dict)"
        )


def _load_data(file: BinaryIO, **arguments: Any) -> Any:
    return _DataUnpickler(file, **arguments).load()


# The interface that `torch.load` expects; the old file layout uses `load`, which must be equally strict.
_DataOnly = SimpleNamespace(Unpickler=_DataUnpickler, load=_load_data, __name__="data_only")
