"""Parser of the command line: errors are `ConfigError`s, and for an unknown key the most similar one is named."""

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from cdc_mmpg.data.sampling import EpochDataModule
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.base import Method
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head
from cdc_mmpg.results import read_configuration

LINKED_KEYS = {  # keys that get the value of another key, by target
    "data.init_args.seed": "seed_everything",
    "model.init_args.seed": "seed_everything",
    "model.init_args.encoder.num_frames": "data.init_args.num_frames",
    "model.init_args.encoder.image_size": "data.init_args.image_size",
    "model.init_args.encoder.text_length": "data.init_args.text_length",
    "model.init_args.head.init_args.num_classes": "data.init_args.num_classes",
}


class Parser(LightningArgumentParser):
    """Parser that raises `ConfigError`s."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)  # --trainer.max_epoch is an error, not max_epochs

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error instead of printing the usage, which is pages long.

        Raises:
            ConfigError: always.
        """
        # The parser reports on every alternative type of an argument; drop the lines that do not help.
        noise = r"Union subtypes|Subtypes: \[|^\s*Errors:$|<class 'NoneType'>|Given value"
        raise ConfigError("\n".join(line for line in message.strip().splitlines() if not re.search(noise, line)))


UNKNOWN_KEY = re.compile(
    r"(?:[Kk]ey|Option) ['\"]([\w.]+)['\"] is not|[Uu]nrecognized arguments?: --([\w.]+)|not accept option '([\w.]+)'"
)


def explain_unknown_key(message: str, given: Sequence[str]) -> str:
    """Return a message of the parser; for an unknown key, its full dotted path and the most similar existing path.

    Args:
        message: message of the parser, which has only the last part of the key.
        given: dotted paths of all given keys.
    """
    unknown = UNKNOWN_KEY.search(message)
    if not unknown:
        return message
    name, known = unknown[1] or unknown[2] or unknown[3], _list_known_paths()
    path = next((key for key in given if f".{key}".endswith(f".{name}") and key not in known), name)
    leaves: dict[str, list[str]] = {}
    for key in known:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    leaf = path.rpartition(".")[2]
    near = [leaf] if leaf in leaves else sorted(other for other in leaves if other.startswith(leaf))
    near = near or difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.5)
    if not near:
        return f"{path}: there is no such key, and no similar one"
    nearest = max(leaves[near[0]], key=lambda key: difflib.SequenceMatcher(None, key, path).ratio())
    return f"{path}: there is no such key; the nearest that exists is {nearest}"


def _list_known_paths() -> list[str]:
    """Return the dotted paths of all keys of configurations, except those that are linked to others."""

    def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
        yield cls
        for child in cls.__subclasses__():
            yield from subclasses(child)

    places = {
        "trainer.": [Trainer],
        "data.init_args.": (cls for cls in subclasses(EpochDataModule) if not cls.__module__.startswith("cdc_mmpg")),
        "model.init_args.": subclasses(Method),
        "model.init_args.encoder.": [AllInOne],
        "model.init_args.head.init_args.": subclasses(Head),
    }
    paths = {
        f"{place}{name}"
        for place, classes in places.items()
        for cls in classes
        for name in inspect.signature(cls).parameters
    }
    paths -= {*LINKED_KEYS, "model.init_args.encoder.vocab_size"}
    return sorted(paths | {"config", "seed_everything", "matmul", "compile", "data.class_path", "model.class_path",
                           "model.init_args.head.class_path"})  # fmt: skip


def list_given_paths(arguments: Sequence[str] | dict[str, Any]) -> list[str]:
    """Return the dotted paths of all keys that a command line, with its files, or a configuration gives.

    Raises:
        ConfigError: a file is damaged; names it.
    """
    if isinstance(arguments, dict):
        return [path for path, _ in flatten(arguments)]
    paths = [argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        file = Path(value if equals else following)
        if name in ("--config", "-c") and file.is_file():
            paths += [path for path, _ in flatten(read_configuration(file, "fix it"))]
    return paths


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with their dotted keys."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
