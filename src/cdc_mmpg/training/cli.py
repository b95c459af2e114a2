"""The command line of a run: `fit --config DATASET.yaml --config METHOD.yaml ...` trains and tests.

Several commands with `--` between them run one after another in one process: of small ones the imports take longest.

Lightning's own (see its documentation), with three additions: what the dataset fixes is handed to the model, a run
that was stopped goes on where it was, and a finished one leaves `results.json`. Lightning is imported late: refusing
a wrong path or finding a run finished takes no time.
"""

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.files import expand_home
from cdc_mmpg.launchers import check_environment, find_launch
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import (
    CONFIG,
    RESUME,
    SURROUNDINGS,
    find_dataset_config,
    fingerprint,
    read_results,
    read_settings,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (see `errors`; 128 + the signal's number when stopped by one)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    log_to_terminal()
    checks = arguments[:1] == ["check"]
    for _, words in groupby(arguments[1:] if checks else arguments, lambda argument: argument != "--"):
        if (command := list(words)) != ["--"]:
            leave_on_signals()
            sys.argv[1:] = command  # Lightning starts its other processes with these: they end with the command
            if code := exit_code(partial(_check if checks else _run, command)):
                return code
    return 0


def _run(arguments: Sequence[str]) -> None:
    """One command."""
    if not is_finished(arguments):
        refuse_other_settings(arguments)
        check_paths(arguments)
        check_environment()
        find_launch().check_arguments({name: option(arguments, f"trainer.{name}") for name in ("devices", "num_nodes")})
        from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  imports torch and Lightning: 10 s

        Experiment(arguments)


def _check(arguments: Sequence[str]) -> None:
    """Parse a command whose data and weights may be still to be made; nothing is built or trained.

    Raises:
        CDCError: the arguments are not those of a run, or its folder holds a run with others.
    """
    from cdc_mmpg.training.experiment import check_arguments  # noqa: PLC0415  see `_run`

    vocab = option(arguments, "data.init_args.vocab")
    there = not vocab or Path(expand_home(vocab)).is_file()
    check_arguments([word for word in arguments if there or not word.startswith("--data.init_args.vocab=")])


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value given to `--name=value` or `--name value`."""
    values = [after for before, after in zip(arguments, [*arguments[1:], ""], strict=True) if before == f"--{name}"]
    values += [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"--{name}=")]
    return values[-1] if values else None


def is_finished(arguments: Sequence[str]) -> bool:
    """Return whether the run of a command is finished, and say so."""
    folder = option(arguments, "trainer.default_root_dir")
    if not folder:
        return False
    run = Path(expand_home(folder))
    results = read_results(run)
    if results is None or results.get("fingerprint") != fingerprint(arguments):
        return False
    # Where a kill came right after the results.
    shutil.rmtree(run / RESUME, ignore_errors=True)
    print(f"{folder}: finished on {results.get('finished')}; delete the folder to train anew")
    return True


def refuse_other_settings(arguments: Sequence[str]) -> None:
    """Refuse options that a finished run in the same folder did not have, before anything slow is imported.

    Raises:
        ConfigError: names them, with both values.
    """
    folder = Path(expand_home(option(arguments, "trainer.default_root_dir") or ""))
    try:
        if not (folder / CONFIG).is_file() or read_results(folder) is None:
            return
    except OSError:  # no file system holds such a path, which is refused later
        return
    settings, lines = read_settings(folder), []
    given = {name: value for name, equals, value in (word[2:].partition("=") for word in arguments) if equals}
    for name, value in given.items():
        there: Any = settings
        for key in name.split("."):
            there = there.get(key, KeyError) if isinstance(there, dict) else KeyError
        free = name in (*SURROUNDINGS, "trainer.default_root_dir") or name.endswith("class_path")
        if not free and (there is None or isinstance(there, str | int | float)) and not _is_same_value(value, there):
            lines.append(f"  {name}: {there!r} there, {value!r} asked for")
    if lines:
        raise ConfigError(
            f"{folder} holds a finished run with another configuration:\n" + "\n".join(lines) + "\n"
            "Type that run's command to see that it is finished, or delete or rename the folder."
        )


def _is_same_value(given: str, there: str | int | float | None) -> bool:
    """Return whether an option's word means the value that a configuration holds."""
    if there is None or isinstance(there, bool):
        return given.lower() == {None: "null", True: "true", False: "false"}[there]
    if isinstance(there, int | float):
        try:
            return float(given) == there
        except ValueError:
            return False
    return given == there or Path(expand_home(given)).absolute() == Path(expand_home(there)).absolute()


def check_paths(arguments: Sequence[str]) -> None:
    """Refuse paths that lead nowhere before anything slow is imported."""
    if root := option(arguments, "data.init_args.root"):
        wrong = _examine(root) or "no such folder"
        if wrong == "a folder":
            try:
                wrong = "" if any(Path(expand_home(root)).iterdir()) else "an empty folder"
            except OSError as error:
                raise DataError(f"{root}: may not be read ({error.strerror})") from error
        if wrong:
            raise DataError(f"{root}: {wrong}\n{_source_of_dataset(arguments)}".rstrip())
    for name, variable, kind in (
        ("data.init_args.vocab", "VOCAB", DataError),
        ("model.init_args.encoder.checkpoint", "CHECKPOINT", CheckpointError),
    ):
        value = option(arguments, name)
        if value and ("." in value or value.startswith("~")) and (what := _examine(value)) != "a file":
            raise kind(f"{value}: {what or 'no such file'}; {variable}= names a file")


def _examine(name: str) -> str:
    """Return "a file", "a folder", or nothing where there is neither.

    Raises:
        ConfigError: no file system holds such a path.
    """
    path = Path(expand_home(name))
    try:
        return "a file" if path.is_file() else "a folder" if path.is_dir() else ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r}: not a usable path ({getattr(error, 'strerror', None) or error})") from error


def _source_of_dataset(arguments: Sequence[str]) -> str:
    """What the dataset's configuration says at its top about where the data comes from."""
    path = find_dataset_config(arguments)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    return "\n".join(line[2:] for line in lines if line.startswith("#"))
