"""Access to a finished run, shared by the evaluations of its weights. Torch and Lightning are imported late."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.files import hash_file, lock_folder
from cdc_mmpg.launchers import check_environment
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import (
    ANNOTATIONS_KEY,
    CONFIG,
    RESULTS,
    find_results,
    hash_annotations,
    read_inputs,
    read_results,
    read_settings,
)

if TYPE_CHECKING:
    from cdc_mmpg.training.experiment import Experiment

WEIGHTS = "best.ckpt"
VOCABULARY = "vocab.txt"  # in the folder of a run from a release
ALLOWED_PACKAGES = ("cdc_mmpg", "data_modules")  # packages whose classes a run's configuration may name
IMPORTS_VARIABLE = "CDC_MMPG_IMPORTS"  # environment variable: further allowed packages, separated by commas


def run_evaluation(
    name: str,
    description: str,
    needed: str,
    evaluate: Callable[[Path, Sequence[str]], None],
    arguments: Sequence[str] | None,
) -> int:
    """Evaluate the run that a command line names; return the exit code (see `errors`).

    Args:
        name: name of the evaluation, see `locate_evaluation`.
        description: description of the command.
        needed: kind of run that is needed, for the help.
        evaluate: function that evaluates the run in a folder and writes the results, with the command's arguments.
        arguments: arguments of the command; None for those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", type=Path, help=f"folder of a finished run {needed}")
    run: Path = parser.parse_args(arguments).run
    log_to_terminal()
    exit_on_signals()

    def evaluate_alone() -> None:
        load_finished_results(run)  # fails before the evaluation's folder is created
        with lock_folder(locate_evaluation(run, name)):
            evaluate(run, arguments)

    return run_to_exit_code(evaluate_alone)


def load_finished_results(run: Path) -> dict[str, Any]:
    """Read the results of a finished run.

    Raises:
        CheckpointError: the run is not finished, or damaged; names the finished runs of the dataset.
    """
    results = read_results(run)
    lacking = [name for name in (RESULTS, CONFIG, WEIGHTS) if not (run / name).is_file()]
    if results is None or lacking:
        unusable = f"{RESULTS} cannot be used" if results is None and RESULTS not in lacking else ""
        others = _list_finished_runs(run)
        raise CheckpointError(
            f"{run}: not a finished run ({', '.join(filter(None, [unusable, *(f'no {name}' for name in lacking)]))}); "
            + (
                "finished runs of the dataset:"
                + "".join(f"\n  METHOD={other.parent.name} SEED={other.name.removeprefix('seed')}" for other in others)
                + "\nUse one of them, or train this one first (make train METHOD=...)"
                if others
                else "train it first (make train METHOD=...)"
            )
        )
    return results


def _list_finished_runs(run: Path) -> list[Path]:
    """Return the finished runs of the same dataset that have weights and answer questions, the newest first."""
    dated = []
    for path in find_results(run.absolute().parents[1], "*/seed*"):
        other = path.parent
        results = read_results(other)
        if results and "accuracy" in results and (other / WEIGHTS).is_file():
            dated.append((str(results.get("finished")), other))
    return [other for _, other in sorted(dated, reverse=True)]


def locate_evaluation(run: Path, evaluation: str) -> Path:
    """Return the folder of an evaluation: beside the methods' folders, by the evaluation's name and the run's seed."""
    run = run.absolute()
    return run.parents[1] / evaluation / run.name


def identify_run(run: Path) -> dict[str, str]:
    """Return the name of a run and the digest of its weights, by which `is_done` recognizes an evaluation."""
    run = run.absolute()
    return {"run": f"{run.parent.name}/{run.name}", WEIGHTS: hash_file(run / WEIGHTS)}


def is_done(folder: Path, source: Mapping[str, str]) -> bool:
    """Return whether a folder has this evaluation of these weights; if so, print it."""
    results = read_results(folder)
    if results is None or results.get("made_of") != source:
        return False
    print(f"{folder}: finished on {results.get('finished')}; delete the folder to evaluate anew")
    return True


def reopen(
    run: Path, vocab: str | None = None, reads_data: bool = True, places: Mapping[str, str | None] | None = None
) -> "Experiment":
    """Return the experiment of a finished run with the weights of its best epoch, on one CPU device.

    A configuration names classes, and importing a class runs its module. So only classes of this project and of the
    packages in `CDC_MMPG_IMPORTS` are imported. The run's trainer settings are replaced. No data is read yet.

    Args:
        run: folder of the run.
        vocab: path of `vocab.txt`, if it has moved since training.
        reads_data: whether the dataset will be read; if so, its annotations must not have changed since training.
        places: arguments of the dataset that name folders which have moved since training; None keeps the run's.

    Raises:
        ConfigError: the configuration lacks a part, or names a class of another package or of one that is not here.
        DataError: the annotations have changed since training; names the folder.
        CheckpointError: the weights are damaged.
    """
    settings = read_settings(run)
    try:
        model, data = settings["model"]["init_args"], settings["data"]["init_args"]
        for part in (settings["model"], settings["data"], model["head"]):
            part["class_path"]
        model["encoder"]["checkpoint"] = None  # `best.ckpt` has all weights
        data |= {name: place for name, place in (places or {}).items() if place}
        root = Path(data["root"])
        if "frame_cache" in data:
            data["frame_cache"] = "disk"  # an evaluation reads every frame only once
        for name in ("adr", "reading"):  # the run's copies
            if model.get(name):
                model[name] = str(run / f"{name}.safetensors")
        if vocab or (run / VOCABULARY).is_file():
            data["vocab"] = vocab or str(run / VOCABULARY)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run / CONFIG}: not the configuration of a run ({error!r}): train anew") from error
    settings["trainer"] = {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto",
                           "precision": "32-true", "default_root_dir": str(run)}  # fmt: skip
    _refuse_foreign_classes(run, settings)
    trained_on = read_inputs(run).get(ANNOTATIONS_KEY)
    if reads_data and trained_on is not None and root.is_dir() and trained_on != hash_annotations(root):
        raise DataError(f"{root}: its annotations changed since {run} was trained: restore them, or train anew")

    check_environment()

    from cdc_mmpg.models.weights import load_checkpoint  # noqa: PLC0415  see `training.cli`
    from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415

    experiment = Experiment(settings, run=False)
    experiment.model.load_state_dict(load_checkpoint(run / WEIGHTS)["state_dict"])
    return experiment


def _refuse_foreign_classes(run: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a configuration with classes of packages that are not allowed or not here, before any is imported.

    Raises:
        ConfigError: names the classes, and how to allow them.
    """
    allowed = {*ALLOWED_PACKAGES, *filter(None, os.environ.get(IMPORTS_VARIABLE, "").split(","))}
    package_of = {path: path.partition(".")[0] for path in sorted(_list_class_paths(settings))}
    if foreign := [path for path, package in package_of.items() if package not in allowed]:
        packages = ",".join(sorted({package_of[path] for path in foreign}))
        raise ConfigError(
            f"{run / CONFIG} names classes outside this project, whose code would run: {', '.join(foreign)}. If you "
            f"trust the run and that code, set {IMPORTS_VARIABLE}={packages} in the environment"
        )
    if absent := sorted({package for package in package_of.values() if find_spec(package) is None}):
        raise ConfigError(
            f"{run / CONFIG} names classes of {', '.join(absent)}, which cannot be imported: work in the folder of the "
            "project, where data_modules is, or name the folders of these packages in PYTHONPATH"
        )


def _list_class_paths(tree: Any) -> Iterator[str]:
    """Yield the path of every class in a configuration, at any depth."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "class_path" or (key in ("model", "data", "head", "encoder") and not isinstance(value, Mapping)):
                yield str(value)  # a class without arguments may be a plain string
            yield from _list_class_paths(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _list_class_paths(value)
