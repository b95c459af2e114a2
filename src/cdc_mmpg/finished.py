"""A finished run, opened again: what evaluations of its weights share. Torch and Lightning are imported late."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.files import file_digest
from cdc_mmpg.processors import count_processors
from cdc_mmpg.results import annotations_digest, provenance, read_results

if TYPE_CHECKING:
    from cdc_mmpg.experiment import Experiment


def results_of(run: Path) -> dict[str, Any]:
    """What a finished run has written.

    Raises:
        CheckpointError: it is none.
    """
    results = read_results(run)
    if results is None or not (run / "best.ckpt").is_file() or not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run}: not a finished run, <dataset>/<method>/seed<N> with results.json, config.yaml and best.ckpt; "
            "train it first (make train METHOD=...)"
        )
    return results


def folder_of(run: Path, evaluation: str) -> Path:
    """Where an evaluation of a run goes: beside the methods, under its own name and the run's seed."""
    run = run.absolute()
    return run.parents[1] / evaluation / run.name


def made_of(run: Path, weights: str) -> dict[str, str]:
    """Which run an evaluation is of, and the digest of its weights: for `is_done`."""
    run = run.absolute()
    return {"run": f"{run.parent.name}/{run.name}", weights: file_digest(run / weights)}


def is_done(folder: Path, source: Mapping[str, str]) -> bool:
    """Whether a folder holds this evaluation of this very run; says so."""
    results = read_results(folder)
    if results is None or results.get("made_of") != source:
        return False
    print(f"{folder}: finished on {results['finished']}; delete the folder to evaluate anew")
    return True


def reopen(run: Path) -> "Experiment":
    """The experiment of a finished run, on one processor, its weights not loaded and its data not read.

    Raises:
        ConfigError: its configuration lacks a part.
        DataError: the annotations are not those that it was trained with; names the folder.
    """
    import yaml  # noqa: PLC0415  see `cli`

    from cdc_mmpg.experiment import ANNOTATED, CONFIG, Experiment  # noqa: PLC0415

    settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    try:
        arguments, root = settings["model"]["init_args"], Path(settings["data"]["init_args"]["root"])
        arguments["encoder"]["checkpoint"] = None  # the run has all weights
        settings["trainer"] |= {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto"}
        settings["trainer"] |= {"precision": "32-true", "callbacks": None}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run / CONFIG}: not the configuration of a run ({error!r}): train anew") from error
    if "adr" in arguments:
        arguments["adr"] = str(run / "adr.safetensors")
    inputs = run / "inputs.json"
    before = json.loads(inputs.read_text(encoding="utf-8")).get(ANNOTATED) if inputs.is_file() else None
    if before is not None and root.is_dir() and before != annotations_digest(root):
        raise DataError(f"{root}: its annotations changed since {run} was trained: restore them, or train anew")
    return Experiment(settings, run=False)


def identity(
    folder: Path, experiment: "Experiment", source: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """What the results of an evaluation begin with.

    Args:
        folder: where they go, see `folder_of`.
        experiment: of the run.
        source: see `made_of`.
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
