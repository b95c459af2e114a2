"""`cdc-mmpg`: all commands of the project.

cdc-mmpg train DATASET=msvd SEEDS=3     a command with make's variables
cdc-mmpg fit --config ... --config ...  a program with its own arguments, as `make -n` lists them
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.commands.execute import Executor
from cdc_mmpg.commands.plan import PLANS
from cdc_mmpg.commands.request import COMMAND_VARIABLES, Request, read_make, read_words
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.program import exit_on_signals, log_to_terminal, print_error, run_to_exit_code

# Module and description of every program. A module has `main(arguments)`, which returns the exit code.
PROGRAMS = {
    "train": ("", "train and test METHOD=<name>|main|all and what it builds on, with several seeds; then the table"),
    "data": ("cdc_mmpg.commands.prepare", "check a dataset and decode its clips, for training to find"),
    "tables": ("cdc_mmpg.report.tables", "every table of the paper, ours beside it, and the missing runs"),
    "table": ("cdc_mmpg.report.tables", "the methods of a dataset side by side, in the terminal and as Markdown"),
    "worlds": ("cdc_mmpg.report.worlds", "the worlds of the synthetic dataset side by side"),
    "report": ("cdc_mmpg.report.page", "one page with every figure, and where each comes from"),
    "figures": ("cdc_mmpg.report.figures", "the README's pictures, from a dataset's runs"),
    "predict": ("cdc_mmpg.commands.predict", "answer a question about a file, or choose a text"),
    "release": ("cdc_mmpg.deployment.release", "finished runs in one archive: weights, bundles, tables, cards"),
    "export": ("cdc_mmpg.deployment.export", "bundles for a device and for the cloud"),
    "web": ("cdc_mmpg.device.page", "the libraries of the browser's page, by npm"),
    "serve": ("cdc_mmpg.cloud.__main__", "the cloud's service, of an export"),
    "device": ("cdc_mmpg.device.__main__", "answer on the device's client, with an export and the service"),
    "demo": ("cdc_mmpg.deployment.demo", "a session of an unseen device, in the browser or the terminal"),
    "score": ("cdc_mmpg.commands.score", "predictions of other models, as runs beside ours"),
    "delay": ("cdc_mmpg.benchmarks.delay", "measure the delays of the paper's Table 6 on a rate-limited link"),
    "sweep": ("cdc_mmpg.commands.sweep", "learning rates, by W&B's agent or, without a server, on this machine"),
    "workspace": ("cdc_mmpg.report.workspace", "the saved view of the W&B project, online only"),
    "checkpoint": ("cdc_mmpg.commands.checkpoint", "which weights of a checkpoint the encoder loads, drops and lacks"),
    "benchmark": ("cdc_mmpg.benchmarks.training", "training speed at the paper's size"),
    "benchmark_loading": ("data_modules.benchmark_loading", "speed of loading training samples"),
    "benchmark_adapting": ("cdc_mmpg.benchmarks.adapting", "time and memory of adapting on the device"),
    "benchmark_deployment": ("cdc_mmpg.benchmarks.deployment", "speed of service and device"),
    "fit": ("cdc_mmpg.training.cli", "one training run: Lightning's command line"),
    "validate": ("cdc_mmpg.training.cli", "evaluate on the validation split (Lightning's subcommand)"),
    "test": ("cdc_mmpg.training.cli", "evaluate on the test split (Lightning's subcommand)"),
    "check": ("cdc_mmpg.training.cli", "parse the arguments of several runs, separated by `--`"),
    "clips": ("data_modules.synthetic_clips", "make the synthetic dataset"),
    "prompts": ("cdc_mmpg.controls.prompts", "FOA's prompts on the device, from a finished run"),
    "on_device": ("cdc_mmpg.controls.on_device", "adaptation on the device alone, from a finished run"),
    "privacy": ("cdc_mmpg.controls.privacy", "what an upload reveals, from a finished run"),
}
LIGHTNING_PROGRAMS = ("fit", "validate", "test", "check")  # programs whose first argument is their name
MAKE_FLAG = "--make"  # the only argument if make calls: its variables are in MAKEFLAGS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command or a program by its name; return the exit code (see `errors`)."""
    word, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if word in ("--help", "-h", "help"):
        print(describe_commands())
        return 0
    if word not in PROGRAMS:
        print_error(f"ConfigError: {word}: no such command. `cdc-mmpg --help` lists them")
        return ConfigError.exit_code
    if word != "serve":  # its server handles signals itself
        exit_on_signals()
    _add_checkout_to_path()
    given, lists_only = read_make(os.environ.get("MAKEFLAGS", "")) if rest == [MAKE_FLAG] else (read_words(rest), False)
    if given is None and not PROGRAMS[word][0]:
        wrong = next(argument for argument in rest if read_words([argument]) is None)
        print_error(f"ConfigError: {wrong}: not a variable; write NAME=value, such as METHOD=cdc_mmpg")
        return ConfigError.exit_code
    if word not in COMMAND_VARIABLES or given is None:
        return run_program(word, rest)
    log_to_terminal()
    result: list[int] = []
    code = run_to_exit_code(lambda: result.append(_execute(word, given, lists_only)))
    return code or result[0]


def _execute(word: str, given: dict[str, str], lists_only: bool) -> int:
    executor = Executor(PLANS[word](Request(word, given)), run_program)
    if lists_only:
        executor.print_list()
        return 0
    return executor.execute()


def run_program(word: str, arguments: Sequence[str]) -> int:
    """Run a program in this process; return its exit code."""
    first_arguments = {"tables": ["--paper"], **{name: [name] for name in LIGHTNING_PROGRAMS}}
    name = PROGRAMS[word][0]
    needs_checkout = word in LIGHTNING_PROGRAMS or name.startswith("data_modules.")
    if needs_checkout and importlib.util.find_spec("data_modules") is None:
        print_error("ConfigError: data_modules is missing: run this command in a checkout of the project")
        return ConfigError.exit_code
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        print_error(
            f"ConfigError: `cdc-mmpg {word}` needs {error.name}, which is not installed in this environment: run "
            "`make environment` in a checkout, or install it with pip"
        )
        return ConfigError.exit_code
    code: int = module.main([*first_arguments.get(word, []), *arguments])
    return code


def _add_checkout_to_path() -> None:
    """Make `data_modules` importable: it is in the checkout beside `src`, and not in the wheel."""
    if Path("data_modules").is_dir() and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def describe_commands() -> str:
    """Return the help text: commands and programs, and the variables that the commands read."""
    width = max(map(len, PROGRAMS))
    lines = [__doc__ or "", "Commands, with make's variables:"]
    for word, reads in COMMAND_VARIABLES.items():
        lines.append(f"  {word:{width}}  {PROGRAMS[word][1]}")
        lines.append(f"  {'':{width}}    {' '.join(reads)}")
    lines.append("\nPrograms, with their own arguments (`cdc-mmpg <program> --help`):")
    lines += [f"  {word:{width}}  {text}" for word, (_, text) in PROGRAMS.items() if word not in COMMAND_VARIABLES]
    return "\n".join(lines)
