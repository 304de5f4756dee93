"""Small faults that can be put into a Python module: the place of each, and the source with it.

A fault is one of: a comparison inverted or its bound moved, `and` for `or`, a `not` or a condition inverted, an integer
that bounds or counts increased by one, `True` for `False`, `+` for `-` and similar, `min` for `max`, and a statement
removed: a `raise`, an early `return`, a `break` or `continue`, a call for its effect, an assignment to something that
outlives the function. Strings, durations (floats), plain arguments and indexes, combined flags, annotations,
decorators, `assert`, and debug messages get no faults, because they are no guards.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

#: The replacements of a comparison: with its bound moved, if it has one, and its inverse.
_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
#: Calls that may be absent without a fault.
_IGNORED_CALLS = re.compile(r"(log|logger|self\.log)\.debug$")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault.

    Attributes:
        path: the path of the module from the root of the checkout.
        scope: the function or class around it, as ``Class.method``; empty for the module itself.
        line: its first line, from 1.
        before, after: its first line, without indentation, without and with the fault.
        column: its column in the line, in bytes; distinguishes two faults in a line.
        start, end, text: the bytes of the module that it replaces, and their replacement.
    """

    path: str
    scope: str
    line: int
    before: str
    after: str
    column: int
    start: int
    end: int
    text: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Its identity in files, which stays the same when lines move."""
        return self.path, self.scope, self.before, self.after

    def apply(self, source: bytes) -> bytes:
        """Return the module with the fault."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def find_mutants(path: str, source: bytes) -> list[Mutant]:
    """Return all faults of a module, in the order of their places.

    Args:
        path: the path of the module from the root of the checkout.
        source: its content.
    """
    found = _Finder(path, source)
    found.visit(ast.parse(source))
    return sorted(found.mutants, key=lambda one: (one.start, one.end, one.text))


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self._path = path
        self._source = source
        self._lines = source.splitlines(keepends=True)
        self._offsets = [0]
        for line in self._lines:
            self._offsets.append(self._offsets[-1] + len(line))
        self._scope: list[str] = []
        self._in_function = 0
        self._tails: set[ast.stmt] = set()
        #: Whether an integer here is part of a bound or of a count.
        self._counts = False
        self.mutants: list[Mutant] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node, function=False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node, function=True)

    def _enter(self, node: ast.ClassDef | ast.FunctionDef, *, function: bool) -> None:
        """Visit the default values of arguments and the body, but neither decorators nor annotations."""
        self._scope.append(node.name)
        self._in_function += function
        if function:
            self._tails.update(_tails(node.body))
        if isinstance(node, ast.FunctionDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self._counts = True
                    self.visit(default)
                    self._counts = False
        self._visit_body(node.body)
        self._in_function -= function
        self._scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Skip: assertions are for the type checker."""

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        if not isinstance(node.test, ast.Constant):
            self._condition(node.test)
            self.visit(node.test)
        self._visit_body(node.body)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            token, others = _COMPARISONS[type(operator)]
            for other in others:
                self._between(left, right, token, other)
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        token, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, token, other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace(self._start(node), self._start(node) + len("not"), "")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in _ARITHMETIC and not _is_text(node):
            self._between(node.left, node.right, *_ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC and not _is_text(node.value):
            token, other = _ARITHMETIC[type(node.op)]
            self._between(node.target, node.value, token + "=", other + "=")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(self._start(node), self._end(node), str(not node.value))
        elif isinstance(node.value, int) and (self._counts or not self._in_function):
            start, end = self._start(node), self._end(node)
            self._replace(start, end, f"({self._source[start:end].decode()} + 1)")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip: positions in the text of a message are unknown before Python 3.12."""

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            self._replace(self._start(node.func), self._end(node.func), "max" if node.func.id == "min" else "min")
        self.generic_visit(node)

    def visit(self, node: ast.AST) -> None:
        """Visit a node, and record whether its integers bound or count."""
        before = self._counts
        if isinstance(node, ast.Compare | ast.BinOp | ast.AugAssign | ast.Slice | ast.Return | ast.Assign):
            self._counts = True
        elif isinstance(node, ast.Call):
            self._counts = isinstance(node.func, ast.Name) and node.func.id in ("min", "max", "range")
        elif isinstance(node, ast.Subscript):
            self._counts = False
        super().visit(node)
        self._counts = before

    def generic_visit(self, node: ast.AST) -> None:
        for _name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self._visit_body(value)
            elif isinstance(value, list):
                for one in value:
                    if isinstance(one, ast.AST):
                        self.visit(one)
            elif isinstance(value, ast.AST):
                self.visit(value)

    def visit_Module(self, node: ast.Module) -> None:
        self._visit_body(node.body)

    def _visit_body(self, body: list[ast.stmt]) -> None:
        for number, statement in enumerate(body):
            if self._in_function:
                self._without(statement, last=number == len(body) - 1)
            self.visit(statement)

    def _without(self, node: ast.stmt, *, last: bool) -> None:
        """Add the fault that a statement is missing, unless it would be none."""
        # Nested: in a condition, a loop or a `try` in the function.
        nested = node.col_offset > 4 * len(self._scope)
        match node:
            case ast.Raise() | ast.Break() | ast.Delete():
                gone = True
            case ast.Return(value=None | ast.Constant(value=None | False)):
                # At the end of the function the result is the same without it.
                gone = nested and node not in self._tails
            case ast.Return():
                gone = nested
            case ast.Continue():
                gone = not last
            case ast.Expr(value=ast.Call() as call):
                gone = not _IGNORED_CALLS.match(ast.unparse(call.func)) and "super()" not in ast.unparse(call.func)
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
                # A missing attribute from `__init__` is noticed at once.
                gone = not (self._scope[-1] == "__init__" and isinstance(node, ast.Assign))
            case _:
                gone = False
        if gone:
            self._replace(self._start(node), self._end(node), "pass")

    def _condition(self, test: ast.expr) -> None:
        """Add the inverse of a condition, unless a part of it is inverted by another fault."""
        if isinstance(test, ast.Name | ast.Attribute | ast.Call | ast.NamedExpr | ast.Subscript):
            start, end = self._start(test), self._end(test)
            self._replace(start, end, f"(not ({self._source[start:end].decode()}))")

    def _between(self, left: ast.expr, right: ast.expr, token: str, other: str) -> None:
        """Replace an operator between two expressions."""
        start, end = self._end(left), self._start(right)
        pattern = r"\s+".join(map(re.escape, token.split())).encode()
        for found in re.finditer(pattern, self._source[start:end]):
            self._replace(start + found.start(), start + found.end(), other)
            return

    def _replace(self, start: int, end: int, text: str) -> None:
        line = self._source.count(b"\n", 0, start)
        begin, finish = self._offsets[line], self._offsets[line] + len(self._lines[line])
        before = self._source[begin:finish]
        after = self._source[begin:start] + text.encode() + self._source[end : max(end, finish)]
        self.mutants.append(
            Mutant(
                self._path,
                ".".join(self._scope),
                line + 1,
                before.decode().strip(),
                after.decode().splitlines()[0].strip(),
                start - begin,
                start,
                end,
                text,
            )
        )

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._offsets[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._offsets[node.end_lineno - 1] + node.end_col_offset


def _tails(body: list[ast.stmt]) -> set[ast.stmt]:
    """Return the statements that end a function."""
    last = body[-1]
    found = {last}
    blocks: list[list[ast.stmt]] = []
    match last:
        case ast.If():
            blocks = [last.body, last.orelse]
        case ast.With():
            blocks = [last.body]
        case ast.Try():
            blocks = [last.orelse or last.body, *(handler.body for handler in last.handlers)]
    for block in blocks:
        if block:
            found |= _tails(block)
    return found


def _is_text(node: ast.expr) -> bool:
    """Return whether an operation is on strings, as far as it is visible, so part of a message."""
    parts = ast.walk(node)
    return any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str) for part in parts)
