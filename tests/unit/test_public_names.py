"""Names under semantic versioning (docs/stability.md) leave or change only where that is meant.

public_names.txt is changed by hand: a name that is added is a new minor version, one that leaves
needs a row in docs/stability.md and, if it is a field, in recipes/left.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import fd_large
from fd_large.cli.main import COMMANDS
from fd_large.errors import Exit
from fd_large.recipes import registry
from fd_large.recipes.fields import field_names
from fd_large.recipes.run import Run

NAMES = Path(__file__).with_name("public_names.txt")
ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)


def public_names() -> Iterator[str]:
    """Yields commands, exit codes, recipes, fields, and what docs/api.md lists, with arguments."""
    yield from (f"command {name}" for name in COMMANDS)
    yield from (f"exit {code.value} {code.name}" for code in Exit)
    yield from (f"recipe {name}" for name in registry.RECIPES)
    yield from (f"field {name}" for name in field_names(Run))
    yield from (f"python fd_large.{name}" for name in fd_large.__all__)
    yield from python_names("fd_large.Run.from_dict", Run.from_dict.__func__)
    yield from python_names("fd_large.Run.to_dict", Run.to_dict)
    for name, options in DIRECTIVE.findall((ROOT / "docs/api.md").read_text()):
        listed = re.search(r"members: \[(.*)\]", options)
        thing = resolve_name(name)
        if isinstance(thing, ModuleType):
            members = listed[1].split(", ") if listed else own_classes(thing)
            for member in members:
                yield from python_names(f"{name}.{member}", getattr(thing, member))
        else:
            yield from python_names(name, thing)


def own_classes(module: ModuleType) -> list[str]:
    """The public classes that a module defines."""
    classes = inspect.getmembers(module, inspect.isclass)
    return [n for n, c in classes if c.__module__ == module.__name__ and not n.startswith("_")]


def python_names(name: str, thing: Any) -> Iterator[str]:
    """A function with its arguments, or a class with its public methods and theirs."""
    if inspect.isfunction(thing):
        yield f"python {name}({', '.join(inspect.signature(thing).parameters)})"
        return
    yield f"python {name}"
    if name.startswith(("fd_large.errors.", "fd_large.recipes.")):
        return  # Of these the names and the fields are public.
    for member, value in vars(thing).items():
        function = getattr(value, "__func__", value)
        if not member.startswith("_") and inspect.isfunction(function):
            yield from python_names(f"{name}.{member}", function)


def test_public_names_are_those_of_the_list():
    lines = NAMES.read_text().splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    found = set(public_names())
    assert len(found) > 400
    gone, new = sorted(listed - found), sorted(found - listed)
    assert not gone, f"left or changed, which docs/stability.md has to say: {', '.join(gone)}"
    assert not new, f"new: add to public_names.txt by hand: {', '.join(new)}"
    assert lines == sorted(lines), "in the order of `LC_ALL=C sort`"


def test_every_recipe_field_and_argument_is_seen():
    names = set(public_names())
    assert {"recipe quickstart", "field optim.base_lr", "command plan", "exit 2 MISTAKE"} <= names
    assert any(n.startswith("python fd_large.api.distill(out, ") for n in names)
    assert any(n.startswith("python fd_large.runtime.hooks.Hook.") for n in names)
