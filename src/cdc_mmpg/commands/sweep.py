"""Values to try, by W&B's sweep or without a server: `cdc-mmpg sweep experiments/sweep.yaml`.

The file is a sweep's configuration as W&B reads it; parameters are variables of make. Where a key is configured
(WANDB_API_KEY, ~/.netrc) or WANDB_MODE is online it is registered, and W&B's own agent runs it. Otherwise the same grid
is run here, one command after another, each in a folder of its own, and the table is `sweep.md` beside them.
"""

import argparse
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import yaml

from cdc_mmpg.commands.request import READS, TRAINING
from cdc_mmpg.errors import CDCError, ConfigError, listing
from cdc_mmpg.files import atomic_write
from cdc_mmpg.processors import find_gpus
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import find_results, read_results

FOLDER = "checkpoints/sweeps"
PARAMETERS = "${args_no_hyphens}"  # W&B's name for NAME=value of every parameter
LABELS = ("name", "description", "project", "entity")
NEEDED = ("method", "metric", "parameters", "command")
SERVERS = ("early_terminate", "run_cap")  # what W&B's server does between runs
ALONE = {"OUT": "every run has a folder of its own", "SEEDS": "a run has one seed: use SEED"}

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


class Outcome(NamedTuple):
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
        leave_on_signals()
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
    _check_parameters(path, config["parameters"], command)
    return Sweep(path, config, metric["name"], goal == "maximize", command)


def _check_parameters(path: Path, parameters: Any, command: list[str]) -> None:
    """Refuse names that nothing reads: make takes any variable and says nothing."""
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigError(f"{path}: parameters is {parameters!r}: variables with values, as METHOD: {{values: [a, b]}}")
    words = (word for word in command[1:] if not word.startswith(("-", "$")) and "=" not in word)
    target = next(words, "train") if command[0] == "make" else ""
    for name, own in parameters.items():
        if name in ALONE:
            raise ConfigError(f"{path}: parameters.{name} cannot be one: {ALONE[name]}")
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
        CDCError: the server cannot be reached, or refuses the sweep.
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
        if len(gpus := find_gpus()) < 2:
            wandb.agent(identity, entity=entity, project=project)
            return
        command = [sys.executable, "-m", "wandb", "agent", "/".join(filter(None, (entity, project, identity)))]
        agents = [subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus]
        if code := max(agent.wait() for agent in agents):
            raise CDCError(f"{sweep.path}: an agent ended with exit code {code}")
    except CDCError:
        raise
    except Exception as error:  # the client raises errors of many families
        raise CDCError(
            f"{sweep.path}: W&B's server cannot be reached, or refuses the sweep ({error}); WANDB_MODE=offline runs "
            "the grid without it"
        ) from error


def by_itself(sweep: Sweep, out: Path) -> None:
    """Run the grid and write the table; finished combinations are not run again.

    A command goes after another; where there are GPUs, as many go side by side, each with one of its own.

    Raises:
        ConfigError: see `grid`.
        CDCError: runs failed; the others are in the table.
    """
    combinations, place = grid(sweep), out / sweep.folder
    gpus: list[str | None] = [*find_gpus()] or [None]
    free: SimpleQueue[str | None] = SimpleQueue()
    for gpu in gpus:
        free.put(gpu)
    at_work: set[subprocess.Popen[bytes]] = set()
    outcomes: list[Outcome] = []

    def attempt(number: int, combination: Combination) -> Outcome:
        gpu = free.get()
        try:
            print(f"sweep: {number} of {len(combinations)}: {_words(combination)}", flush=True)
            return _attempt(sweep, combination, place / name_of(combination), gpu, at_work)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for future in [pool.submit(attempt, *numbered) for numbered in enumerate(combinations, 1)]:
                outcomes.append(future.result())
                with atomic_write(place / "sweep.md") as file:
                    file.write(table(sweep, outcomes).encode())
        except BaseException:  # a signal, or a command that cannot be run
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(at_work):
                process.send_signal(signal.SIGTERM)
            raise
    print(f"\n{table(sweep, outcomes)}\n{place / 'sweep.md'}")
    if failed := [outcome for outcome in outcomes if outcome.failure]:
        raise CDCError(
            f"{len(failed)} of {len(outcomes)} runs failed; type the same command again to try these alone:"
            + listing([f"{_words(outcome.combination)}: {outcome.failure}" for outcome in failed])
        )


def _attempt(
    sweep: Sweep, combination: Combination, folder: Path, gpu: str | None, at_work: set["subprocess.Popen[bytes]"]
) -> Outcome:
    """Run a combination unless it is finished; return what became of it."""
    outcome = outcome_of(sweep, combination, folder)
    if not outcome.failure:
        print(f"{folder}: finished; delete the folder to run it anew", flush=True)
        return outcome
    own = [f"{name}={value}" for name, value in combination.items()]
    at = sweep.words.index(PARAMETERS)
    code = _call([*sweep.words[:at], *own, *sweep.words[at + 1 :], f"OUT={folder}"], gpu, at_work)
    outcome = Outcome(combination, failure=f"exit code {code}") if code else outcome_of(sweep, combination, folder)
    if outcome.failure:
        print(f"sweep: {_words(combination)}: {outcome.failure}", file=sys.stderr, flush=True)
    return outcome


def _call(command: list[str], gpu: str | None, at_work: set["subprocess.Popen[bytes]"]) -> int:
    """Run a command to its end; return its exit code.

    Args:
        command: its words.
        gpu: the only one that it sees; None leaves that open.
        at_work: holds the command while it runs.
    """
    environment = {key: value for key, value in os.environ.items() if key not in OF_MAKE}
    environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
    try:
        # A group of its own, so that Ctrl-C reaches it once and through here.
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        raise ConfigError(f"command: {command[0]} cannot be run ({error.strerror or error})") from error
    at_work.add(process)
    try:
        return process.wait()
    finally:
        at_work.discard(process)


def outcome_of(sweep: Sweep, combination: Combination, folder: Path) -> Outcome:
    """What the finished run of a combination has in its `results.json`: the metric at its best epoch.

    Args:
        sweep: whose metric.
        combination: of the run; METHOD tells it from those that it builds on.
        folder: below which `<dataset>/<method>/seed<N>` lies.
    """
    found = [own for path in find_results(folder, "*/*/seed*") if (own := read_results(path.parent)) is not None]
    named = {word.partition("=")[0]: word.partition("=")[2] for word in sweep.command} | combination
    if "METHOD" in named:
        found = [own for own in found if own.get("method") == named["METHOD"]]
    if len(found) != 1:
        return Outcome(combination, failure=f"{len(found)} finished runs in {folder}, where one was to be")
    value = (found[0].get("metrics") or {}).get(sweep.metric)
    if value is None:
        return Outcome(combination, failure=f"its results.json has no {sweep.metric}, the sweep's metric")
    return Outcome(combination, value, found[0].get("best_epoch"))


def table(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """The runs so far as Markdown, the best first, those that failed last; what all have in common stands below."""
    combinations = grid(sweep)
    varied = [name for name in combinations[0] if len({own[name] for own in combinations}) > 1]
    sign = -1 if sweep.maximises else 1
    ordered = sorted(outcomes, key=lambda outcome: (outcome.value is None, sign * (outcome.value or 0)))
    rows = [[*varied, sweep.metric, "best epoch"], ["---"] * len(varied) + ["---:"] * 2]
    for outcome in ordered:
        value = outcome.failure if outcome.value is None else f"{outcome.value:.4f}"
        epoch = "" if outcome.best_epoch is None else str(outcome.best_epoch + 1)  # as in all tables
        rows.append([*(outcome.combination[name] for name in varied), value, epoch])
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    common = " ".join(f"{name}={combinations[0][name]}" for name in combinations[0] if name not in varied)
    command = " ".join(common if word == PARAMETERS else word for word in sweep.words)
    return "\n".join([*lines, "", f"{len(outcomes)} of {len(combinations)} combinations of {sweep.path}, by "
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
