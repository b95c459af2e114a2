"""Execution of a plan's steps, in parallel where possible; each run has its share of the processors or its own GPU.

A failed run stops only the runs that build on it; failures are listed at the end. On a CPU, runs are forked from a
process that has already imported Lightning (a fork server), since the import takes 10 seconds or more.
"""

import importlib
import multiprocessing.connection
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from cdc_mmpg.commands.plan import Plan, Step
from cdc_mmpg.errors import CDCError
from cdc_mmpg.program import REQUEUE_SIGNAL, Stopped, escape_controls, exit_on_signals
from cdc_mmpg.progress import describe_seconds
from cdc_mmpg.results import read_results
from cdc_mmpg.training.cli import is_finished, refuse_other_settings

THREADS_VARIABLE = "OMP_NUM_THREADS"
PRELOADED_MODULE = "cdc_mmpg.training.experiment"  # imports torch, Lightning and the methods' base class
STOP_SECONDS = 90.0  # that runs have to save their state after a stop signal


class Outcome(NamedTuple):
    """Outcome of a step."""

    code: int  # exit code
    seconds: float
    finished_before: bool = False  # whether the run was already finished, and so not started


class Executor:
    """Executor of a plan's steps.

    Args:
        plan: complete plan; steps added later are ignored.
        run_program: function that runs a program, by name and arguments, in this process and returns its exit code.
        after_run: function to call after each run, successful or not.
    """

    def __init__(
        self,
        plan: Plan,
        run_program: Callable[[str, Sequence[str]], int],
        after_run: Callable[[], object] = lambda: None,
    ) -> None:
        self.plan, self.request = plan, plan.request
        self.run_program, self.after_run = run_program, after_run
        self.steps = list(plan.steps.values())
        self.runs = [step for step in self.steps if step.folder]
        self.outcomes: dict[str, Outcome] = {}
        self.skipped: dict[str, str] = {}  # skipped step: the failed step that it builds on
        self.stage_seconds: dict[str, float] = {}  # by stage, in their order
        self._processes: dict[str, Any] = {}
        self._printing = threading.Lock()
        self._server: Any = None

    @property
    def forks(self) -> bool:
        """Whether runs start from a fork server: only on the CPU, with one process each."""
        request = self.request
        one = request["DEVICES"] in ("", "1", "auto", "-1") and request["NODES"] in ("", "1")
        return one and not request["LAUNCH"] and not self.plan.gpus

    def environment_of(self, step: Step, slot: int = 0) -> dict[str, str]:
        """Return the variables to add to the environment of a step's process.

        Args:
            step: step to run.
            slot: index of its slot among the parallel runs.
        """
        if step.alone or self.plan.jobs == 1:
            return {}
        added = {THREADS_VARIABLE: os.environ.get(THREADS_VARIABLE) or str(self.plan.count_processors_per_run())}
        if self.plan.gpus:
            added["CUDA_VISIBLE_DEVICES"] = self.plan.gpus[slot]
        return added

    def command_of(self, step: Step) -> list[str]:
        """Return the command that runs a step in a new process."""
        launcher = self.request.words("LAUNCH") if step.trains else []
        return [*launcher, sys.executable, "-m", "cdc_mmpg", *step.words]

    def print_list(self) -> None:
        """Print the commands of all steps, one a line, as `make -n` does."""
        for step in self.steps:
            added = self.environment_of(step)
            words = [*(["env", *(f"{name}={value}" for name, value in added.items())] if added else [])]
            command = self.command_of(step)
            command[command.index(sys.executable)] = ".venv/bin/python"
            print(shlex.join([*words, *command]))

    def execute(self) -> int:
        """Run all steps; return 0, or the exit code of the first that failed.

        Raises:
            CDCError: a configuration is refused, before any training.
            Stopped: a signal came; it was forwarded to the running steps.
        """
        waiting = {step.name: step for step in self.runs if not self._note_finished(step)}
        needed = {name for step in waiting.values() for name in step.needs}
        others = [step for step in self.steps if not step.folder]
        first = [step for step in others if step.name in needed]
        last = [step for step in others if step not in first and (step.program != "clips" or not self.runs)]
        with self._timed("imports and check of the settings"):
            self._check_settings([step for step in waiting.values() if step.trains])
        if waiting:
            exit_on_signals()
            if code := self._run_in_sequence(first):
                return code
            self._run_in_parallel(dict(waiting))
        failed = {name: outcome.code for name, outcome in self.outcomes.items() if outcome.code}
        missing = failed.keys() | self.skipped.keys()
        if missing and not any(read_results(Path(step.folder)) for step in self.runs):
            last = []  # a table without runs would only add an error
        code = self._run_in_sequence([step for step in last if not missing & set(step.needs)])
        if ended := [step for name, step in waiting.items() if name in self.outcomes]:
            self._print_seconds(ended)
        self._print_failures(failed)
        return next(iter(failed.values()), code)

    def _run_in_sequence(self, steps: Sequence[Step]) -> int:
        for step in steps:
            with self._timed(step.program):
                code = self.run_program(step.program, step.arguments)
            if code:
                return code
        return 0

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage."""
        begun = time.monotonic()
        yield
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + time.monotonic() - begun

    def _note_finished(self, step: Step) -> bool:
        """Return whether a step's run is finished, and record it; refuse one that finished with other settings.

        Raises:
            ConfigError: the settings differ; names them.
        """
        if not step.trains:
            return False
        if is_finished(step.words):
            self.outcomes[step.name] = Outcome(0, 0.0, finished_before=True)
            return True
        refuse_other_settings(step.words)
        return False

    def _check_settings(self, steps: Sequence[Step]) -> None:
        """Parse the settings of all runs to train, in one forked process that already has the imports."""
        if len(steps) < 2:  # a single run checks its own settings as early
            return
        process = self._start_forked("check", [word for step in steps for word in ("--", *step.words)])
        try:
            code = process.wait()
        except Stopped as error:
            process.signal(error.number)
            raise
        if code:
            raise SystemExit(code)

    def _run_in_parallel(self, waiting: dict[str, Step]) -> None:
        total, begun, wanted = len(waiting), time.monotonic(), list(waiting.values())
        running: dict[Future[int], tuple[Step, int, float]] = {}
        slots = list(range(self.plan.jobs))
        with ThreadPoolExecutor(max_workers=self.plan.jobs) as pool:
            try:
                while waiting or running:
                    for step in self._find_ready_steps(waiting):
                        if not slots or (step.alone and running) or any(s.alone for s, _, _ in running.values()):
                            break
                        del waiting[step.name]
                        slot = slots.pop(0)
                        future = pool.submit(self._run, step, slot)
                        running[future] = (step, slot, time.monotonic())
                    if not running:
                        break
                    for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        step, slot, since = running.pop(future)
                        slots = sorted([*slots, slot])
                        self.outcomes[step.name] = Outcome(future.result(), time.monotonic() - since)
                        if step.alone:
                            self.stage_seconds[step.name] = self.outcomes[step.name].seconds
                        self._print_progress(step, total, begun)
                        self.after_run()
            except Stopped as error:
                self._stop(error.number)
                if error.number == REQUEUE_SIGNAL:  # the run has already asked SLURM to requeue the job
                    raise SystemExit(128 + error.number) from error
                raise
        if side_by_side := [step for step in wanted if step.name in self.outcomes and not step.alone]:
            alone = sum(self.stage_seconds.get(step.name, 0.0) for step in wanted)
            stage = f"{len(side_by_side)} runs, {self.plan.jobs} side by side"
            self.stage_seconds[stage] = time.monotonic() - begun - alone

    def _find_ready_steps(self, waiting: dict[str, Step]) -> list[Step]:
        """Return the steps that can start, in the plan's order; skip steps that build on a failed one."""
        ready = []
        for step in list(waiting.values()):
            before = [name for name in step.needs if self.plan.steps[name].folder]
            broken = [name for name in before if name in self.skipped or
                      (name in self.outcomes and self.outcomes[name].code)]  # fmt: skip
            if broken:
                self.skipped[step.name] = broken[0]
                del waiting[step.name]
            elif all(name in self.outcomes for name in before) and step.after in {"", *self.outcomes, *self.skipped}:
                ready.append(step)
        return ready

    def _run(self, step: Step, slot: int) -> int:
        """Run a step until it ends; return its exit code."""
        side_by_side = self.plan.jobs > 1 and not step.alone
        added = self.environment_of(step, slot)
        process: _ForkedProcess | _Subprocess
        if self.forks and len(self.runs) > 1:
            threads = int(added[THREADS_VARIABLE]) if added else None
            process = self._start_forked(step.program, step.arguments, threads, side_by_side)
        else:
            process = _Subprocess(self.command_of(step), added, piped=side_by_side)
        self._processes[step.name] = process
        try:
            for line in process.lines():
                self._print(f"{step.name}: {line}")
            return process.wait()
        finally:
            del self._processes[step.name]

    def _start_forked(
        self, program: str, arguments: Sequence[str], threads: int | None = None, piped: bool = False
    ) -> "_ForkedProcess":
        """Start a program from the fork server; the first call starts the server."""
        with self._printing:
            if self._server is None:
                self._server = multiprocessing.get_context("forkserver")
                self._server.set_forkserver_preload([PRELOADED_MODULE])
        return _ForkedProcess(self._server, program, arguments, threads, piped)

    def _stop(self, number: int) -> None:
        """Forward a signal to all running steps, and wait up to `STOP_SECONDS` for them to end."""
        end = time.monotonic() + STOP_SECONDS
        for process in list(self._processes.values()):
            process.signal(number)
        while self._processes and time.monotonic() < end:
            time.sleep(0.1)

    def _print(self, line: str) -> None:
        with self._printing:
            print(escape_controls(line), flush=True)

    def _print_progress(self, step: Step, total: int, begun: float) -> None:
        """Print how a run ended, the number of ended runs, and an estimate of the remaining time."""
        done = [outcome for outcome in self.outcomes.values() if not outcome.finished_before]
        outcome, number = self.outcomes[step.name], len(done) + len(self.skipped)
        seconds = time.monotonic() - begun
        left = seconds / len(done) * (total - number)
        end = f", about {describe_seconds(left)} left" if total > number else ""
        how = f"failed with exit code {outcome.code}" if outcome.code else f"finished{describe_score(step.folder)}"
        self._print(f"{number} of {total}: {step.name} {how} in {describe_seconds(outcome.seconds)}{end}")

    def _print_seconds(self, runs: Sequence[Step]) -> None:
        """Print the seconds of every stage, and what the runs of this command spent them on."""
        lines = [f"{seconds:8,.0f}  {stage}" for stage, seconds in self.stage_seconds.items()]
        total = dict.fromkeys(("train", "test", "all"), 0.0)
        for step in runs:
            if results := read_results(Path(step.folder)):
                spent = results.get("seconds", {}) | {"all": self.outcomes[step.name].seconds}
                total = {part: value + spent.get(part, 0.0) for part, value in total.items()}
        train, test, every = total.values()
        lines.append(
            f"{sum(self.stage_seconds.values()):8,.0f}  together; the runs, added up: {train:,.0f} training, "
            f"{test:,.0f} testing, {max(0, every - train - test):,.0f} starting, decoding and encoding"
        )
        self._print("\n".join(["seconds by stage:", *lines]))

    def _print_failures(self, failed: dict[str, int]) -> None:
        if not failed:
            return
        lines = [f"  {name}: exit code {code}" for name, code in failed.items()]
        lines += [f"  {name}: not run, it builds on {other}" for name, other in self.skipped.items()]
        print("\n".join(["These runs have no results:", *lines]), file=sys.stderr, flush=True)


class _Subprocess:
    """Program in a new process."""

    def __init__(self, command: Sequence[str], added: dict[str, str], piped: bool) -> None:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if piped else {}
        try:
            self._process = subprocess.Popen(
                command, env=os.environ | added, text=True, errors="replace", bufsize=1, **output
            )  # type: ignore[call-overload]
        except OSError as error:
            remedy = "" if command[0] == sys.executable else ": check LAUNCH="
            raise CDCError(f"{command[0]}: cannot be run ({error.strerror or error}){remedy}") from error

    def lines(self) -> Iterator[str]:
        """Yield the lines of its output, if it is piped to this process."""
        yield from (line.rstrip("\n") for line in self._process.stdout or ())

    def wait(self) -> int:
        """Wait for the process to end; return its exit code."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        with suppress(OSError):
            self._process.send_signal(number)


class _ForkedProcess:
    """Program in a process forked by the fork server."""

    def __init__(self, context: Any, program: str, arguments: Sequence[str], threads: int | None, piped: bool) -> None:
        reader, writer = context.Pipe(duplex=False) if piped else (None, None)
        self._reader: Connection | None = reader
        self._process = context.Process(target=run_forked, args=(program, list(arguments), threads, writer))
        self._process.start()
        if writer is not None:
            writer.close()

    def lines(self) -> Iterator[str]:
        """Yield the lines of its output, if it is piped to this process."""
        rest = b""
        while self._reader is not None:
            ready = multiprocessing.connection.wait([self._reader, self._process.sentinel])
            if self._reader not in ready:  # it has ended; a child process may keep the pipe open
                break
            if not (data := os.read(self._reader.fileno(), 1 << 16)):
                break
            *complete, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in complete)
        if rest:
            yield rest.decode(errors="replace")

    def wait(self) -> int:
        """Wait for the process to end; return its exit code."""
        self._process.join()
        code: int = self._process.exitcode
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        with suppress(OSError):
            os.kill(self._process.pid, number)


def run_forked(program: str, arguments: list[str], threads: int | None, writer: Connection | None) -> None:
    """Run a program in a forked process.

    Args:
        program: name of a program of `cdc-mmpg`.
        arguments: arguments of the program.
        threads: number of threads to compute with; None for all.
        writer: pipe for its output; None for the output of the fork server.
    """
    from cdc_mmpg.commands.main import run_program  # noqa: PLC0415  that module imports this one

    exit_on_signals()
    if writer is not None:
        for descriptor in (1, 2):
            os.dup2(writer.fileno(), descriptor)
        writer.close()
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, errors="replace", closefd=False) for n in (1, 2))  # noqa: SIM115
        if capture := sys.modules.get("wandb.sdk.lib.console_capture"):  # it logs the streams of its import
            importlib.reload(capture)
    if threads is not None:
        import torch  # noqa: PLC0415  already imported by the fork server

        os.environ[THREADS_VARIABLE] = str(threads)
        torch.set_num_threads(threads)
    sys.exit(run_program(program, arguments))


def describe_score(folder: str) -> str:
    """Return the test score of a finished run, as part of a sentence; empty if there is none."""
    metrics = (read_results(Path(folder)) or {}).get("metrics") or {}
    for name in ("test/accuracy", "test/VR@1", "test/loss"):
        if (value := metrics.get(name)) is not None:
            return f" with {name} {value:.4f}"
    return ""
