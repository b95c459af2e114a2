"""Small changes of a Python source, each of which some test should notice: see `mutate.py`."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

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
            case ast.Name(id=name) | ast.Attribute(attr=name) if name.endswith("seed") and isinstance(
                node.ctx, ast.Load
            ):  # type: ignore[attr-defined]
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


def function_at(mutant: Mutant, source: bytes) -> int | None:
    """Return the first line of the innermost function whose body a mutant changes, None outside of all bodies.

    A code object's `co_firstlineno` is this line, too: that of the first decorator.
    """
    line, found = source[: mutant.start].count(b"\n") + 1, None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.body[0].lineno <= line <= (
            node.end_lineno or 0
        ):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found = max(found or 0, first)
    return found
