"""Command line of a run: `fit --config DATASET.yaml --config METHOD.yaml ...` trains and tests.

Several commands separated by `--` run in sequence in one process, since imports dominate the time of small runs.

It is Lightning's command line (see its documentation) with three additions: the model gets settings of the dataset, a
stopped run resumes where it stopped, and a finished run writes `results.json`. Lightning is imported late, so that
refusing a wrong path or finding a finished run takes no time.
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
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import (
    CONFIG,
    RESUME,
    RUNTIME_ONLY_KEYS,
    find_dataset_config,
    hash_command,
    read_results,
    read_settings,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one or more commands; return the exit code (see `errors`; 128 + number if stopped by a signal)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    log_to_terminal()
    checks = arguments[:1] == ["check"]
    for _, words in groupby(arguments[1:] if checks else arguments, lambda argument: argument != "--"):
        if (command := list(words)) != ["--"]:
            exit_on_signals()
            sys.argv[1:] = command  # Lightning starts further processes with these arguments
            if code := run_to_exit_code(partial(_check if checks else _run, command)):
                return code
    return 0


def _run(arguments: Sequence[str]) -> None:
    """Run one command, unless its run is finished."""
    if not is_finished(arguments):
        refuse_other_settings(arguments)
        check_paths(arguments)
        check_environment()
        given = {name: find_option(arguments, f"trainer.{name}") for name in ("devices", "num_nodes")}
        find_launch().check_arguments(given)
        from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  imports torch and Lightning: 10 s

        Experiment(arguments)


def _check(arguments: Sequence[str]) -> None:
    """Parse a command whose data and weights may not exist yet; nothing is built or trained.

    Raises:
        CDCError: the arguments are invalid, or the folder has a run with other arguments.
    """
    from cdc_mmpg.training.experiment import check_arguments  # noqa: PLC0415  see `_run`

    vocab = find_option(arguments, "data.init_args.vocab")
    keeps_vocab = not vocab or Path(expand_home(vocab)).is_file()
    check_arguments([word for word in arguments if keeps_vocab or not word.startswith("--data.init_args.vocab=")])


def find_option(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option, given as `--name=value` or `--name value`; None if absent."""
    values = [after for before, after in zip(arguments, [*arguments[1:], ""], strict=True) if before == f"--{name}"]
    values += [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"--{name}=")]
    return values[-1] if values else None


def is_finished(arguments: Sequence[str]) -> bool:
    """Return whether the run of a command is finished; if so, print it and delete leftover states."""
    folder = find_option(arguments, "trainer.default_root_dir")
    if not folder:
        return False
    run = Path(expand_home(folder))
    results = read_results(run)
    if results is None or results.get("fingerprint") != hash_command(arguments):
        return False
    # Left behind by a kill right after the results were written.
    shutil.rmtree(run / RESUME, ignore_errors=True)
    print(f"{folder}: finished on {results.get('finished')}; delete the folder to train anew")
    return True


def refuse_other_settings(arguments: Sequence[str]) -> None:
    """Refuse options that differ from those of a finished run in the same folder, before any slow import.

    Raises:
        ConfigError: names the options with both values.
    """
    folder = Path(expand_home(find_option(arguments, "trainer.default_root_dir") or ""))
    try:
        if not (folder / CONFIG).is_file() or read_results(folder) is None:
            return
    except OSError:  # an invalid path, which is refused later
        return
    settings, lines = read_settings(folder), []
    given = {name: value for name, equals, value in (word[2:].partition("=") for word in arguments) if equals}
    for name, value in given.items():
        saved: Any = settings
        for key in name.split("."):
            saved = saved.get(key, KeyError) if isinstance(saved, dict) else KeyError
        ignored = name in (*RUNTIME_ONLY_KEYS, "trainer.default_root_dir") or name.endswith("class_path")
        if not ignored and (saved is None or isinstance(saved, str | int | float)) and not _is_same_value(value, saved):
            lines.append(f"  {name}: {saved!r} there, {value!r} requested")
    if lines:
        raise ConfigError(
            f"{folder} holds a finished run with another configuration:\n" + "\n".join(lines) + "\n"
            "Repeat that run's command to see that it is finished, or delete or rename the folder."
        )


def _is_same_value(given: str, saved: str | int | float | None) -> bool:
    """Return whether the text of an option means a value of a configuration."""
    if saved is None or isinstance(saved, bool):
        return given.lower() == {None: "null", True: "true", False: "false"}[saved]
    if isinstance(saved, int | float):
        try:
            return float(given) == saved
        except ValueError:
            return False
    return given == saved or Path(expand_home(given)).absolute() == Path(expand_home(saved)).absolute()


def check_paths(arguments: Sequence[str]) -> None:
    """Refuse paths of data, vocabulary and checkpoint that do not exist, before any slow import."""
    if root := find_option(arguments, "data.init_args.root"):
        problem = _describe_path(root) or "no such folder"
        if problem == "a folder":
            try:
                problem = "" if any(Path(expand_home(root)).iterdir()) else "an empty folder"
            except OSError as error:
                raise DataError(f"{root}: cannot be read ({error.strerror})") from error
        if problem:
            raise DataError(f"{root}: {problem}\n{_read_dataset_source(arguments)}".rstrip())
    for name, variable, kind in (
        ("data.init_args.vocab", "VOCAB", DataError),
        ("model.init_args.encoder.checkpoint", "CHECKPOINT", CheckpointError),
    ):
        value = find_option(arguments, name)
        if value and ("." in value or value.startswith("~")) and (found := _describe_path(value)) != "a file":
            raise kind(f"{value}: {found or 'no such file'}; {variable}= must name a file")


def _describe_path(name: str) -> str:
    """Return "a file", "a folder", or "" if there is neither.

    Raises:
        ConfigError: the path is invalid.
    """
    path = Path(expand_home(name))
    try:
        return "a file" if path.is_file() else "a folder" if path.is_dir() else ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r}: not a usable path ({getattr(error, 'strerror', None) or error})") from error


def _read_dataset_source(arguments: Sequence[str]) -> str:
    """Return the comments of the dataset's configuration, which say where the data comes from."""
    path = find_dataset_config(arguments)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    return "\n".join(line[2:] for line in lines if line.startswith("#"))
