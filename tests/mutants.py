"""Small changes of a Python source that some test should detect: see `mutate.py`."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is",
    "in": "not in", "not in": "in",
}  # fmt: skip
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "@": "*", "&": "|", "|": "&"}
FUNCTIONS = {
    "min": "max", "max": "min", "any": "all", "all": "any", "argmax": "argmin", "sum": "mean", "mean": "sum",
    "cos": "sin", "sin": "cos", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "minimum": "maximum",
    "maximum": "minimum", "floor": "ceil", "ceil": "floor", "startswith": "endswith",
}  # fmt: skip
WRAPPERS = {
    "abs", "exp", "log", "sqrt", "square", "tanh", "sorted", "set", "reversed", "round", "lower", "strip", "normalise",
    "normalize", "nan_to_num", "clip", "clamp", "relu", "gelu", "sigmoid", "flip", "squeeze",
}  # fmt: skip
SPLITS = {"train": "test", "val": "test", "test": "val"}
IGNORED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.arg)
IGNORED_CALLS = ("logger.", "warnings.", "cast", "isinstance", "zip", "print")
IGNORED_FIELDS = ("annotation", "returns", "decorator_list", "ctx", "bases")
IGNORED_KEYWORDS = ("strict", "help", "description", "exist_ok", "daemon")


class Mutant(NamedTuple):
    """One change: bytes `start` to `end` of a file become `text`."""

    kind: str
    path: str
    start: int
    end: int
    text: bytes

    def apply(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.text + source[self.end :]


class Finder:
    """Finder of all mutants of one file; docstrings, annotations, messages and imports are not mutated.

    A method `of_<node>` yields the mutants of a node of the syntax tree, without those of its children.
    """

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.starts = [0, *(i + 1 for i, byte in enumerate(source) if byte == ord("\n"))]
        self.axis = False  # whether the visited node is an axis argument

    def find(self) -> Iterator[Mutant]:
        """Yield all mutants."""
        return self._visit(ast.parse(self.source))

    def _visit(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, IGNORED) or (isinstance(node, ast.Call) and self._text(node).startswith(IGNORED_CALLS)):
            return
        if isinstance(node, ast.Subscript) and self._text(node.value) in ("Literal", "tuple", "dict", "list"):
            return
        yield from getattr(self, f"of_{type(node).__name__}", lambda node: ())(node)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.keyword):
                    self.axis = child.arg in ("dim", "axis", "dims")
                    if child.arg not in IGNORED_KEYWORDS:
                        yield from self._visit(child.value)
                    self.axis = False
                elif isinstance(child, ast.AST) and name not in IGNORED_FIELDS:
                    yield from self._visit(child)

    def _begin(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def _end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> str:
        return self.source[self._begin(node) : self._end(node)].decode()

    def _change(self, kind: str, node: ast.AST, new: str) -> Mutant:
        return Mutant(kind, self.path, self._begin(node), self._end(node), new.encode())

    def _keep(self, kind: str, node: ast.AST, part: ast.AST) -> Mutant:
        return self._change(kind, node, f"({self._text(part)})")

    def _symbol(self, kind: str, left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[Mutant]:
        """Change the operator between two operands; parentheses may surround it."""
        for old in sorted(table, key=len, reverse=True):
            position = self.source.find(old.encode(), self._end(left), self._begin(right))
            if position >= 0:
                yield Mutant(kind, self.path, position, position + len(old), table[old].encode())
                return

    def of_Compare(self, node: ast.Compare) -> Iterator[Mutant]:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            yield from self._symbol("comparison", left, right, COMPARISONS)

    def of_BinOp(self, node: ast.BinOp) -> Iterator[Mutant]:
        yield from self._symbol("sign", node.left, node.right, OPERATORS)
        yield self._keep("dropped", node, node.left)
        yield self._keep("dropped", node, node.right)

    def of_BoolOp(self, node: ast.BoolOp) -> Iterator[Mutant]:
        yield from self._symbol("mask", node.values[0], node.values[1], {"and": "or", "or": "and"})
        yield from (self._keep("dropped", node, part) for part in node.values[:2])

    def of_UnaryOp(self, node: ast.UnaryOp) -> Iterator[Mutant]:
        if self.axis:
            yield self._change("axis", node, "0")
        else:
            yield self._keep("sign" if isinstance(node.op, ast.USub) else "mask", node, node.operand)

    def of_Constant(self, node: ast.Constant) -> Iterator[Mutant]:
        match node.value:
            case bool() as value:
                yield self._change("flag", node, str(not value))
            case int() as value if self.axis:
                yield self._change("axis", node, str(int(not value)))
            case int() as value:
                yield from (self._change("off by one", node, str(new)) for new in (value + 1, abs(value - 1)))
            case float() as value:
                yield self._change("constant", node, repr(value * 2 or 1.0))
            case str() as value if value in SPLITS:
                yield self._change("split", node, repr(SPLITS[value]))

    def of_If(self, node: ast.If) -> Iterator[Mutant]:
        is_guard = isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue) and not node.orelse
        if is_guard:
            yield self._change("check", node.test, "False")
        else:
            yield self._change("mask", node.test, f"not ({self._text(node.test)})")

    def of_IfExp(self, node: ast.IfExp) -> Iterator[Mutant]:
        yield self._change("mask", node.test, f"not ({self._text(node.test)})")

    def of_comprehension(self, node: ast.comprehension) -> Iterator[Mutant]:
        yield from (self._change("check", test, "True") for test in node.ifs)

    def of_ExceptHandler(self, node: ast.ExceptHandler) -> Iterator[Mutant]:
        if isinstance(node.type, ast.Tuple):
            yield self._change("check", node.type, self._text(node.type.elts[0]))

    def of_Slice(self, node: ast.Slice) -> Iterator[Mutant]:
        yield from (self._change("dropped", bound, "") for bound in (node.lower, node.upper) if bound)

    def of_Name(self, node: ast.Name | ast.Attribute) -> Iterator[Mutant]:
        if self._text(node).endswith("seed") and isinstance(node.ctx, ast.Load):
            yield self._change("seed", node, "0")

    of_Attribute = of_Name

    def of_Tuple(self, node: ast.Tuple) -> Iterator[Mutant]:
        if "seed" in self._text(node) and len(node.elts) > 1 and isinstance(node.ctx, ast.Load):
            yield Mutant("seed", self.path, self._end(node.elts[0]), self._end(node.elts[-1]), b",")

    def of_AugAssign(self, node: ast.AugAssign) -> Iterator[Mutant]:
        table = {f"{old}=": f"{new}=" for old, new in OPERATORS.items()}
        yield from self._symbol("sign", node.target, node.value, table)
        yield self._change("dropped", node, "pass")

    def of_Expr(self, node: ast.Expr) -> Iterator[Mutant]:
        if isinstance(node.value, ast.Call) and not self._text(node).startswith(IGNORED_CALLS):
            yield self._change("dropped", node, "pass")

    def of_Call(self, node: ast.Call) -> Iterator[Mutant]:
        method = isinstance(node.func, ast.Attribute)
        name = self._text(node.func).rpartition(".")[2]
        if name in FUNCTIONS and (method or name not in ("sum", "mean")):
            yield Mutant("function", self.path, self._end(node.func) - len(name), self._end(node.func),
                         FUNCTIONS[name].encode())  # fmt: skip
        if name in WRAPPERS and isinstance(node.func, ast.Attribute) and not node.args:
            yield self._keep("dropped", node, node.func.value)
        elif name in WRAPPERS and node.args and not isinstance(node.args[0], ast.Starred):
            yield self._keep("dropped", node, node.args[0])
        if len(node.args) > 1 and not any(isinstance(argument, ast.Starred) for argument in node.args[:2]):
            first, second = node.args[:2]
            between = self.source[self._end(first) : self._begin(second)].decode()
            swapped = f"{self._text(second)}{between}{self._text(first)}"
            yield Mutant("arguments", self.path, self._begin(first), self._end(second), swapped.encode())


def function_at(mutant: Mutant, source: bytes) -> int | None:
    """Return the first line of the innermost function whose body a mutant changes, None outside of all bodies.

    It equals `co_firstlineno` of the code object: the line of the first decorator, if there is one.
    """
    line, innermost = source[: mutant.start].count(b"\n") + 1, None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if node.body[0].lineno <= line <= (node.end_lineno or 0):
                innermost = max(innermost or 0, first)
    return innermost
