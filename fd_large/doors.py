"""Doors: code of the user's own in the place of a built-in loss, backbone, optimiser and so on.

Where a recipe names a thing, the name is one of

- a built-in name,
- `module:PATH/TO/FILE.py:NAME`, a name in a file; a relative path starts at the current folder,
- `module:package.module:NAME`, a name in a module on Python's path,
- the name of an entry point that an installed package has in the group `fd_large.KIND`.

A file is imported only if it was allowed in this process: the command line allows what it names
(`allow_named`), and a resumed run allows the files that have not changed since it wrote their
hashes. So no recipe that came from elsewhere runs code. Entry points need no permission: whoever
installed the package has given it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from fd_large.errors import ConfigError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

Kind = Literal[
    "losses", "heads", "normalisers", "backbones", "sources", "tasks", "optimisers", "trackers"
]

PREFIX = "module:"
FORMS = "module:PATH/TO/FILE.py:NAME, module:package.module:NAME or a name from an installed plugin"
"""What a name can be besides a built-in one, for help texts and messages."""

_NAMED = re.compile(rf"(?:^|=)({PREFIX}.+)$")

log = logging.getLogger(__name__)

_allowed: set[Path] = set()
_modules: dict[Path, ModuleType] = {}
_imported: dict[Path | None, str] = {}
# Files and folders of entry points, which stand among libraries that are not the user's affair.
_plugins: set[str] = set()
_LIBRARIES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_NOT_THEIRS = tuple(f"{Path(file).resolve().parent}{os.sep}" for file in (__file__, os.__file__))


def is_own(source: str) -> bool:
    """Returns whether a name is one of the two `module:` forms."""
    return source.startswith(PREFIX)


def absolute(source: str) -> str:
    """Returns a name with the path of its file made absolute; any other name as it is."""
    where, name = _split(source)
    if not is_own(source) or not _is_path(where):
        return source
    return f"{PREFIX}{Path(where).expanduser().resolve()}:{name}"


def allow(source: str | os.PathLike[str]) -> None:
    """Allows the import of a file in this process.

    Args:
        source: A `module:` name, or the path of a file. What names no file is ignored here, and
            refused by `load`.
    """
    path = file_of(source) if isinstance(source, str) and is_own(source) else Path(source)
    if path is not None:
        _allowed.add(path.expanduser().resolve())


def is_allowed(source: str) -> bool:
    """Returns whether the file of a `module:` name is there and may be imported."""
    return file_of(source) in _allowed


def allow_named(arguments: Iterable[str]) -> None:
    """Allows the files that a command line names, as `module:...` or `NAME=module:...`."""
    for argument in arguments:
        if match := _NAMED.search(argument):
            allow(match[1])


def allow_unchanged(recorded: Mapping[str, str]) -> None:
    """Allows the files that still have the hash that a run of the user's own has recorded.

    Args:
        recorded: {"module:...": SHA-256}, of `hashes`.
    """
    for source, digest in recorded.items():
        if is_own(source) and digest and _hash(file_of(source)) == digest:
            allow(source)


def require_allowed(named: Mapping[str, str]) -> None:
    """Refuses files that nobody has allowed, all of them at once.

    Args:
        named: What a recipe names, by its field; built-in names and absent files are passed over.

    Raises: ConfigError: naming the files.
    """
    refused = {
        where: path
        for where, source in named.items()
        if is_own(source) and (path := file_of(source)) is not None and path not in _allowed
    }
    if refused:
        files = " ".join(map(str, dict.fromkeys(refused.values())))
        raise ConfigError(
            f"{', '.join(refused)}: code that nobody has allowed to run; got {files}, expected "
            f"files that this command line names. Read them, then add --allow-code {files}."
        )


def complaint(source: str, where: str) -> str:
    """Returns what is wrong with a `module:` name as far as its file's text shows; empty: nothing.

    Nothing is imported.

    Args:
        source: The name; any other name is passed over.
        where: The field that the user set, for the message.
    """
    if not is_own(source):
        return ""
    module_name, name = _split(source)
    if not module_name or not name.isidentifier():
        return f"{where}: an incomplete name; got {source!r}, expected {FORMS}. Complete it."
    path = file_of(source)
    if path is None:
        return (
            f"{where}: no such file; got {module_name}, expected a Python file or a module on "
            "Python's path. Correct the path, or set PYTHONPATH."
        )
    names = _names_in(path)
    return _no_name(where, path, name, names) if names and name not in names else ""


def load(source: str, *, kind: Kind, where: str, built_in: Mapping[str, Any] | None = None) -> Any:
    """Returns the thing that a name stands for; a file is imported once in a process.

    Args:
        source: The name.
        kind: What is wanted; entry points are looked for in the group `fd_large.KIND`.
        where: The field that the user set, for messages.
        built_in: The things that need no import, by name.

    Raises: ConfigError: if there is no such thing, its import fails, or its file is not allowed.
    """
    known = built_in or {}
    if source in known:
        return known[source]
    if is_own(source):
        return _own(source, where)
    plugins = installed(kind)
    if source not in plugins:
        if ":" in source or _is_path(source):
            form = source if ":" in source else f"{source}:NAME"
            raise ConfigError(
                f"{where}: a file or module without {PREFIX!r} before it; got {source!r}, expected "
                f"{PREFIX}{form}. Put {PREFIX} in front."
            )
        raise ConfigError(
            f"{where}: no such name in {kind}; got {source!r}, "
            f"{nearest(source, [*known, *plugins])}. Take one of these, or {FORMS}."
        )
    value = plugins[source].value
    if path := file_of(f"{PREFIX}{value}"):
        alone = path.parent.name.endswith("-packages")
        _plugins.add(str(path) if alone else f"{path.parent}{os.sep}")
    try:
        return plugins[source].load()
    except Exception as error:  # The package's code may raise anything.
        what = f"{source} = {value} of the entry points fd_large.{kind}"
        raise _failed(where, what, error) from error


def cause(error: Exception) -> str:
    """Returns "TYPE: text in FILE line N", one line, of what code of the user's own raised.

    FILE is the innermost that is the user's, also where a library raised; it is left out if there
    is none.
    """
    log.debug("code of the user's own failed", exc_info=error)
    text, places = str(error), traceback.extract_tb(error.__traceback__)
    found = [(place.filename, place.lineno) for place in places if _is_theirs(place.filename)]
    if isinstance(error, SyntaxError) and _is_theirs(error.filename or "<"):
        text, found = error.msg, [(error.filename or "", error.lineno)]
    first = next(iter(text.splitlines()), "")
    line = "".join(f" in {file} line {number}" for file, number in found[-1:])
    return f"{type(error).__name__}{': ' if first else ''}{first}{line}"


def installed(kind: Kind) -> dict[str, EntryPoint]:
    """Returns what installed packages bring of a kind, by name; imports nothing of theirs."""
    found = _entry_points(tuple(sys.path)).select(group=f"fd_large.{kind}")
    return {point.name: point for point in found}


@lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> EntryPoints:
    """What packages on the path bring, of any kind; all of them are read for it."""
    from importlib.metadata import entry_points  # Slow to import, and rarely needed.

    return entry_points()


def file_of(source: str) -> Path | None:
    """Returns the file of a `module:` name, imports nothing; None where there is none."""
    where, _ = _split(source)
    if _is_path(where):
        path = Path(where).expanduser().resolve()
        return path if path.is_file() else None
    spec = _spec_of(where)
    if spec is None or not spec.has_location or not spec.origin:
        return None
    return Path(spec.origin).resolve()


def hashes(tree: Any) -> dict[str, str]:
    """Returns {name: SHA-256 of its file} of the code that a recipe's plain form names.

    The hash of a file that this process has imported is that of what it imported; a file that is
    not there has the hash "". Entry points count too. Nothing is imported.

    Args:
        tree: Dicts, lists and values.
    """
    plugins = {name: point for kind in get_args(Kind) for name, point in installed(kind).items()}
    found: dict[str, str] = {}
    for text in _texts(tree):
        if is_own(text):
            path = file_of(text)
        elif text in plugins:
            path = file_of(f"{PREFIX}{plugins[text].value}")
        else:
            continue
        found[text] = _imported.get(path) or _hash(path)
    return found


# ------------------------------------------------------------------------------------------------


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _texts(value)


def _split(source: str) -> tuple[str, str]:
    where, _, name = source.removeprefix(PREFIX).rpartition(":")
    return where, name


def _is_path(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _hash(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def _own(source: str, where: str) -> Any:
    module_name, name = _split(source)
    path = file_of(source)
    if path is None or not name.isidentifier():
        raise ConfigError(complaint(source, where))
    require_allowed({where: source})
    try:
        if path not in _modules:
            is_file = _is_path(module_name)
            _modules[path] = _from_file(path) if is_file else importlib.import_module(module_name)
    except Exception as error:  # The user's code may raise anything.
        raise _failed(where, str(path), error) from error
    module = _modules[path]
    if not hasattr(module, name):
        raise ConfigError(_no_name(where, path, name, vars(module)))
    return getattr(module, name)


def _no_name(where: str, path: Path, name: str, names: Iterable[str]) -> str:
    # A file that only imports is answered by what it imports.
    defined, everything = (
        [known for known in some if not known.startswith("_")]
        for some in (set(_defined_in(_tree(path))), names)
    )
    told = nearest(name, defined or everything)
    return f"{where}: no such name in {path}; got {name!r}, {told}. Correct it."


def _names_in(path: Path) -> set[str]:
    """Returns all names that a file gives to anything; empty where its text does not show them."""
    found: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    # These make names that no text shows.
    return set() if found & {"*", "__getattr__", "globals", "exec", "vars", "setattr"} else found


def _defined_in(node: ast.AST) -> Iterator[str]:
    """Names of functions, classes and assignments of a module, without those inside of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(
            child, ast.stmt | ast.ExceptHandler | ast.match_case | ast.Tuple | ast.List
        ):
            yield from _defined_in(child)


def _tree(path: Path) -> ast.Module:
    """Returns the parsed text of a file; without statements where that cannot be had."""
    try:
        if path.suffix == ".py":
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        pass
    return ast.Module([], [])


def _failed(where: str, what: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{where}: cannot be imported; got {cause(error)}, expected {what} to be imported without "
        "an error. Correct the file, or install what it needs."
    )


def _is_theirs(file: str) -> bool:
    real = os.path.realpath(file)
    if real.startswith(tuple(_plugins)):
        return True
    return not (file.startswith("<") or real.startswith(_NOT_THEIRS) or _LIBRARIES.search(real))


def _from_file(path: Path) -> ModuleType:
    # A name of its own, so that two files of the same name do not meet.
    name = f"fd_large_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses and pickle look modules up there.
    try:
        # Not by the loader, which may run a cached compilation of an older text.
        text = path.read_bytes()
        _imported[path] = hashlib.sha256(text).hexdigest()
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _spec_of(name: str) -> ModuleSpec | None:
    """Returns where a module would come from, without importing the packages above it."""
    first, *rest = name.split(".")
    try:
        spec = find_spec(first) if first else None
    except ValueError:  # A module without a spec, such as __main__.
        return None
    path = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))
    return spec
