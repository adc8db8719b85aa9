"""What the tests of a room do not notice: seeded mutants of its functions, each against its tests.

    python .ci/mutate.py ROOM [--number N] [--seed S] [--only 3,17]

ROOM is a folder or a file of the package, such as engine/zero or api.py. A mutant is one small
mistake in a function with logic. It meets the tests of its file, then those that import the file,
then those of its folder, all of tests/unit, in a copy of the working tree; the first that fails
kills it. What only ranks show (tests/integration) is not asked, and a mutant that changes no
behaviour survives by right: whoever runs this reads the survivors.

A stage that takes much longer than with the unchanged file has not ended within its limit, which
counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from changed import Importers, read_tree

OPPOSITE = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
WITH_THE_EDGE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OTHER_SUM = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
LOGIC = (ast.If, ast.Compare, ast.BinOp, ast.BoolOp, ast.For, ast.While, ast.IfExp, ast.Try)
# Calls whose arguments are prose, or have no other order.
TELLS = {"debug", "info", "warning", "warn", "error", "print", "log_once", "warn_once"}
IN_ORDER = {"isinstance", "getattr", "hasattr", "setattr", "min", "max", "transpose"}
# A loop that grows a list without end must not take the machine with it.
MOST_BYTES = 12 << 30
# A busy machine may be three times as slow as it was when the limit was taken.
SLOWER, SECONDS_MORE, LONGEST_SECONDS = 3.0, 30.0, 3600.0
STAGES = ("its own tests", "tests that import it", "tests of its folder")
MOST_IMPORTERS = 6
SURVIVED, RED = "SURVIVED", "NOT ASKED: a test fails without it"
# Pytest's exit codes; the second one says that no test was chosen, such as on a card alone.
PASSED = (0, 5)


@dataclass(frozen=True)
class Mutant:
    """One mistake: the text of bytes `start` to `end` of a file is replaced.

    Attributes:
        file: Path from the root.
        function: Its dotted name.
        line: First line of what is replaced.
        kind: What kind of mistake it is.
    """

    file: str
    function: str
    line: int
    kind: str
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        """Returns the file's text with the mistake in it."""
        data = text.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()

    def diff(self, text: str) -> str:
        """Returns the changed lines, as a diff."""
        before, after = text.splitlines(), self.applied(text).splitlines()
        lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
        return "\n".join(lines)


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """Yields every mutant of a file."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line.encode()) + 1)
    for name, function in _functions(ast.parse(text), ""):
        for kind, node, new in _mistakes(function):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            yield Mutant(file, name, node.lineno, kind, start, end, new)


def draw(texts: dict[str, str], number: int, seed: int) -> list[Mutant]:
    """Draws mutants: long functions more often, each kind as often, no function twice if it can."""
    by_function: dict[tuple[str, str], list[Mutant]] = {}
    for file, text in texts.items():
        for mutant in mutants_of(file, text):
            by_function.setdefault((file, mutant.function), []).append(mutant)
    rng = random.Random(seed)
    drawn: list[Mutant] = []
    waiting: dict[tuple[str, str], list[Mutant]] = {}
    while len(drawn) < number:
        waiting = waiting or {name: list(left) for name, left in by_function.items() if left}
        if not waiting:
            break
        names = list(waiting)
        name = rng.choices(names, [len(by_function[name]) for name in names])[0]
        del waiting[name]
        kinds = sorted({mutant.kind for mutant in by_function[name]})
        kind = rng.choice(kinds)
        mutant = rng.choice([mutant for mutant in by_function[name] if mutant.kind == kind])
        by_function[name].remove(mutant)
        drawn.append(mutant)
    return drawn


def main(arguments: list[str]) -> int:
    """Prints what became of each mutant; returns 1 if tests fail without one."""
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__.splitlines()[0])
    parser.add_argument("room", help="a folder or a file of fd_large, such as engine/zero")
    parser.add_argument("--number", type=int, default=20, help="of mutants (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--only", default="", help="numbers of the draw, such as 3,17")
    options = parser.parse_args(arguments)
    texts = read_tree(Path())
    room = f"fd_large/{options.room.strip('/')}"
    inside = {f: text for f, text in texts.items() if f == room or f.startswith(f"{room}/")}
    if not inside:
        parser.error(f"no files in {room}")
    drawn = draw(inside, options.number, options.seed)
    chosen = {int(number) for number in options.only.split(",") if number}
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tests = _Tests(Path(folder), texts)
        ends: Counter[str] = Counter()
        for number, mutant in enumerate(drawn):
            if chosen and number not in chosen:
                continue
            end = tests.meet(mutant)
            ends[end] += 1
            print(f"{number:3} {mutant.file}:{mutant.line} {mutant.kind}: {end}", flush=True)
            if end == SURVIVED:
                print(mutant.diff(texts[mutant.file]), flush=True)
    parts = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    print(f"{room}, seed {options.seed}: {ends.total()} mutants of {len(drawn)}: {parts}")
    return int(RED in ends)


class _Tests:
    """A copy of the working tree, and its tests in children with the libraries loaded."""

    def __init__(self, folder: Path, texts: dict[str, str]) -> None:
        self.folder, self.tree, self.texts = folder, folder / "tree", texts
        self.importers = Importers(texts)
        self.limits: dict[tuple[str, ...], float | None] = {}
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
        for name in filter(os.path.isfile, names.splitlines()):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, self.tree / name)
        (folder / "home").mkdir()
        os.chdir(self.tree)
        os.environ |= {
            "PYTHONPATH": str(self.tree),
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DS_ACCELERATOR": "cpu",
        }
        sys.dont_write_bytecode = True
        sys.path[0] = str(self.tree)
        # Children find them loaded, and import nothing but the package and its tests.
        import deepspeed  # noqa: F401
        import timm  # noqa: F401
        import torchvision.transforms.v2  # noqa: F401

    def meet(self, mutant: Mutant) -> str:
        """Returns who killed it, SURVIVED or RED."""
        path = self.tree / mutant.file
        for stage, tests in zip(STAGES, self._stages(mutant.file), strict=True):
            if not tests:
                continue
            limit_seconds = self._limit(tests)
            if limit_seconds is None:
                return RED
            path.write_text(mutant.applied(self.texts[mutant.file]))
            try:
                code = self._run(tests, limit_seconds)
            finally:
                path.write_text(self.texts[mutant.file])
            if code is None:
                return f"never ended in {stage}"
            if code not in PASSED:
                return f"killed by {stage}"
        return SURVIVED

    def _stages(self, file: str) -> list[tuple[str, ...]]:
        nearest = self.importers.tests_of(file)
        own = (mirror,) if (mirror := self.importers.mirror(file)) else ()
        named = [test for test in nearest if test not in own and "/test_house" not in test]
        importing = tuple(named[:MOST_IMPORTERS])
        folder = Path("tests/unit", *Path(file).parts[1:-1])
        rest = ()
        if folder != Path("tests/unit") and folder.is_dir():
            rest = (str(folder), *(f"--ignore={test}" for test in sorted({*own, *importing})))
        return [own, importing, rest]

    def _limit(self, tests: tuple[str, ...]) -> float | None:
        """Returns how long tests may take with a mutant; None if they fail without one."""
        if tests not in self.limits:
            began = time.monotonic()
            passed = self._run(tests, LONGEST_SECONDS) in PASSED
            seconds = SLOWER * (time.monotonic() - began) + SECONDS_MORE
            self.limits[tests] = seconds if passed else None
        return self.limits[tests]

    def _run(self, tests: tuple[str, ...], limit_seconds: float) -> int | None:
        """Returns pytest's exit code; None if it did not end in time."""
        base = self.folder / "base"
        child = os.fork()
        if child == 0:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = 70
            try:
                import pytest

                options = ["-x", "-p", "no:cacheprovider", f"--basetemp={base}"]
                code = int(pytest.main([*options, *tests]))
            finally:
                sys.stdout.flush()
                os._exit(code)
        end = time.monotonic() + limit_seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None


# ------------------------------------------------------------------------------------------------


def _functions(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yields the functions with logic of a file or a class, by their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{inside}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and any(
            isinstance(part, LOGIC) for part in ast.walk(child)
        ):
            yield f"{inside}{child.name}", child


def _mistakes(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """Yields kinds of mistakes with the node that each replaces and its new text."""
    for node in _living(function):
        match node:
            case ast.Compare(ops=[operator]):
                for kind, table in (("comparison", OPPOSITE), ("off by one", WITH_THE_EDGE)):
                    if type(operator) in table:
                        yield kind, node, _with(node, ops=[table[type(operator)]()])
            case ast.BinOp() if type(node.op) in OTHER_SUM and not _is_text(node):
                yield "arithmetic", node, _with(node, op=OTHER_SUM[type(node.op)]())
            case ast.BoolOp():
                other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
                yield "and, or", node, _with(node, op=other)
            case ast.UnaryOp(op=ast.Not()):
                yield "not", node, f"({ast.unparse(node.operand)})"
            case ast.Constant(value=bool() as value):
                yield "constant", node, str(not value)
            case ast.Constant(value=int() as value):
                yield "constant", node, str(value + 1)
            case ast.Constant(value=float() as value):
                yield "constant", node, repr(value * 2 or 0.1)
            case ast.If(test=test) | ast.IfExp(test=test):
                yield "condition", test, "True"
                yield "condition", test, "False"
            case ast.Call():
                yield from _wrong_calls(node)
            case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break():
                yield "statement dropped", node, "pass"
            case ast.Expr(value=ast.Call()):
                yield "statement dropped", node, "pass"
    yield from _early_returns(function)


def _wrong_calls(call: ast.Call) -> Iterator[tuple[str, ast.expr, str]]:
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    for keyword in call.keywords:
        if keyword.arg:
            rest = [other for other in call.keywords if other is not keyword]
            yield "argument dropped", call, _with(call, keywords=rest)
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    if len(call.args) > 1 and name not in IN_ORDER:
        first, second, *rest = call.args
        if ast.dump(first) != ast.dump(second):
            yield "swapped arguments", call, _with(call, args=[second, first, *rest])
    if name == "range":
        at = min(len(call.args) - 1, 1)
        less = ast.BinOp(call.args[at], ast.Sub(), ast.Constant(1))
        yield "off by one", call, _with(call, args=[*call.args[:at], less, *call.args[at + 1 :]])


def _early_returns(function: ast.FunctionDef) -> Iterator[tuple[str, ast.stmt, str]]:
    """Yields a return in place of a statement, where the function returns nothing."""
    parts = list(ast.walk(function))
    returns = any(isinstance(part, ast.Return) and part.value for part in parts)
    if returns or any(isinstance(part, ast.Yield | ast.YieldFrom) for part in parts):
        return
    for statement in function.body[1:]:
        yield "early return", statement, "return"


def _living(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yields the nodes that run and decide something: no annotation, message or docstring."""
    waiting: list[ast.AST] = [*function.args.defaults, *filter(None, function.args.kw_defaults)]
    waiting += function.body
    while waiting:
        node = waiting.pop(0)
        match node:
            case ast.JoinedStr() | ast.Assert() | ast.Expr(value=ast.Constant()):
                continue
            case ast.Call() if getattr(node.func, "attr", getattr(node.func, "id", "")) in TELLS:
                continue
        yield node
        match node:
            case ast.Raise():
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                waiting += node.body
            case ast.AnnAssign():
                waiting += [node.value] if node.value else []
            case _:
                waiting += ast.iter_child_nodes(node)


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _with(node: ast.expr, **changes: object) -> str:
    """Returns the text of a node with some of its fields changed, in brackets."""
    other = copy.copy(node)
    for field, value in changes.items():
        setattr(other, field, value)
    text = ast.unparse(ast.fix_missing_locations(other))
    return text if isinstance(node, ast.Call) else f"({text})"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
