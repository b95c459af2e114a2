"""Mutation testing: make many small changes to the sources, and check that the tests of the changed room fail.

    .venv/bin/python tests/mutate.py --number 150 --seed 0 --jobs 2 [--rooms models wire] [--list]

Mutants (see `mutants.py`) are drawn evenly from all rooms and kinds. The room's fast tests run on each mutant in a copy
of the repository, and surviving mutants are printed as diffs. For each of them, either a test is missing, or the mutant
is equivalent (its change has no observable effect). A room's tests first run on unchanged sources and are traced: on a
mutant, the tests that reach the changed function run first, and all others only if these pass.
Tests run in forks of a process that has imported every library, and so does the fork server from which they start
processes: a mutant takes seconds. Linux only.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import multiprocessing.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mutants import Finder, Mutant, function_at

ROOT = Path(__file__).parents[1]
SRC = "src/cdc_mmpg/"
# Sources and tests by room.
ROOMS: dict[str, tuple[str, str]] = {
    "models": (SRC + "models/*.py", "adr fda steps all_in_one methods session tasks"),
    "methods": (SRC + "methods/*.py", "steps methods session tasks"),
    "metrics": (SRC + "evaluation/metrics.py", "evaluation tables tasks"),
    "evaluation": (SRC + "evaluation/evaluate.py", "evaluation external"),
    "predictions": (SRC + "evaluation/predictions.py", "external"),
    "sessions": (SRC + "training/sessions.py", "features session synthetic"),
    "features": (SRC + "training/features.py", "features synthetic"),
    "wire": (SRC + "wire/messages.py", "wire"),
    "payloads": (SRC + "wire/payloads.py", "payloads wire session"),
    "cloud": (SRC + "cloud/*.py", "cloud_parts cloud"),
    "device": (SRC + "device/*.py", "connection state device"),
    "answers": ("data_modules/answers.py", "annotations msvd_qa tgif msrvtt"),
    "cache": ("data_modules/cache.py data_modules/frame_index.py data_modules/decoding.py", "cache msvd_qa"),
    "video": (SRC + "media/video.py", "video cache"),
    "frames": (SRC + "media/frames.py", "video msvd_qa"),
    "checkpointing": (SRC + "training/checkpointing.py", "checkpointing interruptions"),
    "batches": (SRC + "data/*.py", "features global_batch methods msvd_qa"),
    "domains": ("data_modules/domains.py", "domains"),
    "weights": (SRC + "models/weights.py", "weights adr all_in_one"),
    "text": (SRC + "media/text.py", "text tasks"),
    "data": (
        "data_modules/base.py data_modules/annotated_splits.py data_modules/clip_dataset.py data_modules/checks.py",
        "msvd_qa msrvtt tgif domains",
    ),
}


def list_sources(room: str) -> list[Path]:
    """Return the files of a room, relative to the root of the repository."""
    return sorted(file.relative_to(ROOT) for pattern in ROOMS[room][0].split() for file in ROOT.glob(pattern))


def draw_mutants(rooms: list[str], number: int, seed: int) -> list[tuple[str, Mutant]]:
    """Return `number` mutants with their rooms.

    Rooms take turns (one more turn per 300 mutants); in a room, every kind of mutation is equally likely.
    """
    generator, drawn = random.Random(seed), []
    mutants: dict[str, dict[str, list[Mutant]]] = {}
    for room in rooms:
        mutants[room] = kinds = defaultdict(list)
        for file in list_sources(room):
            for mutant in Finder(str(file), (ROOT / file).read_bytes()).find():
                kinds[mutant.kind].append(mutant)
    room_turns = [room for room in rooms for _ in range(1 + sum(map(len, mutants[room].values())) // 300)]
    while len(drawn) < number and any(any(kinds.values()) for kinds in mutants.values()):
        for room in generator.sample(room_turns, len(room_turns)):
            while kinds := [kind for kind, unused in sorted(mutants[room].items()) if unused]:
                unused = mutants[room][generator.choice(kinds)]
                mutant = unused.pop(generator.randrange(len(unused)))
                source = (ROOT / mutant.path).read_bytes()
                with contextlib.suppress(SyntaxError):
                    compile(mutant.apply(source), mutant.path, "exec")
                    if mutant.apply(source) != source:
                        drawn.append((room, mutant))
                        break
    return drawn[:number]


def import_libraries() -> None:
    """Import all third-party modules that sources and tests use, so that forks need not."""
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    files = [file for folder in ("src", "data_modules", "tests") for file in (ROOT / folder).rglob("*.py")]
    names = {"torch._dynamo", "torch.onnx"}
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_bytes()))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    local_modules = {"cdc_mmpg", "data_modules", *(file.stem for file in files)}
    for name in sorted(name for name in names if name.partition(".")[0] not in local_modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_repository(folder: Path) -> None:
    """Copy the files that git does not ignore, and link the environment, as a folder for test runs."""
    files = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in (name for name in files.split("\0") if (ROOT / name).is_file()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")


class Watch:
    """Pytest plugin that records which functions of some files every test reaches, and how long it takes.

    Functions reached during setup, by fixtures, count as reached by all tests of the file.
    """

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder, self.files = folder, {str(folder / file): str(file) for file in files}
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, set[str]] = defaultdict(set)  # tests or test files, by function

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """Trace the fixtures."""
        with self._watching(item.nodeid.partition("::")[0]):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Trace the test."""
        began = time.process_time()
        with self._watching(item.nodeid):
            yield
        self.seconds[item.nodeid] = time.process_time() - began

    @contextlib.contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        def trace(frame: Any, event: str, argument: object) -> None:
            if file := self.files.get(frame.f_code.co_filename):
                self.reached[f"{file}:{frame.f_code.co_firstlineno}"].add(name)

        threading.settrace(trace)
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def pytest_sessionfinish(self) -> None:
        """Write `reached.json`: the tests that reach each function, fastest first."""
        tests_by_function = {}
        for function, names in self.reached.items():
            tests = [test for test in self.seconds if test in names or test.partition("::")[0] in names]
            tests_by_function[function] = sorted(tests, key=lambda test: self.seconds[test])
        (self.folder / "reached.json").write_text(json.dumps(tests_by_function))


def start_tests(folder: Path, room: str, tests: list[str], watch: bool) -> int:
    """Run tests in a fork, in a copy of the repository; return its process id."""
    if process := os.fork():
        return process
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path[:0] = [str(folder / name) for name in ("tests", "src", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
        sys.dont_write_bytecode = not watch
        multiprocessing.util.spawnv_passfds = _fork_server  # type: ignore[attr-defined]
        if any("from processes import" in (folder / test.partition("::")[0]).read_text() for test in tests):
            with contextlib.suppress(Exception):
                import processes  # from the copy, with the mutated source

                processes.CONTEXT.Process(target=int).start()
        shutil.rmtree(folder / "temporary", ignore_errors=True)
        options = ["-x", "-m", "not slow", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=line"]
        plugins = [Watch(folder, list_sources(room))] if watch else []
        code = pytest.main([*options, f"--basetemp={folder}/temporary", *tests], plugins)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _fork_server(path: bytes, arguments: list[str], open_files: list[int]) -> int:
    """Replace `multiprocessing.util.spawnv_passfds`: the fork server needs no new interpreter and no imports."""
    if "forkserver" not in arguments[-1]:
        return SPAWN(path, arguments, open_files)
    if process := os.fork():
        return process
    for number in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, *open_files}:
        with contextlib.suppress(OSError):
            os.close(number)
    exec(arguments[-1])
    os._exit(0)


SPAWN = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]


class Task(NamedTuple):
    """A mutant to test, or a room to trace on unchanged sources."""

    number: int  # index of the mutant in the draw
    room: str
    mutant: Mutant | None
    attempt: int = 1  # for mutants: 1 runs the tests that reach it, 2 all tests


class Trials:
    """Runner of all mutants of a draw, several at a time, each in a copy of the repository."""

    def __init__(self, drawn: list[tuple[str, Mutant]], folders: list[Path]) -> None:
        self.drawn, self.free = drawn, folders
        self.reached: dict[str, dict[str, list[str]]] = {}  # tests by room and function
        self.survivors: list[int] = []
        self.waiting = [Task(-1, room, None) for room in dict.fromkeys(room for room, _ in drawn)]
        self.waiting += [Task(number, room, mutant) for number, (room, mutant) in enumerate(drawn)]
        for folder in folders:
            copy_repository(folder)

    def run(self, limit_seconds: float) -> None:
        """Run all mutants and print their outcomes.

        Raises:
            SystemExit: a room's tests fail twice on unchanged sources: they would kill every mutant.
        """
        running: dict[int, tuple[Task, Path, float]] = {}
        while self.waiting or running:
            ready = [task for task in self.waiting if task.mutant is None or task.room in self.reached]
            if self.free and ready:
                self.waiting.remove(ready[0])
                folder = self.free.pop()
                running[self._start(ready[0], folder)] = ready[0], folder, time.monotonic()
                continue
            time.sleep(0.05)
            for process, (task, folder, since) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                seconds = time.monotonic() - since
                if ended or (task.mutant and seconds > limit_seconds):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process, signal.SIGKILL)
                    code = os.waitstatus_to_exitcode(status if ended else os.waitpid(process, 0)[1])
                    del running[process]
                    self._end(task, folder, code, f"{seconds:.0f} s")
                    self.free.append(folder)

    def _start(self, task: Task, folder: Path) -> int:
        tests = [f"tests/test_{name}.py" for name in ROOMS[task.room][1].split()]
        if task.mutant:
            source = (ROOT / task.mutant.path).read_bytes()
            (folder / task.mutant.path).write_bytes(task.mutant.apply(source))
            if task.attempt == 1:
                function = f"{task.mutant.path}:{function_at(task.mutant, source)}"
                tests = self.reached[task.room].get(function, tests)
        return start_tests(folder, task.room, tests, task.mutant is None)

    def _end(self, task: Task, folder: Path, code: int, seconds: str) -> None:
        log = (folder / "log").read_text(errors="replace")
        failures = [line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))][:1]
        if task.mutant:
            shutil.copy2(ROOT / task.mutant.path, folder / task.mutant.path)
        if (task.mutant is None) == (code != 0) and task.attempt == 1:  # retry: it may have been a timing failure
            self.waiting.insert(0, task._replace(attempt=2))
        elif task.mutant is None and code:
            raise SystemExit(f"{log}\n{task.room}: the tests fail on unchanged sources")
        elif task.mutant is None:
            self.reached[task.room] = json.loads((folder / "reached.json").read_text())
            print(task.room, "unchanged", seconds, flush=True)
        elif code:
            print(task.number, task.room, "killed" if code > 0 else "hangs", seconds, *failures, flush=True)
        else:
            self.survivors.append(task.number)
            print(task.number, task.room, "SURVIVED", seconds, format_diff(task.mutant), flush=True)

    def report(self) -> None:
        """Print the number of killed mutants, by room and in total."""
        for room in dict.fromkeys(room for room, _ in self.drawn):
            numbers = [number for number, (mutant_room, _) in enumerate(self.drawn) if mutant_room == room]
            print(f"{room:15}{len(set(numbers) - set(self.survivors))} of {len(numbers)} killed")
        print(
            f"{len(self.drawn) - len(self.survivors)} of {len(self.drawn)} killed; survivors: {sorted(self.survivors)}"
        )


def format_diff(mutant: Mutant) -> str:
    """Return a mutant as a diff."""
    before = (ROOT / mutant.path).read_bytes()
    old, new = (text.decode().splitlines() for text in (before, mutant.apply(before)))
    diff = list(difflib.unified_diff(old, new, f"{mutant.path} ({mutant.kind})", lineterm="", n=1))
    return "\n".join([diff[0], *diff[2:]])


def main() -> int:
    """Draw mutants, run them, and report; return 1 if a mutant survived, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants in parallel")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS), help="rooms to mutate")
    parser.add_argument(
        "--seconds", type=float, default=300, help="time limit per mutant, after which it counts as hanging"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants without running them")
    options = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    drawn = draw_mutants(options.rooms, options.number, options.seed)
    if options.list:
        print(*(f"{number} {format_diff(mutant)}" for number, (_, mutant) in enumerate(drawn)), sep="\n")
        return 0
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trials = Trials(drawn, [Path(folder, str(job)) for job in range(options.jobs)])
        trials.run(options.seconds)
    trials.report()
    return 1 if trials.survivors else 0


if __name__ == "__main__":
    sys.exit(main())
