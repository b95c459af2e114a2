"""Reading weights from files that others made, without running any code that is in them."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
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
    """Write weights that leave a run: safetensors, whole or not at all."""
    with atomic_write(path) as file:
        file.write(save({key: value.detach().cpu().contiguous() for key, value in state.items()}, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that `save_safetensors` put beside the weights; empty where there are none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name: safetensors, a Lightning `.ckpt` or a `.pth`, on the CPU.

    Raises:
        CheckpointError: absent, unreadable, or it names code to run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a' if path.is_dir() else 'no such'} checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = load_checkpoint(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no weights, only {', '.join(map(str, content)) or 'nothing'}")
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a file that `torch.save` wrote, every checksum in it verified.

    Extras that old Lightning versions pickled beside the weights (callback classes, hyper-parameters) become inert
    placeholders; anything else that is not data is refused.

    Raises:
        CheckpointError: truncated, damaged, not a checkpoint, or it names code to run.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise CheckpointError(f"{path}: damaged, the checksum of {damaged} is wrong")
        with warnings.catch_warnings(action="ignore"):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_DataOnly)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise CheckpointError(
            f"{path}: not a readable checkpoint: cut short, damaged or no checkpoint ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


class _Placeholder:
    """Stands for an object of a class that is not imported; takes any state and does nothing."""

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
    """Builds tensors and containers only; `torch.load` resolves the storage types before it asks here."""

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
            f"it names {module}.{name}, which is code: refused, nothing was run. "
            "Save the weights alone (safetensors, or torch.save of the state_dict)"
        )


def _load_data(file: BinaryIO, **arguments: Any) -> Any:
    return _DataUnpickler(file, **arguments).load()


# What `torch.load` asks of a pickle module; the older file layout goes through `load`, which must be as strict.
_DataOnly = SimpleNamespace(Unpickler=_DataUnpickler, load=_load_data, __name__="data_only")
