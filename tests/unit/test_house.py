"""The house: rooms import from lower floors only, and heavy packages stay in their rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fd_large"
FLOORS = {
    "errors": 0,
    "launch": 0,
    "watch": 0,
    "distributed": 0,
    "kernels": 0,
    "recipes": 0,
    "backbones": 1,
    "plan": 1,
    "weights": 2,
    "data": 2,
    "checkpoint": 3,
    "runtime": 3,
    "report": 4,
    "engine": 4,
    "probes": 4,
    "tasks": 5,
    "diagnose": 6,
    "cli": 7,
    "__main__": 8,
    "train": 8,
}
FOR_ALL = {"errors", "distributed"}
ONLY_IN = {
    "deepspeed": {"engine", "checkpoint"},
    "apex": {"kernels", "engine"},
    "fairscale": {"engine"},
}
WITHOUT_TORCH = {"recipes", "plan", "errors", "launch", "watch", "report", "cli"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fd_large":
                yield from (f"fd_large.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_come_from_lower_floors(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "fd_large" and len(parts) > 1:
            there = parts[1]
            allowed = there == here or there in FOR_ALL or FLOORS[there] < FLOORS[here]
            # launch and watch are parts of distributed; the engine names the launch's type.
            if here == "distributed" and there in ("launch", "watch"):
                allowed = True
            assert allowed, f"{here} (floor {FLOORS[here]}) imports {name}"
        if parts[0] in ONLY_IN:
            assert here in ONLY_IN[parts[0]], f"{here} imports {parts[0]}"
        if parts[0] == "triton":
            assert path.name.endswith("_triton.py")


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room(path) in WITHOUT_TORCH],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_torch_is_not_imported_where_help_must_be_quick(path: Path) -> None:
    heavy = {"torch", "torchvision", "timm", "deepspeed", "fd_large.distributed"}
    found = {name for name in imports(path, top_level=True)} & heavy
    assert not found


def test_no_cycles_inside_a_room() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = "fd_large." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[module] = {
            name
            for found in imports(path, top_level=True)
            for name in (found, found.rpartition(".")[0])
        }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done or module not in graph:
            return
        for other in graph[module]:
            if other in graph and other != module:
                visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_no_room_without_a_name() -> None:
    nameless = {"utils", "util", "helpers", "common", "misc", "tools"}
    assert not [path for path in FILES if {path.stem, *path.parts} & nameless]
