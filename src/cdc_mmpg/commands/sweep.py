"""Values to try, by W&B's sweep or without a server: `cdc-mmpg sweep experiments/sweep.yaml`.

The file is a sweep's configuration as W&B reads it; parameters are variables of make. Where a key is configured
(WANDB_API_KEY, ~/.netrc) or WANDB_MODE is online it is registered, and W&B's own agent runs it. Otherwise the runs of
the same grid are one plan that is done here, each combination in a folder of its own; the table is `sweep.md` beside
them.
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

from cdc_mmpg.catalogue import EMBEDDED, PRETRAINING
from cdc_mmpg.commands.execute import Executor
from cdc_mmpg.commands.main import run_program
from cdc_mmpg.commands.plan import Plan, plan_training
from cdc_mmpg.commands.request import READS, TRAINING, Request
from cdc_mmpg.errors import CDCError, ConfigError, listing
from cdc_mmpg.files import atomic_write
from cdc_mmpg.processors import find_gpus
from cdc_mmpg.program import Stopped, exit_code, hold_signals, log_to_terminal
from cdc_mmpg.results import find_results, read_results

FOLDER = "checkpoints/sweeps"
PARAMETERS = "${args_no_hyphens}"  # W&B's name for NAME=value of every parameter
LABELS = ("name", "description", "project", "entity")
NEEDED = ("method", "metric", "parameters", "command")
SERVERS = ("early_terminate", "run_cap")  # what W&B's server does between runs
MACHINE = "runs share the machine, each in the same way: put it into the command"
FIXED = {"OUT": "every run has a folder of its own", "SEEDS": "a run has one seed: use SEED",
         **dict.fromkeys(("JOBS", "DEVICES", "NODES", "LAUNCH"), MACHINE)}  # fmt: skip

OF_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make above, whose job server is not for these

Combination = dict[str, str]


class Sweep(NamedTuple):
    """A sweep's configuration, checked."""

    path: Path
    config: dict[str, Any]  # as W&B takes it
    metric: str
    maximises: bool
    command: list[str]

    @property
    def folder(self) -> str:
        """Of its runs: another command makes other runs, a wider grid only more of them."""
        return f"{self.path.stem}-{_digest(self.words)}"

    @property
    def words(self) -> list[str]:
        """Of its command, but for the folder, which is W&B's run's there and the combination's here."""
        return [word for word in self.command if not word.startswith("OUT=")]

    @property
    def target(self) -> str:
        """The target of make that the command calls; empty where it names none."""
        words = (word for word in self.command[1:] if not word.startswith(("-", "$")) and "=" not in word)
        return next(words, "") if self.command[0] == "make" else ""

    @property
    def variables(self) -> dict[str, str]:
        """The variables that the command gives every run."""
        return {name: value for name, equals, value in (word.partition("=") for word in self.words) if equals}


class Score(NamedTuple):
    """What became of a combination: its best epoch, or why it has none."""

    combination: Combination
    value: float | None = None
    best_epoch: int | None = None  # the first is 0
    failure: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--out", type=Path, default=Path(FOLDER), help="where its runs go without a server")
    own = parser.parse_args(arguments)
    log_to_terminal()
    return exit_code(partial(_run, own.path, own.out))


def _run(path: Path, out: Path) -> None:
    sweep = read(path)
    if is_online():
        by_agent(sweep, out)
    else:
        by_itself(sweep, out)


def is_online() -> bool:
    """Whether W&B's server takes part, as for any run: see `training.loggers`."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode == "online"
    import wandb  # noqa: PLC0415  takes a second

    return bool(wandb.login(prompt=False, verify=False))


def read(path: Path) -> Sweep:
    """A sweep's configuration.

    Raises:
        ConfigError: it cannot be read, or a key of it is wrong; names both.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}): name a sweep's .yaml file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no keys; {', '.join(NEEDED)} are needed")
    for key in NEEDED:
        if key not in config:
            raise ConfigError(f"{path}: the key {key!r} is missing; {', '.join(NEEDED)} are needed")
    for key in config:
        if key not in (known := (*NEEDED, *LABELS, *SERVERS)):
            raise ConfigError(f"{path}: the key {key!r} is unknown; there are {', '.join(known)}")
    metric = config["metric"]
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise ConfigError(f"{path}: metric is {metric!r}: it has a name, such as val/accuracy, and a goal")
    if (goal := metric.get("goal")) not in ("maximize", "minimize"):
        raise ConfigError(f"{path}: metric.goal is {goal!r}: maximize or minimize")
    command = config["command"]
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise ConfigError(f"{path}: command is {command!r}: a list of words, such as make, train, {PARAMETERS}")
    if command.count(PARAMETERS) != 1:
        raise ConfigError(f"{path}: command must hold {PARAMETERS} once: the parameters of a run")
    sweep = Sweep(path, config, metric["name"], goal == "maximize", command)
    _check_parameters(path, config["parameters"], sweep.target)
    if twice := config["parameters"].keys() & sweep.variables.keys():
        raise ConfigError(f"{path}: {', '.join(sorted(twice))} is both a parameter and in the command: leave one out")
    return sweep


def _check_parameters(path: Path, parameters: Any, target: str) -> None:
    """Refuse names that nothing reads."""
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigError(f"{path}: parameters is {parameters!r}: variables with values, as METHOD: {{values: [a, b]}}")
    for name, own in parameters.items():
        if name in FIXED:
            raise ConfigError(f"{path}: parameters.{name} cannot be one: {FIXED[name]}")
        if target and not str(name).startswith("ARGS_") and name not in READS.get(target, TRAINING):
            raise ConfigError(
                f"{path}: parameters.{name}: `make {target}` reads no such variable; an option goes into ARGS, as "
                "--model.init_args.learning_rate=0.001"
            )
        if name == "METHOD" and "all" in _values(own):
            raise ConfigError(f"{path}: parameters.METHOD is 'all': a run has one method, name them as values")


def _values(parameter: Any) -> list[Any]:
    """Of a parameter; none where it is no list of values."""
    own = parameter if isinstance(parameter, dict) else {}
    found = own.get("values", [own["value"]] if "value" in own else None)
    return found if isinstance(found, list) and not any(isinstance(value, dict | list) for value in found) else []


def grid(sweep: Sweep) -> list[Combination]:
    """All combinations of the parameters' values, the last parameter's changing fastest.

    Raises:
        ConfigError: what only the server can do: another method than grid, a range in place of values.
    """
    if (method := sweep.config["method"]) != "grid":
        raise ConfigError(
            f"{sweep.path}: method is {method!r}, which W&B's server draws: without it only grid is run. Configure a "
            "key (`wandb login`), or list values and say method: grid"
        )
    for key in SERVERS:
        if key in sweep.config:
            raise ConfigError(f"{sweep.path}: {key} is the work of W&B's server: configure a key, or leave it out")
    values = []
    for name, own in sweep.config["parameters"].items():
        if not (found := _values(own)):
            raise ConfigError(f"{sweep.path}: parameters.{name} is {own!r}: a grid needs values: [a, b] or value: a")
        values.append([str(value) for value in found])
    return [dict(zip(sweep.config["parameters"], own, strict=True)) for own in itertools.product(*values)]


def by_agent(sweep: Sweep, out: Path) -> None:
    """Register the sweep and run W&B's agent, one for each GPU, until the server has no more runs for it.

    Raises:
        CDCError: the server cannot be reached, or refuses the sweep; or an agent fails.
        Stopped: a signal; it was handed on to the agents, and by them to their runs.
    """
    import wandb  # noqa: PLC0415  takes a second

    place = out / sweep.folder
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CDCError(
            f"{place}: cannot be made ({error.strerror}): name another place with --out, or make it writable"
        ) from error
    os.environ["WANDB_DIR"] = str(place.absolute())  # the agent would use the working directory
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # see `training.loggers`
    for name in OF_MAKE:
        os.environ.pop(name, None)
    project = os.environ.get("WANDB_PROJECT") or sweep.config.get("project")
    entity = os.environ.get("WANDB_ENTITY") or sweep.config.get("entity")
    try:
        identity = wandb.sweep(sweep.config, entity=entity, project=project)
    except Exception as error:  # the client raises errors of many families
        raise CDCError(
            f"{sweep.path}: W&B's server cannot be reached, or refuses the sweep ({error}); WANDB_MODE=offline runs "
            "the grid without it"
        ) from error
    pretraining = plan_pretraining(sweep)
    if pretraining and (code := Executor(pretraining, run_program).execute()):
        raise SystemExit(code)
    options = [f"--{name}={value}" for name, value in (("project", project), ("entity", entity)) if value]
    print(f"`wandb agent {' '.join([*options, identity])}` goes on with this sweep, here or on another machine")
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *options, identity]
    gpus = find_gpus()
    environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] if len(gpus) > 1 else [{}]
    with hold_signals():
        # A group of its own, so that Ctrl-C reaches each once and through here.
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


def by_itself(sweep: Sweep, out: Path) -> None:
    """Run the grid and write the table after each run; finished combinations are not run again.

    Raises:
        ConfigError: see `grid` and `plan_grid`.
        CDCError: runs failed; the others are in the table.
        SystemExit: a signal, while clips were made.
    """
    combinations, place = grid(sweep), out / sweep.folder

    def write_table() -> list[Score]:
        ended = executor.outcomes.keys() | executor.left_out.keys()
        scores = []
        for combination in combinations:
            runs = [step.name for step in executor.runs if step.name.startswith(f"{name_of(combination)}/")]
            if ended.issuperset(runs):
                codes = [executor.outcomes[name].code for name in runs if name in executor.outcomes]
                scores.append(score(sweep, combination, place / name_of(combination), max(codes, default=1)))
        with atomic_write(place / "sweep.md") as file:
            file.write(table(sweep, scores).encode())
        return scores

    executor = Executor(plan_grid(sweep, combinations, place), run_program, after_run=write_table)
    code = executor.execute()
    if code > 128:
        raise SystemExit(code)
    scores = write_table()
    print(f"\n{table(sweep, scores)}\n{place / 'sweep.md'}")
    failed = [own for own in scores if own.failure]
    if code or failed:
        raise CDCError(
            f"{len(combinations) - len(scores) + len(failed)} of {len(combinations)} combinations have no result; type "
            "the same command again to try these alone:"
            + listing([f"{_words(own.combination)}: {own.failure}" for own in failed])
        )


def plan_grid(sweep: Sweep, combinations: Sequence[Combination], place: Path) -> Plan:
    """Plan the runs of all combinations, each below a folder of its own; where there are GPUs, as many side by side.

    Raises:
        ConfigError: the command is not `make train`, means not one run, or a value of it is impossible.
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
        name = name_of(combination)
        request = Request("train", fixed | combination | {"OUT": str(place / name)})
        if not request["METHOD"] or request.method == "all" or request["SEEDS"]:
            raise ConfigError(
                f"{sweep.path}: METHOD={request['METHOD']} SEEDS={request['SEEDS']}: a combination is one run: METHOD "
                "names one method, and SEED takes the place of SEEDS"
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
    """Plan the encoder that the runs start from; None unless that is the embedded dataset's of seed 0, not yet made."""
    encoder = f"checkpoints/{EMBEDDED}/{PRETRAINING}/seed0/encoder.safetensors"
    if sweep.variables.get("CHECKPOINT") != encoder or Path(encoder).is_file():
        return None
    return plan_training(Request("train", {"METHOD": PRETRAINING}, {}))


def score(sweep: Sweep, combination: Combination, folder: Path, code: int) -> Score:
    """Return what the finished run of a combination has in its `results.json`: the metric at its best epoch.

    Args:
        sweep: whose metric.
        combination: of the run; METHOD tells it from those that it builds on.
        folder: below which `<dataset>/<method>/seed<N>` lies.
        code: exit code of its runs.
    """
    if code:
        return Score(combination, failure=f"exit code {code}")
    method = (sweep.variables | combination)["METHOD"]
    found = [
        own for path in find_results(folder, f"*/{method}/seed*") if (own := read_results(path.parent)) is not None
    ]
    if len(found) != 1:
        return Score(combination, failure=f"{len(found)} finished runs in {folder}, where one was to be")
    value = (found[0].get("metrics") or {}).get(sweep.metric)
    if value is None:
        return Score(combination, failure=f"its results.json has no {sweep.metric}, the sweep's metric")
    return Score(combination, value, found[0].get("best_epoch"))


def table(sweep: Sweep, scores: Sequence[Score]) -> str:
    """The runs so far as Markdown, the best first, those that failed last; what all have in common stands below."""
    combinations = grid(sweep)
    varied = [name for name in combinations[0] if len({own[name] for own in combinations}) > 1]
    sign = -1 if sweep.maximises else 1
    ordered = sorted(scores, key=lambda own: (own.value is None, sign * (own.value or 0)))
    rows = [[*varied, sweep.metric, "best epoch"], ["---"] * len(varied) + ["---:"] * 2]
    for own in ordered:
        value = own.failure if own.value is None else f"{own.value:.4f}"
        epoch = "" if own.best_epoch is None else str(own.best_epoch + 1)  # as in all tables
        rows.append([*(own.combination[name] for name in varied), value, epoch])
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    common = " ".join(f"{name}={combinations[0][name]}" for name in combinations[0] if name not in varied)
    command = " ".join(common if word == PARAMETERS else word for word in sweep.words)
    return "\n".join([*lines, "", f"{len(scores)} of {len(combinations)} combinations of {sweep.path}, by "
                      f"{sweep.metric} at the best epoch. All: `{command}`.", ""])  # fmt: skip


def name_of(combination: Combination) -> str:
    """Of a combination's folder: its values, of options the last part of their name, and a digest of all of it."""
    values = [re.sub(r"--[\w.]*?(\w+)=", r"\1=", value) for value in combination.values()]
    readable = re.sub(r"[^\w.=-]+", "_", "-".join(values))[:60]
    return f"{readable}-{_digest(sorted(combination.items()))}"


def _words(combination: Combination) -> str:
    return " ".join(f"{name}={value}" for name, value in combination.items())


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]
