"""Hyperparameter sweep, with W&B's server or without: `cdc-mmpg sweep experiments/sweep.yaml`.

The file is a sweep configuration of W&B; its parameters are variables of make. If a key is configured (WANDB_API_KEY,
~/.netrc) or WANDB_MODE is online, the sweep is registered and W&B's agent runs it. Otherwise the grid is one plan that
runs here, each combination in a separate folder; the table is `sweep.md` beside them.
"""

import argparse
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cdc_mmpg.catalogue import PRETRAINING, SYNTHETIC
from cdc_mmpg.commands.execute import Executor
from cdc_mmpg.commands.main import run_program
from cdc_mmpg.commands.plan import Plan, plan_training
from cdc_mmpg.commands.request import COMMAND_VARIABLES, TRAINING_VARIABLES, Request
from cdc_mmpg.errors import CDCError, ConfigError, format_names
from cdc_mmpg.files import atomic_write
from cdc_mmpg.processors import find_gpus
from cdc_mmpg.program import Stopped, hold_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import find_results, read_results

DEFAULT_FOLDER = "checkpoints/sweeps"
PARAMETERS = "${args_no_hyphens}"  # W&B's placeholder for NAME=value of every parameter
LABEL_KEYS = ("name", "description", "project", "entity")
REQUIRED_KEYS = ("method", "metric", "parameters", "command")
SERVER_KEYS = ("early_terminate", "run_cap")  # keys for decisions that W&B's server takes between runs
SHARED_MACHINE = "all runs share the machine in the same way: put it into the command"
FORBIDDEN_PARAMETERS = {"OUT": "every run has a separate folder", "SEEDS": "a run has one seed: use SEED",
                        **dict.fromkeys(("JOBS", "DEVICES", "NODES", "LAUNCH"), SHARED_MACHINE)}  # fmt: skip
MAKE_ENVIRONMENT = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the parent make, whose job server the agents must not use

Combination = dict[str, str]


class Sweep(NamedTuple):
    """Checked configuration of a sweep."""

    path: Path
    config: dict[str, Any]  # as W&B takes it
    metric: str
    maximises: bool
    command: list[str]

    @property
    def folder(self) -> str:
        """Name of the folder of the runs: it changes with the command, but not with the grid."""
        return f"{self.path.stem}-{_hash(self.words)}"

    @property
    def words(self) -> list[str]:
        """Words of the command without OUT, which is set for each W&B run or combination."""
        return [word for word in self.command if not word.startswith("OUT=")]

    @property
    def target(self) -> str:
        """Target of make that the command calls; empty if there is none."""
        words = (word for word in self.command[1:] if not word.startswith(("-", "$")) and "=" not in word)
        return next(words, "") if self.command[0] == "make" else ""

    @property
    def variables(self) -> dict[str, str]:
        """Variables that the command sets for every run."""
        return {name: value for name, equals, value in (word.partition("=") for word in self.words) if equals}


class Score(NamedTuple):
    """Result of a combination: the metric at its best epoch, or the reason why it has none."""

    combination: Combination
    value: float | None = None
    best_epoch: int | None = None  # counted from 0
    failure: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", type=Path, metavar="SWEEP.yaml", help="file of the sweep")
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_FOLDER), help="folder of the runs without a server")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run_to_exit_code(partial(_run, options.path, options.out))


def _run(path: Path, out: Path) -> None:
    sweep = read_sweep(path)
    if is_online():
        run_by_agent(sweep, out)
    else:
        run_locally(sweep, out)


def is_online() -> bool:
    """Return whether W&B's server is used, by the rules of `training.wandb_record`."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode == "online"
    import wandb  # noqa: PLC0415  takes a second

    return bool(wandb.login(prompt=False, verify=False))


def read_sweep(path: Path) -> Sweep:
    """Read and check the configuration of a sweep.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong; names the file and the key.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}): name a sweep's .yaml file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: has no keys; required are {', '.join(REQUIRED_KEYS)}")
    for key in REQUIRED_KEYS:
        if key not in config:
            raise ConfigError(f"{path}: the key {key!r} is missing; required are {', '.join(REQUIRED_KEYS)}")
    for key in config:
        if key not in (known := (*REQUIRED_KEYS, *LABEL_KEYS, *SERVER_KEYS)):
            raise ConfigError(f"{path}: the key {key!r} is unknown; valid keys are {', '.join(known)}")
    metric = config["metric"]
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise ConfigError(f"{path}: metric is {metric!r}: it needs a name, such as val/accuracy, and a goal")
    if (goal := metric.get("goal")) not in ("maximize", "minimize"):
        raise ConfigError(f"{path}: metric.goal is {goal!r}: use maximize or minimize")
    command = config["command"]
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise ConfigError(f"{path}: command is {command!r}: use a list of words, such as make, train, {PARAMETERS}")
    if command.count(PARAMETERS) != 1:
        raise ConfigError(f"{path}: command must contain {PARAMETERS} once, in place of the parameters of a run")
    sweep = Sweep(path, config, metric["name"], goal == "maximize", command)
    _check_parameters(path, config["parameters"], sweep.target)
    if both := config["parameters"].keys() & sweep.variables.keys():
        raise ConfigError(f"{path}: {', '.join(sorted(both))} is both a parameter and in the command: remove one")
    return sweep


def _check_parameters(path: Path, parameters: Any, target: str) -> None:
    """Refuse parameters that the command does not read or that may not vary; the ConfigError names them."""
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigError(f"{path}: parameters is {parameters!r}: give variables values, as METHOD: {{values: [a, b]}}")
    reads = COMMAND_VARIABLES.get(target, TRAINING_VARIABLES)
    for name, parameter in parameters.items():
        if name in FORBIDDEN_PARAMETERS:
            raise ConfigError(f"{path}: parameters.{name} is not allowed: {FORBIDDEN_PARAMETERS[name]}")
        if target and not str(name).startswith("ARGS_") and name not in reads:
            raise ConfigError(
                f"{path}: parameters.{name}: `make {target}` reads no such variable; put an option into ARGS, as "
                "--model.init_args.learning_rate=0.001"
            )
        if name == "METHOD" and "all" in _list_values(parameter):
            raise ConfigError(f"{path}: parameters.METHOD is 'all': a run has one method; list the methods as values")


def _list_values(parameter: Any) -> list[Any]:
    """Return the values of a parameter; empty if it has another form than `values` or `value`."""
    keys = parameter if isinstance(parameter, dict) else {}
    values = keys.get("values", [keys["value"]] if "value" in keys else None)
    return values if isinstance(values, list) and not any(isinstance(value, dict | list) for value in values) else []


def expand_grid(sweep: Sweep) -> list[Combination]:
    """Return all combinations of the parameters' values; the last parameter changes fastest.

    Raises:
        ConfigError: only the server can run the sweep: its method is not grid, or a parameter is a range.
    """
    if (method := sweep.config["method"]) != "grid":
        raise ConfigError(
            f"{sweep.path}: method is {method!r}, which needs W&B's server; without it only grid works. Configure a "
            "key (`wandb login`), or list values and set method: grid"
        )
    for key in SERVER_KEYS:
        if key in sweep.config:
            raise ConfigError(f"{sweep.path}: {key} needs W&B's server: configure a key (`wandb login`), or remove it")
    values = []
    for name, given in sweep.config["parameters"].items():
        if not (listed := _list_values(given)):
            raise ConfigError(f"{sweep.path}: parameters.{name} is {given!r}: a grid needs values: [a, b] or value: a")
        values.append([str(value) for value in listed])
    return [dict(zip(sweep.config["parameters"], chosen, strict=True)) for chosen in itertools.product(*values)]


def run_by_agent(sweep: Sweep, out: Path) -> None:
    """Register the sweep and run W&B's agent, one for each GPU, until the server has no more runs.

    Raises:
        CDCError: the server is unreachable or refuses the sweep; or an agent fails.
        Stopped: a signal came; the agents got it, too, and forward it to their runs.
    """
    import wandb  # noqa: PLC0415  takes a second

    place = out / sweep.folder
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CDCError(
            f"{place}: cannot be created ({error.strerror}): choose another folder with --out, or make it writable"
        ) from error
    os.environ["WANDB_DIR"] = str(place.absolute())  # the agent would use the working directory
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # see `training.wandb_record`
    for name in MAKE_ENVIRONMENT:
        os.environ.pop(name, None)
    project = os.environ.get("WANDB_PROJECT") or sweep.config.get("project")
    entity = os.environ.get("WANDB_ENTITY") or sweep.config.get("entity")
    try:
        identity = wandb.sweep(sweep.config, entity=entity, project=project)
    except Exception as error:  # the client raises errors of many families
        raise CDCError(
            f"{sweep.path}: W&B's server is unreachable or refuses the sweep ({error}); WANDB_MODE=offline runs "
            "the grid without it"
        ) from error
    pretraining = plan_pretraining(sweep)
    if pretraining and (code := Executor(pretraining, run_program).execute()):
        raise SystemExit(code)
    options = [f"--{name}={value}" for name, value in (("project", project), ("entity", entity)) if value]
    print(f"`wandb agent {' '.join([*options, identity])}` continues this sweep, here or on another machine")
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *options, identity]
    gpus = find_gpus()
    environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] if len(gpus) > 1 else [{}]
    with hold_signals():
        # Separate process groups, so that the agents get Ctrl-C only once, from this process.
        agents = [subprocess.Popen(command, env=os.environ | added, process_group=0) for added in environments]
    try:
        codes = [agent.wait() for agent in agents]
    except Stopped as error:
        for agent in agents:
            agent.send_signal(error.number)
        for agent in agents:
            agent.wait()
        raise
    if any(codes):
        raise CDCError(f"{sweep.path}: an agent ended with exit code {max(codes, key=abs)}")


def run_locally(sweep: Sweep, out: Path) -> None:
    """Run the grid and write the table after each run; finished combinations are not run again.

    Raises:
        ConfigError: see `expand_grid` and `plan_grid`.
        CDCError: runs failed; the table has the others.
        SystemExit: a signal came while clips were made.
    """
    combinations, place = expand_grid(sweep), out / sweep.folder

    def write_table() -> list[Score]:
        ended = executor.outcomes.keys() | executor.skipped.keys()
        scores = []
        for combination in combinations:
            runs = [step.name for step in executor.runs if step.name.startswith(f"{name_folder(combination)}/")]
            if ended.issuperset(runs):
                codes = [executor.outcomes[name].code for name in runs if name in executor.outcomes]
                scores.append(read_score(sweep, combination, place / name_folder(combination), max(codes, default=1)))
        with atomic_write(place / "sweep.md") as file:
            file.write(format_table(sweep, scores).encode())
        return scores

    executor = Executor(plan_grid(sweep, combinations, place), run_program, after_run=write_table)
    code = executor.execute()
    if code > 128:
        raise SystemExit(code)
    scores = write_table()
    print(f"\n{format_table(sweep, scores)}\n{place / 'sweep.md'}")
    failed = [score for score in scores if score.failure]
    if code or failed:
        raise CDCError(
            f"{len(combinations) - len(scores) + len(failed)} of {len(combinations)} combinations have no result; run "
            "the same command again to retry only these:"
            + format_names([f"{_join_words(score.combination)}: {score.failure}" for score in failed])
        )


def plan_grid(sweep: Sweep, combinations: Sequence[Combination], place: Path) -> Plan:
    """Plan the runs of all combinations, each in a separate folder; with several GPUs, one parallel run for each.

    Raises:
        ConfigError: the command is not `make train`, does not select one run, or has an invalid value.
    """
    if sweep.target != "train":
        raise ConfigError(
            f"{sweep.path}: command is {' '.join(sweep.command)}: without W&B's server only `make train` is run"
        )
    fixed = sweep.variables
    if not {"DEVICES", "LAUNCH"} & fixed.keys():
        gpus = Plan(Request("train", fixed | combinations[0] | {"JOBS": ""})).gpus
        fixed = fixed | ({"JOBS": str(len(gpus))} if len(gpus) > 1 else {})
    plans = {}
    for combination in combinations:
        name = name_folder(combination)
        request = Request("train", fixed | combination | {"OUT": str(place / name)})
        if not request["METHOD"] or request.method == "all" or request["SEEDS"]:
            raise ConfigError(
                f"{sweep.path}: METHOD={request['METHOD']} SEEDS={request['SEEDS']}: a combination is one run: METHOD "
                "must be one method, and SEED replaces SEEDS"
            )
        plans[name] = plan_training(request)
    grid_plan, pretraining = Plan(next(iter(plans.values())).request), plan_pretraining(sweep)
    before = tuple(grid_plan.add(step) for step in pretraining.steps.values()) if pretraining else ()
    for name, plan in plans.items():
        names = {step.name: f"{name}/{step.name}" if step.folder else step.name for step in plan.steps.values()}
        for step in plan.steps.values():
            if step.program != "table":
                needs = (*before, *(names[other] for other in step.needs))
                grid_plan.add(step._replace(name=names[step.name], needs=needs, after=names.get(step.after, "")))
    return grid_plan


def plan_pretraining(sweep: Sweep) -> Plan | None:
    """Plan the pretraining of the synthetic dataset's encoder of seed 0; None if it exists or the runs use another."""
    encoder = f"checkpoints/{SYNTHETIC}/{PRETRAINING}/seed0/encoder.safetensors"
    if sweep.variables.get("CHECKPOINT") != encoder or Path(encoder).is_file():
        return None
    return plan_training(Request("train", {"METHOD": PRETRAINING}, {}))


def read_score(sweep: Sweep, combination: Combination, folder: Path, code: int) -> Score:
    """Read the metric at the best epoch from `results.json` of the finished run of a combination.

    Args:
        sweep: sweep with the name of the metric.
        combination: values of the run; METHOD distinguishes it from the runs that it builds on.
        folder: folder above `<dataset>/<method>/seed<N>`.
        code: exit code of its runs.
    """
    if code:
        return Score(combination, failure=f"exit code {code}")
    method = (sweep.variables | combination)["METHOD"]
    runs = [read_results(path.parent) for path in find_results(folder, f"*/{method}/seed*")]
    finished = [results for results in runs if results is not None]
    if len(finished) != 1:
        return Score(combination, failure=f"{len(finished)} finished runs in {folder}, expected one")
    value = (finished[0].get("metrics") or {}).get(sweep.metric)
    if value is None:
        return Score(combination, failure=f"its results.json has no {sweep.metric}, the sweep's metric")
    return Score(combination, value, finished[0].get("best_epoch"))


def format_table(sweep: Sweep, scores: Sequence[Score]) -> str:
    """Format the runs so far as a Markdown table, the best first and failures last, with the common command below."""
    combinations = expand_grid(sweep)
    varied = [name for name in combinations[0] if len({combination[name] for combination in combinations}) > 1]
    sign = -1 if sweep.maximises else 1
    ordered = sorted(scores, key=lambda score: (score.value is None, sign * (score.value or 0)))
    rows = [[*varied, sweep.metric, "best epoch"], ["---"] * len(varied) + ["---:"] * 2]
    for score in ordered:
        value = score.failure if score.value is None else f"{score.value:.4f}"
        epoch = "" if score.best_epoch is None else str(score.best_epoch + 1)  # counted from 1, as in all tables
        rows.append([*(score.combination[name] for name in varied), value, epoch])
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    common = " ".join(f"{name}={combinations[0][name]}" for name in combinations[0] if name not in varied)
    command = " ".join(common if word == PARAMETERS else word for word in sweep.words)
    return "\n".join([*lines, "", f"{len(scores)} of {len(combinations)} combinations of {sweep.path}, by "
                      f"{sweep.metric} at the best epoch. All: `{command}`.", ""])  # fmt: skip


def name_folder(combination: Combination) -> str:
    """Return the folder name of a combination: its values, with shortened option names, and a digest."""
    values = [re.sub(r"--[\w.]*?(\w+)=", r"\1=", value) for value in combination.values()]
    readable = re.sub(r"[^\w.=-]+", "_", "-".join(values))[:60]
    return f"{readable}-{_hash(sorted(combination.items()))}"


def _join_words(combination: Combination) -> str:
    return " ".join(f"{name}={value}" for name, value in combination.items())


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]
