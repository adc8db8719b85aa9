"""Size of the package by room, and what the working tree changes against the last commit.

    python .ci/size.py [COMMIT]

Code lines are lines with code on them: no docstring, no comment, no blank line. A file has one
importer if exactly one other file of the package imports it. COMMIT is what the working tree is
compared with, HEAD if it is left out.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

LONG = 60
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
TREES = ("fd_large", "tests", "benchmarks", "examples")
# What a reader of the method and the engine opens first: docs/architecture.md.
CORE = {
    "engine": "fd_large/engine/*.py",
    "engine/zero": "fd_large/engine/zero/*.py",
    "distillation": "fd_large/tasks/distillation/*.py",
    "ViT": "fd_large/backbones/vit/*.py",
    "SwinV2": "fd_large/backbones/swinv2/*.py",
    "layers": "fd_large/backbones/*.py",
}


@dataclass(frozen=True)
class Size:
    """Counts of one file, or of a room.

    Attributes:
        files: Number of files.
        code: Lines with code.
        imports: Lines of import statements among them.
        long: Functions of more than LONG lines.
    """

    files: int = 0
    code: int = 0
    imports: int = 0
    long: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.files + other.files,
            self.code + other.code,
            self.imports + other.imports,
            self.long + other.long,
        )


@cache
def size_of(text: str) -> Size:
    """Counts the lines of one Python file."""
    tree = ast.parse(text)
    docstrings: set[int] = set()
    imports = long = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstrings |= {
                line
                for statement in node.body
                if isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
                for line in _lines(statement)
            }
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long += len(_lines(node)) > LONG
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports += len(_lines(node))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return Size(1, len(code - docstrings), imports, long)


def imported_by(texts: dict[str, str]) -> dict[str, set[str]]:
    """Returns the files that import each file of the package, __init__.py aside."""
    importers: dict[str, set[str]] = defaultdict(set)
    modules = {
        name.removesuffix(".py").replace("/", "."): name
        for name in texts
        if name.startswith("fd_large/") and not name.endswith("__init__.py")
    }
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                reached = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                reached = [alias.name for alias in node.names]
            else:
                continue
            for module in reached:
                if modules.get(module, name) != name:
                    importers[modules[module]].add(name)
    return importers


def room_of(name: str) -> str:
    """Returns the room of a file: fd_large's folders one by one, other trees as a whole."""
    parts = PurePosixPath(name).parts
    if parts[0] != "fd_large":
        return parts[0]
    if len(parts) == 2:
        return "fd_large/*.py"
    deep = 3 if parts[1] == "tasks" and len(parts) > 3 else 2
    return "/".join(parts[1:deep])


def main(arguments: list[str]) -> int:
    """Prints the table and the differences."""
    commit = (arguments or ["HEAD"])[0]
    now = dict(_working_tree())
    before = dict(_committed(commit))
    rooms, old_rooms = _by_room(now), _by_room(before)
    importers = imported_by(
        {name: text for name, text in now.items() if name.startswith("fd_large")}
    )
    single = Counter(room_of(name) for name, files in importers.items() if len(files) == 1)
    print(
        f"{'room':<24}{'files':>6}{'code':>8}{'change':>8}{'imports':>9}"
        f"{f'> {LONG} lines':>12}{'one importer':>14}"
    )
    package = old_package = Size()
    for room in sorted(rooms.keys() | old_rooms.keys(), key=lambda room: (room in TREES, room)):
        size, old = rooms.get(room, Size()), old_rooms.get(room, Size())
        if room not in TREES:
            package, old_package = package + size, old_package + old
        _print_row(room, size, old, single[room])
    _print_row("fd_large in all", package, old_package, single.total())
    core = {
        label: sum(
            (size_of(text) for name, text in now.items() if PurePosixPath(name).match(pattern)),
            Size(),
        ).code
        for label, pattern in CORE.items()
    }
    parts = ", ".join(f"{label} {lines:,}" for label, lines in core.items())
    print(f"core: {sum(core.values()):,} code lines ({parts})")
    print(f"tests: {rooms['tests'].code / package.code:.2f} of the package's code lines")
    print(f"change: the working tree against {commit}")
    return 0


# ------------------------------------------------------------------------------------------------


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _by_room(texts: dict[str, str]) -> dict[str, Size]:
    rooms: dict[str, Size] = defaultdict(Size)
    for name, text in texts.items():
        rooms[room_of(name)] += size_of(text)
    return rooms


def _print_row(room: str, size: Size, old: Size, single: int) -> None:
    change = f"{size.code - old.code:+,}" if size.code != old.code else ""
    share = f"{100 * size.imports / size.code:.1f} %" if size.code else ""
    print(
        f"{room:<24}{size.files:>6}{size.code:>8,}{change:>8}{share:>9}{size.long:>12}"
        f"{single or '':>14}"
    )


def _working_tree() -> Iterator[tuple[str, str]]:
    for tree in TREES:
        for path in sorted(Path(tree).rglob("*.py")):
            yield path.as_posix(), path.read_text(encoding="utf-8")


def _committed(commit: str) -> Iterator[tuple[str, str]]:
    """Yields the Python files of a commit: one process of git reads them all."""
    listing = ["git", "ls-tree", "-r", "--name-only", commit, *TREES]
    answer = subprocess.run(listing, capture_output=True, text=True, check=True)
    names = [name for name in answer.stdout.splitlines() if name.endswith(".py")]
    wanted = "".join(f"{commit}:{name}\n" for name in names)
    batch = subprocess.run(
        ["git", "cat-file", "--batch"], input=wanted.encode(), capture_output=True, check=True
    ).stdout
    for name in names:
        header, batch = batch.split(b"\n", 1)
        length = int(header.rsplit(b" ", 1)[1])
        yield name, batch[:length].decode()
        batch = batch[length + 1 :]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
