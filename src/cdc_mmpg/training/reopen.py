"""A finished run, opened again: what evaluations of its weights share. Torch and Lightning are imported late."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.files import file_digest, lock_folder
from cdc_mmpg.launchers import check_environment
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import (
    ANNOTATED,
    CONFIG,
    RESULTS,
    annotations_digest,
    find_results,
    provenance,
    read_inputs,
    read_results,
    read_settings,
)

if TYPE_CHECKING:
    from cdc_mmpg.training.experiment import Experiment

ALLOWED_PACKAGES = ("cdc_mmpg", "data_modules")  # whose classes a run's configuration may name
IMPORTS = "CDC_MMPG_IMPORTS"  # in the environment: further packages that it may name, with commas between them


def run_evaluation(
    name: str,
    description: str,
    needed: str,
    evaluate: Callable[[Path, Sequence[str]], None],
    arguments: Sequence[str] | None,
) -> int:
    """Evaluate the run that a command line names; return the exit code (see `errors`).

    Args:
        name: of the evaluation, see `folder_of`.
        description: of what it does.
        needed: which run it takes.
        evaluate: writes the results of a run's folder; also gets the command's arguments, to keep them.
        arguments: of the command; None is those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", type=Path, help=f"folder of a finished run {needed}")
    run: Path = parser.parse_args(arguments).run
    log_to_terminal()
    leave_on_signals()

    def evaluate_alone() -> None:
        results_of(run)  # before the evaluation's folder is made
        with lock_folder(folder_of(run, name)):
            evaluate(run, arguments)

    return exit_code(evaluate_alone)


def results_of(run: Path) -> dict[str, Any]:
    """Return what a finished run has written.

    Raises:
        CheckpointError: it is none.
    """
    results = read_results(run)
    lacking = [name for name in (RESULTS, CONFIG, "best.ckpt") if not (run / name).is_file()]
    if results is None or lacking:
        damaged = f"{RESULTS} is damaged" if RESULTS not in lacking else ""
        others = _finished_beside(run)
        raise CheckpointError(
            f"{run}: not a finished run ({', '.join(filter(None, [damaged, *(f'no {name}' for name in lacking)]))}); "
            + (
                "finished are, there:"
                + "".join(f"\n  METHOD={other.parent.name} SEED={other.name.removeprefix('seed')}" for other in others)
                + "\nName one of them, or train this one first (make train METHOD=...)"
                if others
                else "train it first (make train METHOD=...)"
            )
        )
    return results


def _finished_beside(run: Path) -> list[Path]:
    """Return the finished runs of the same dataset that have weights and answer questions, the newest first."""
    found = []
    for path in find_results(run.absolute().parents[1], "*/seed*"):
        other = path.parent
        results = read_results(other)
        if results and "accuracy" in results and (other / "best.ckpt").is_file():
            found.append((str(results.get("finished")), other))
    return [other for _, other in sorted(found, reverse=True)]


def folder_of(run: Path, evaluation: str) -> Path:
    """Return where an evaluation of a run goes: beside the methods, under its own name and the run's seed."""
    run = run.absolute()
    return run.parents[1] / evaluation / run.name


def provenance_of(run: Path, weights: str) -> dict[str, str]:
    """Return which run an evaluation is of, and the digest of its weights: for `is_done`."""
    run = run.absolute()
    return {"run": f"{run.parent.name}/{run.name}", weights: file_digest(run / weights)}


def is_done(folder: Path, source: Mapping[str, str]) -> bool:
    """Return whether a folder holds this evaluation of this very run; print it where it does."""
    results = read_results(folder)
    if results is None or results.get("made_of") != source:
        return False
    print(f"{folder}: finished on {results.get('finished')}; delete the folder to evaluate anew")
    return True


def reopen(run: Path, vocab: str | None = None, reads_data: bool = True) -> "Experiment":
    """Return the experiment of a finished run, on one processor, its weights not loaded and its data not read.

    A configuration names classes, and importing one runs its module: only those of this project are imported, and of
    the packages that `CDC_MMPG_IMPORTS` names. Of its trainer nothing is kept.

    Args:
        run: its folder.
        vocab: `vocab.txt`, where it is not where training found it.
        reads_data: whether the dataset is to be read, whose annotations must be those of the training then.

    Raises:
        ConfigError: its configuration lacks a part, or names a class of another package.
        DataError: the annotations are not those that it was trained with; names the folder.
    """
    settings = read_settings(run)
    try:
        model, data = settings["model"]["init_args"], settings["data"]["init_args"]
        for part in (settings["model"], settings["data"], model["head"]):
            part["class_path"]
        model["encoder"]["checkpoint"] = None  # the run has all weights
        root = Path(data["root"])
        if "frame_cache" in data:
            data["frame_cache"] = "disk"  # for what reads batches by itself, once
        for name in ("adr", "reading"):  # the run's own copies
            if model.get(name):
                model[name] = str(run / f"{name}.safetensors")
        if vocab:
            data["vocab"] = vocab
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run / CONFIG}: not the configuration of a run ({error!r}): train anew") from error
    settings["trainer"] = {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto",
                           "precision": "32-true", "default_root_dir": str(run)}  # fmt: skip
    _refuse_foreign_classes(run, settings)
    before = read_inputs(run).get(ANNOTATED)
    if reads_data and before is not None and root.is_dir() and before != annotations_digest(root):
        raise DataError(f"{root}: its annotations changed since {run} was trained: restore them, or train anew")

    check_environment()

    from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  see `training.cli`

    return Experiment(settings, run=False)


def _refuse_foreign_classes(run: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a configuration that names classes of packages that are not allowed, before any is imported.

    Raises:
        ConfigError: names them, and how to allow them.
    """
    allowed = {*ALLOWED_PACKAGES, *filter(None, os.environ.get(IMPORTS, "").split(","))}
    foreign = sorted({path for path in _class_paths(settings) if path.partition(".")[0] not in allowed})
    if foreign:
        packages = ",".join(sorted({path.partition(".")[0] for path in foreign}))
        raise ConfigError(
            f"{run / CONFIG} names classes outside this project, whose code would run: {', '.join(foreign)}. If you "
            f"trust the run and that code, allow it: {IMPORTS}={packages} in the environment"
        )


def _class_paths(tree: Any) -> Iterator[str]:
    """Yield every class that a configuration names, at any depth."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "class_path" or (key in ("model", "data", "head", "encoder") and not isinstance(value, Mapping)):
                yield str(value)  # a class may be named without its arguments, too
            yield from _class_paths(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _class_paths(value)


def identity(
    folder: Path, experiment: "Experiment", source: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """Return what the results of an evaluation begin with.

    Args:
        folder: where they go, see `folder_of`.
        experiment: of the run.
        source: see `provenance_of`.
        arguments: of the command.
    """
    data = experiment.dataset
    return {
        "dataset": folder.parent.parent.name,
        "method": folder.parent.name,
        "seed": experiment.settings["seed_everything"],
        "task": data.task,
        "protocol": data.protocol,
        "splits": data.notes,
        "published": data.published(),
        "made_of": dict(source),
        "machine": f"{count_processors()} processors, {platform.system()} {platform.machine()}",
        "devices": "1 x cpu",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": list(arguments),
        **provenance(),
    }
