"""Refusals before a run trains: a pair that does not go together, a trainer's arguments, a folder with another run."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.results import ANNOTATED, CONFIG, RESULTS, RESUME, SURROUNDINGS, read_inputs, read_results, read_settings
from cdc_mmpg.training.parser import flatten

# Weights stay float32: the generated layer and the loss are computed in it.
TRAINER_PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed")


def has_begun(folder: Path, settings: dict[str, Any], files: dict[str, str]) -> bool:
    """Return whether a folder holds the states of this very run; False where no run has trained there yet.

    Args:
        folder: of the run.
        settings: its configuration.
        files: digests of the files that it begins with, by argument; `inputs.json` keeps them.

    Raises:
        ConfigError: the folder holds a run with another configuration or other files; names the differing keys. Or what
            it holds is damaged.
        SystemExit: it holds this very run, finished.
    """
    finished = (folder / RESULTS).is_file()
    if not (folder / CONFIG).is_file() or not (finished or any(folder.glob(f"{RESUME}/*.ckpt"))):
        return False
    if finished and read_results(folder) is None:
        raise ConfigError(f"{folder / RESULTS}: damaged: delete {folder} to train anew, or put the file back")
    there = dict(flatten(read_settings(folder) | read_inputs(folder)))
    asked = dict(flatten(settings | files))
    # A run that goes on checks its data itself; a finished one cannot.
    own = {"data.init_args.root", "data.init_args.vocab", ANNOTATED}
    free = {*SURROUNDINGS, ANNOTATED} - (own if finished else set())
    for values in (there, asked):
        for key in ("data.init_args.root", "data.init_args.vocab"):
            values[key] = values.get(key) and str(Path(values[key]).resolve())
    differing = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    lines = [f"  {key}: {there.get(key)!r} there, {asked.get(key)!r} asked for" for key in differing if key not in free]
    if lines:
        raise ConfigError(
            f"{folder} holds a run with another configuration:\n" + "\n".join(lines) + "\n"
            "Type that run's command to go on with it, or delete or rename the folder."
        )
    if finished:
        print(f"{folder}: finished; delete the folder to train anew")
        raise SystemExit(0)
    return True


def check_pair(config: Mapping[str, Any]) -> None:
    """Refuse a dataset, a task and a method that do not go together.

    Args:
        config: of the run, before its classes are built.

    Raises:
        ConfigError: names the classes and what to take instead.
    """
    method, data, head = (
        resolve_name(part["class_path"])
        for part in (config["model"], config["data"], config["model"]["init_args"]["head"])
    )
    if head.task != data.task:
        raise ConfigError(
            f"{data.__name__} is a dataset for {data.task}, {head.__name__} a head for {head.task}: "
            "leave the head to the dataset's configuration"
        )
    given = method.reads == "sessions" and config["data"]["init_args"].get("domains")
    if method.reads not in data.views and not given:
        lacking = {"sessions": "does not know its clips' devices, and sessions need them: give it some "
                               f"(ARGS=--data.init_args.domains={' or '.join(data.DOMAINS)}), take",
                   "captions": "has no captions to pretrain an encoder with: take"}[method.reads]  # fmt: skip
        raise ConfigError(
            f"{method.__name__} does not go with {data.__name__}, which {lacking} another method (METHOD=), or the "
            "embedded dataset (DATASET=synthetic)"
        )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that follow from others, and precisions that nothing here computes in.

    Raises:
        ConfigError: names the argument.
    """
    if trainer["accumulate_grad_batches"] != 1:
        raise ConfigError(
            f"accumulate_grad_batches is {trainer['accumulate_grad_batches']}: how many batches are accumulated "
            "follows from data.init_args.batch_size, of a whole step, and data.init_args.per_device, at once"
        )
    if str(trainer["precision"]) not in TRAINER_PRECISIONS:
        raise ConfigError(f"precision {trainer['precision']!r}: use 32-true, bf16-mixed or 16-mixed (PRECISION=)")
