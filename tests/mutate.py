"""Mutation testing: change the sources a little, many times, and see whether the tests of the changed room fail.

    .venv/bin/python tests/mutate.py --number 150 --seed 0 --jobs 2 [--rooms models wire] [--list]

Draws mutants over all rooms alike, and in a room over all kinds of mutation alike; runs the room's fast tests on each in
a copy of the repository; prints the survivors as diffs. Read each: either a test is missing, or the mutant is equivalent
(it changes nothing that anybody could notice). Tests run in forks of a process that has imported every library, and so
does the fork server that some of them start: a mutant takes seconds. Linux only.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import multiprocessing.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SRC = "src/cdc_mmpg/"
# Room: its sources, and its tests, the fastest first. Tests of datasets and runs hold several rooms.
ROOMS: dict[str, tuple[str, str]] = {
    "models": (SRC + "models/*.py", "adr fda all_in_one methods session export"),
    "methods": (SRC + "methods/*.py", "methods tasks session synthetic datasets"),
    "metrics": (SRC + "metrics.py", "tasks tables on_device"),
    "evaluation": (SRC + "evaluation.py", "tasks tables synthetic datasets on_device"),
    "sessions": (SRC + "sessions.py", "session synthetic"),
    "features": (SRC + "features.py", "synthetic session datasets domains"),
    "wire": (SRC + "wire.py", "wire payloads device cloud"),
    "payloads": (SRC + "payloads.py", "payloads wire export"),
    "cloud": (SRC + "cloud.py", "cloud"),
    "device": (SRC + "device/*.py", "device export cloud"),
    "answers": ("data_modules/answers.py", "annotations msvd_qa tgif msrvtt"),
    "cache": ("data_modules/cache.py", "cache msvd_qa"),
    "video": (SRC + "video.py", "video cache"),
    "frames": (SRC + "frames.py", "video cache"),
    "checkpointing": (SRC + "checkpointing.py", "weights interruptions"),
    "batch": (SRC + "batch.py", "tasks msvd_qa synthetic domains datasets on_device"),
    "domains": ("data_modules/domains.py", "domains"),
    "weights": (SRC + "weights.py", "weights adr all_in_one"),
    "text": (SRC + "text.py", "tasks all_in_one export device"),
    "data": ("data_modules/base.py", "msvd_qa msrvtt tgif datasets synthetic domains"),
}  # fmt: skip

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is",
               "in": "not in", "not in": "in"}  # fmt: skip
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "@": "*", "&": "|", "|": "&"}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "argmax": "argmin", "sum": "mean", "mean": "sum",
             "cos": "sin", "sin": "cos", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "minimum": "maximum",
             "maximum": "minimum", "floor": "ceil", "ceil": "floor", "first": "last", "startswith": "endswith"}  # fmt: skip
WRAPPERS = {"abs", "exp", "log", "sqrt", "square", "tanh", "sorted", "set", "reversed", "round", "lower", "strip", "normalise",
            "normalize", "nan_to_num", "clip", "clamp", "relu", "gelu", "sigmoid", "flip", "squeeze"}  # fmt: skip
SPLITS = {"train": "test", "val": "test", "test": "val"}
IGNORED_CALLS = ("logger.", "warnings.", "cast", "isinstance", "TypeVar", "assert_type", "zip", "print")


class Mutant(NamedTuple):
    """One change: bytes `start` to `end` of a file become `text`."""

    kind: str
    path: str
    start: int
    end: int
    text: bytes

    def applied(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.text + source[self.end :]


def find_mutants(path: str, source: bytes) -> Iterator[Mutant]:
    """Return all mutants of a file; docstrings, annotations, messages and imports have none."""
    starts = [0, *(i + 1 for i, byte in enumerate(source) if byte == ord("\n"))]

    def begin(node: ast.AST) -> int:
        return starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def finish(node: ast.AST) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(node: ast.AST) -> bytes:
        return source[begin(node) : finish(node)]

    def change(kind: str, node: ast.AST, new: str | bytes) -> Mutant:
        return Mutant(kind, path, begin(node), finish(node), new.encode() if isinstance(new, str) else new)

    def symbol(kind: str, left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[Mutant]:
        """Between two operands stand an operator and parentheses."""
        start, end = finish(left), begin(right)
        for old in sorted(table, key=len, reverse=True):
            if (place := source.find(old.encode(), start, end)) >= 0:
                yield Mutant(kind, path, place, place + len(old), table[old].encode())
                return

    def kept(kind: str, node: ast.AST, part: ast.AST) -> Mutant:
        return change(kind, node, b"(" + text(part) + b")")

    def calls(node: ast.Call) -> Iterator[Mutant]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in FUNCTIONS and (name not in ("sum", "mean") or isinstance(node.func, ast.Attribute)):
            end = finish(node.func)
            yield Mutant("function", path, end - len(name), end, FUNCTIONS[name].encode())
        if name in WRAPPERS and isinstance(node.func, ast.Attribute) and not node.args:
            yield kept("dropped", node, node.func.value)
        elif name in WRAPPERS and node.args and not isinstance(node.args[0], ast.Starred):
            yield kept("dropped", node, node.args[0])
        if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            first, second = node.args[:2]
            swapped = text(second) + source[finish(first) : begin(second)] + text(first)
            yield Mutant("arguments", path, begin(first), finish(second), swapped)

    def visit(node: ast.AST, axis: bool = False) -> Iterator[Mutant]:
        match node:
            case ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.arg():
                return
            case ast.Call(func=function) if text(function).decode().startswith(IGNORED_CALLS):
                return
            case ast.Subscript(value=ast.Name(id="Literal" | "tuple" | "dict" | "list" | "Callable")):
                return
            case ast.Compare(left=left, comparators=rights):
                for one, other in zip([left, *rights], rights, strict=False):
                    yield from symbol("comparison", one, other, COMPARISONS)
            case ast.BinOp(left=left, right=right):
                yield from symbol("sign", left, right, OPERATORS)
                yield kept("dropped", node, left)
                yield kept("dropped", node, right)
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                yield kept("mask", node, operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                yield change("axis" if axis else "sign", node, "0" if axis else b"(" + text(operand) + b")")
                return
            case ast.BoolOp(values=[first, second, *_]):
                yield from symbol("mask", first, second, {"and": "or", "or": "and"})
                yield kept("dropped", node, first)
                yield kept("dropped", node, second)
            case ast.Constant(value=bool() as value):
                yield change("flag", node, str(not value))
            case ast.Constant(value=int() as value):
                if axis:
                    yield change("axis", node, str(int(not value)))
                else:
                    yield from (change("off by one", node, str(new)) for new in (value + 1, abs(value - 1)))
            case ast.Constant(value=float() as value):
                yield change("constant", node, repr(value * 2 or 1.0))
            case ast.Constant(value=str() as value) if value in SPLITS:
                yield change("split", node, repr(SPLITS[value]))
            case ast.If(test=test, body=body, orelse=orelse):
                refuses = isinstance(body[-1], ast.Raise | ast.Return | ast.Continue) and not orelse
                yield change("check" if refuses else "mask", test, "False" if refuses else b"not (" + text(test) + b")")
            case ast.IfExp(test=test):
                yield change("mask", test, b"not (" + text(test) + b")")
            case ast.comprehension(ifs=tests):
                yield from (change("check", test, "True") for test in tests)
            case ast.ExceptHandler(type=ast.Tuple(elts=[first, *_]) as types):
                yield change("check", types, text(first))
            case ast.Slice(lower=lower, upper=upper):
                yield from (change("dropped", bound, "") for bound in (lower, upper) if bound)
            case ast.Name(id=name) | ast.Attribute(attr=name) if name.endswith("seed") and isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
                yield change("seed", node, "0")
            case ast.Tuple(elts=[first, *_, last]) if b"seed" in text(node) and isinstance(node.ctx, ast.Load):
                yield Mutant("seed", path, finish(first), finish(last), b",")
            case ast.AugAssign(target=target, value=value):
                yield from symbol("sign", target, value, {f"{old}=": f"{new}=" for old, new in OPERATORS.items()})
                yield change("dropped", node, "pass")
            case ast.Expr(value=ast.Call()):
                yield change("dropped", node, "pass")
            case ast.Call():
                yield from calls(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "ctx", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.keyword):
                    if child.arg not in ("strict", "help", "description", "exist_ok", "daemon"):
                        yield from visit(child.value, child.arg in ("dim", "axis", "dims"))
                elif isinstance(child, ast.AST):
                    yield from visit(child)

    return visit(ast.parse(source))


def draw(rooms: list[str], number: int, seed: int) -> list[tuple[str, Mutant]]:
    """Return `number` mutants with their rooms.

    Rooms take turns (those with 300 mutants and more several); in a room every kind of mutation is as likely.
    """
    generator, drawn = random.Random(seed), []
    found: dict[str, dict[str, list[Mutant]]] = {}
    for room in rooms:
        found[room] = kinds = defaultdict(list)
        for file in sorted(ROOT.glob(ROOMS[room][0])):
            for mutant in find_mutants(str(file.relative_to(ROOT)), file.read_bytes()):
                kinds[mutant.kind].append(mutant)
    turns = [room for room in rooms for _ in range(1 + sum(map(len, found[room].values())) // 300)]
    while len(drawn) < number and any(any(kinds.values()) for kinds in found.values()):
        for room in generator.sample(turns, len(turns)):
            while kinds := [kind for kind, left in sorted(found[room].items()) if left]:
                left = found[room][generator.choice(kinds)]
                mutant = left.pop(generator.randrange(len(left)))
                source = (ROOT / mutant.path).read_bytes()
                with contextlib.suppress(SyntaxError):
                    compile(mutant.applied(source), mutant.path, "exec")
                    if mutant.applied(source) == source:
                        continue
                    drawn.append((room, mutant))
                    break
    return drawn[:number]


def import_libraries() -> None:
    """Import whatever sources and tests take from elsewhere, so that forks need not."""
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    files = [file for folder in ("src", "data_modules", "tests") for file in (ROOT / folder).rglob("*.py")]
    names = {"torch._dynamo", "torch.onnx", "_pytest.assertion.rewrite"}
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_bytes()))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    ours = {"cdc_mmpg", "data_modules", *(file.stem for file in files)}
    for name in sorted(name for name in names if name.partition(".")[0] not in ours):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_repository(folder: Path) -> None:
    """Copy what git knows, with the environment, for the tests to run in."""
    files = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def start_tests(folder: Path, room: str) -> int:
    """Run a room's tests in a fork, in a copy of the repository; return its process id."""
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
        multiprocessing.util.spawnv_passfds = _fork_server  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            import processes  # that of the copy, with the mutated source

            processes.CONTEXT.Process(target=int).start()
        shutil.rmtree(folder / "temporary", ignore_errors=True)
        options = ["-x", "-m", "not slow", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=line", f"--basetemp={folder}/temporary"]
        code = pytest.main([*options, *(f"tests/test_{name}.py" for name in ROOMS[room][1].split())])
        sys.stdout.flush()
    finally:
        os._exit(code)


def _fork_server(path: bytes, arguments: list[str], kept: list[int]) -> int:
    """Stand in for `multiprocessing.util.spawnv_passfds`: the fork server needs no new interpreter and no imports."""
    if "forkserver" not in arguments[-1]:
        return SPAWN(path, arguments, kept)
    if process := os.fork():
        return process
    for number in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, *kept}:
        with contextlib.suppress(OSError):
            os.close(number)
    exec(arguments[-1])
    os._exit(0)


SPAWN = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]


def main() -> int:
    """Draw, run, report; exit code 1 where a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60, help="of mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants side by side")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS), help="where to mutate")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the draw to try, for instance again")
    parser.add_argument("--seconds", type=float, default=300, help="until a mutant counts as one that hangs")
    parser.add_argument("--list", action="store_true", help="print the draw, and run nothing")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    drawn = dict(enumerate(draw(asked.rooms, asked.number, asked.seed)))
    if asked.only:
        drawn = {number: drawn[number] for number in asked.only}
    if asked.list:
        for number, (_, mutant) in drawn.items():
            print(number, show(mutant))
        return 0
    import_libraries()
    results: dict[int, str] = {}
    again: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        free = [Path(place, str(job)) for job in range(asked.jobs)]
        for folder in free:
            copy_repository(folder)
        # First every room unchanged: a red test would kill every mutant.
        touched = [] if asked.only else dict.fromkeys(room for room, _ in drawn.values())
        unchanged = {-1 - i: (room, None) for i, room in enumerate(touched)}
        waiting = [*unchanged.items(), *drawn.items()]
        running: dict[int, tuple[int, str, Mutant | None, Path, float]] = {}
        while waiting or running:
            if waiting and free:
                (number, (room, mutant)), folder = waiting.pop(0), free.pop()
                if mutant:
                    (folder / mutant.path).write_bytes(mutant.applied((ROOT / mutant.path).read_bytes()))
                running[start_tests(folder, room)] = number, room, mutant, folder, time.monotonic()
                continue
            time.sleep(0.05)
            for process, (number, room, mutant, folder, since) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if not ended and (mutant is None or time.monotonic() < since + asked.seconds):
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                if not ended:
                    os.waitpid(process, 0)
                del running[process]
                free.append(folder)
                code = os.waitstatus_to_exitcode(status) if ended else 1
                results[number] = "SURVIVED" if code == 0 else "killed" if ended else "timed out"
                if mutant:
                    shutil.copy2(ROOT / mutant.path, folder / mutant.path)
                elif code and number not in again:  # perhaps it was only the time
                    again.add(number)
                    waiting.insert(0, (number, (room, None)))
                elif code:
                    raise SystemExit(f"{(folder / 'log').read_text()}\n{room}: the tests fail on unchanged sources")
                lines = [line for line in (folder / "log").read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
                print(number, room, results[number], f"{time.monotonic() - since:.0f}s", *lines[:1],
                      *([show(mutant)] if mutant and code == 0 else []), flush=True)  # fmt: skip
    for room in ROOMS:
        mine = [results[number] for number, (own, _) in drawn.items() if own == room]
        if mine:
            print(f"{room:15} {len(mine) - mine.count('SURVIVED')} of {len(mine)} killed")
    survivors = [number for number in drawn if results[number] == "SURVIVED"]
    print(f"killed: {len(drawn) - len(survivors)} of {len(drawn)}; survivors: {survivors}")
    return 1 if survivors else 0


def show(mutant: Mutant) -> str:
    """Return a mutant as a diff."""
    before = (ROOT / mutant.path).read_bytes()
    old, new = (text.decode().splitlines() for text in (before, mutant.applied(before)))
    diff = difflib.unified_diff(old, new, f"{mutant.path} ({mutant.kind})", lineterm="", n=1)
    return "\n".join([next(diff), *list(diff)[1:]])


if __name__ == "__main__":
    sys.exit(main())
