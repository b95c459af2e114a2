"""Checks before a run trains: dataset and method fit together, valid trainer arguments, no other run in the folder."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.results import (
    ANNOTATIONS_KEY,
    CONFIG,
    RESULTS,
    RESUME,
    RUNTIME_ONLY_KEYS,
    read_inputs,
    read_results,
    read_settings,
)
from cdc_mmpg.training.parser import flatten

# Supported values of trainer.precision; weights stay float32, in which generated layers and losses are computed.
TRAINER_PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed")


def has_begun(folder: Path, settings: dict[str, Any], files: dict[str, str]) -> bool:
    """Return whether a folder has states of this run to resume; False if no run has trained there yet.

    Args:
        folder: folder of the run.
        settings: configuration of the run.
        files: digests of the files that the run starts from, by argument, as in `inputs.json`.

    Raises:
        ConfigError: the folder has a run with another configuration or other files, whose differing keys are named; or
            a damaged file.
        SystemExit: the folder has this run, finished.
    """
    finished = (folder / RESULTS).is_file()
    if not (folder / CONFIG).is_file() or not (finished or any(folder.glob(f"{RESUME}/*.ckpt"))):
        return False
    if finished and read_results(folder) is None:
        raise ConfigError(
            f"{folder / RESULTS}: cannot be used: restore the file or its permissions, or delete {folder} to train anew"
        )
    saved = dict(flatten(read_settings(folder) | read_inputs(folder)))
    requested = dict(flatten(settings | files))
    # A resumed run checks its data while training; a finished one does not, so here they must be the same.
    data_keys = {"data.init_args.root", "data.init_args.vocab", ANNOTATIONS_KEY}
    ignored = {*RUNTIME_ONLY_KEYS, ANNOTATIONS_KEY} - (data_keys if finished else set())
    for values in (saved, requested):
        for key in ("data.init_args.root", "data.init_args.vocab"):
            values[key] = values.get(key) and str(Path(values[key]).resolve())
    keys = sorted(key for key in (saved.keys() | requested.keys()) - ignored if saved.get(key) != requested.get(key))
    lines = [f"  {key}: {saved.get(key)!r} there, {requested.get(key)!r} requested" for key in keys]
    if lines:
        raise ConfigError(
            f"{folder} holds a run with another configuration:\n" + "\n".join(lines) + "\n"
            f"Repeat that run's command to {'see that it is finished' if finished else 'resume it'}, or delete or "
            "rename the folder."
        )
    if finished:
        print(f"{folder}: finished; delete the folder to train anew")
        raise SystemExit(0)
    return True


def check_pair(config: Mapping[str, Any]) -> None:
    """Refuse a dataset, a task and a method that do not fit together.

    Args:
        config: configuration of the run, before its classes are built.

    Raises:
        ConfigError: names the classes and the alternatives.
    """
    method, data, head = (
        resolve_name(part["class_path"])
        for part in (config["model"], config["data"], config["model"]["init_args"]["head"])
    )
    if head.task != data.task:
        raise ConfigError(
            f"{data.__name__} is a dataset for {data.task}, {head.__name__} a head for {head.task}: "
            "use the head of the dataset's configuration"
        )
    has_domains = method.reads == "sessions" and config["data"]["init_args"].get("domains")
    if method.reads not in data.views and not has_domains:
        reason = {"sessions": "does not know the devices of its clips, which sessions need: set domains as devices "
                              f"(ARGS=--data.init_args.domains={' or '.join(data.DOMAINS)}), or use",
                  "captions": "has no captions to pretrain an encoder with: use"}[method.reads]  # fmt: skip
        raise ConfigError(
            f"{method.__name__} does not work with {data.__name__}, which {reason} another method (METHOD=), or the "
            "synthetic dataset (DATASET=synthetic)"
        )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse trainer arguments that are derived from others, and unsupported precisions.

    Raises:
        ConfigError: names the argument.
    """
    if trainer["accumulate_grad_batches"] != 1:
        raise ConfigError(
            f"accumulate_grad_batches is {trainer['accumulate_grad_batches']}: it is derived from "
            "data.init_args.batch_size (questions of a step) and data.init_args.per_device (at once); set these instead"
        )
    if str(trainer["precision"]) not in TRAINER_PRECISIONS:
        raise ConfigError(f"precision {trainer['precision']!r}: use 32-true, bf16-mixed or 16-mixed (PRECISION=)")
