"""Doors: the user's own code instead of a built-in loss, backbone, optimiser and so on.

A name in a recipe is one of

- a built-in name,
- `module:PATH/TO/FILE.py:NAME`, a name in a file; a relative path starts at the current folder,
- `module:package.module:NAME`, a name in a module on Python's path,
- the name of an entry point that an installed package has in the group `fd_large.KIND`.

Code runs only if the command line of this process has the code's name (`allow_named`) or file
(`--allow-code`), or if name and hash are in the user's own list (`allowed_code`), to which such
command lines add them. Recipes, run folders and checkpoints allow nothing, since they may come from
others. Therefore `slurm/resume.sh` marks the names that it takes from a run folder by the prefix
`UNNAMED` instead of `module:`. Entry points need no permission beyond the installation of their
package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from fd_large import allowed_code
from fd_large.errors import ConfigError, FDError, nearest
from fd_large.files import kind_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

Kind = Literal[
    "losses",
    "heads",
    "normalisers",
    "backbones",
    "sources",
    "tasks",
    "optimisers",
    "trackers",
    "protocols",
]

PREFIX = "module:"
UNNAMED = "stored-module:"
"""Stands for `module:` on a command line, in a name that the line does not allow."""
SCHEME = re.compile(r"[A-Za-z][\w.+-]*:")
"""Beginning of names that are no paths: hf:REPO, builtin:NAME, s3://..., module:FILE.py:NAME."""
FORMS = "module:PATH/TO/FILE.py:NAME, module:package.module:NAME or a name from an installed plugin"
"""What a name can be besides a built-in one, for help texts and messages."""

_NAMED = re.compile(rf"(?:^|=)({PREFIX}.+)$")
_UNNAMED = re.compile(rf"(?:^|(?<==)){UNNAMED}")

log = logging.getLogger(__name__)

# Files of which every name may run, names, and names of files that have a certain hash.
_files: set[Path] = set()
_names: set[str] = set()
_unchanged: set[tuple[str, str]] = set()
# Whether what this command line allows is added to the user's list.
_remembers = False
_modules: dict[Path, ModuleType] = {}
# SHA-256 of the text that this process has run.
_imported: dict[Path, str] = {}
# Models whose code has changed, with the name of that code.
_warned: set[tuple[str, str]] = set()
# Files and folders of entry points, which stand among libraries that are not the user's affair.
_plugins: set[str] = set()
_LIBRARIES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_NOT_THEIRS = tuple(f"{Path(file).resolve().parent}{os.sep}" for file in (__file__, os.__file__))


def is_own(source: str) -> bool:
    """Whether `source` begins with `module:`, and therefore names the user's own code."""
    return source.startswith(PREFIX)


def absolute(source: str) -> str:
    """Returns a `source` of the form `module:FILE.py:NAME` with the absolute path of FILE.py.

    Any other name is returned unchanged.
    """
    where, name = _split(source)
    if not is_own(source) or not _is_path(where):
        return source
    return f"{PREFIX}{_real(where)}:{name}"


def allow(source: str | os.PathLike[str]) -> None:
    """Allows code in this process, because the user has named it.

    Args:
        source: A `module:` name, to allow this name alone; or the path of a file, to allow every
            name in the file.
    """
    if isinstance(source, str) and is_own(source):
        _names.add(absolute(source))
    else:
        _files.add(_real(os.fspath(source)))


def is_allowed(source: str) -> bool:
    """Whether the file of the `module:` name `source` exists and the name may be imported."""
    path = file_of(source)
    return path is not None and _is_permitted(source, path)


def reset() -> None:
    """Forgets all permissions and imported modules, as if the process were new."""
    global _remembers
    _remembers = False
    for known in (_files, _names, _unchanged, _modules, _imported, _warned):
        known.clear()


def allow_named(arguments: Iterable[str], *, remember: bool = False) -> None:
    """Allows the code named in arguments of the form `module:...` or `NAME=module:...`.

    Args:
        arguments: Arguments of the command line.
        remember: Whether to add allowed code to the user's list when it is imported. Only one rank
            of a run should set this.
    """
    global _remembers
    _remembers = remember
    for argument in arguments:
        if match := _NAMED.search(argument):
            allow(match[1])


def plain_names(arguments: Iterable[str]) -> list[str]:
    """Returns `arguments`, those of a command line, with `module:` in place of `UNNAMED`.

    The prefix `UNNAMED` marks a name of code that was read from a run's folder, and that the user
    has therefore not allowed by naming it.
    """
    return [_UNNAMED.sub(PREFIX, argument) for argument in arguments]


def allow_unchanged(checked: Mapping[str, str]) -> None:
    """Allows names that the parent process has allowed, as long as their files are unchanged.

    The caller must not read `checked` from a run folder, since a run folder may come from others.

    Args:
        checked: {"module:...": SHA-256 of its file}, as `hashes` returns it.
    """
    _unchanged.update((absolute(name), digest) for name, digest in checked.items())


def require_allowed(named: Mapping[str, str]) -> None:
    """Refuses a recipe that names code without permission.

    Args:
        named: The recipe's names by field; built-in names and missing files are ignored.

    Raises: ConfigError: with the fields and the files of all refused names.
    """
    refused = {
        where: path
        for where, source in named.items()
        if is_own(source)
        and (path := file_of(source)) is not None
        and not _is_permitted(source, path)
    }
    if refused:
        raise _not_allowed(refused)


def complaint(source: str, where: str) -> str:
    """Returns a message if a `module:` name is incomplete or does not exist, or else "".

    The file is parsed, and not imported. If its names cannot be listed, the result is "", too.

    Args:
        source: The name; a name of another form gives "".
    """
    if not is_own(source):
        return ""
    module_name, name = _split(source)
    if not module_name or not name.isidentifier():
        return f"{where}: an incomplete name; got {source!r}, expected {FORMS}. Complete the name."
    path = file_of(source)
    if path is None:
        try:
            if _is_path(module_name):
                kind_of(os.path.expanduser(module_name), where=where)
        except FDError as error:
            return str(error)
        return (
            f"{where}: no such file; got {module_name}, expected a Python file or a module on "
            "Python's path. Correct the path, put the file or a link to it there, or set "
            "PYTHONPATH."
        )
    names = _names_in(path)
    return _no_name(where, path, name, names) if names and name not in names else ""


def require_known(source: str, *, kind: Kind, where: str, built_in: Collection[str]) -> None:
    """Refuses an unknown name; imports nothing, so a name that only an import creates passes.

    Args:
        source: The name.
        kind: Kind of code; entry points are searched in the group `fd_large.KIND`.
        built_in: The built-in names of this kind.

    Raises: ConfigError: with the nearest names.
    """
    if source in built_in:
        return
    if is_own(source):
        if message := complaint(source, where):
            raise ConfigError(message)
        return
    plugins = installed(kind)
    if source in plugins:
        return
    if ":" in source or _is_path(source):
        form = source if ":" in source else f"{source}:NAME"
        raise ConfigError(
            f"{where}: a file or module without {PREFIX!r} before it; got {source!r}, expected "
            f"{PREFIX}{form}. Write {PREFIX} before the name."
        )
    raise ConfigError(
        f"{where}: no such name in {kind}; got {source!r}, "
        f"{nearest(source, [*built_in, *plugins])}. Use one of these, or {FORMS}."
    )


def refuse_scheme(
    source: str, schemes: Collection[str], *, where: str, of: type[FDError]
) -> NoReturn:
    """Raises the error for a source with an unknown prefix, or a name of code without `module:`.

    Args:
        source: The name, which is not an existing path.
        schemes: The known prefixes of sources, such as "hf:".
        of: Class of the error.
    """
    start = f"{source.partition(':')[0]}:"
    if "." in start:  # FILE.py:NAME or package.module:NAME
        require_known(source, kind="sources", where=where, built_in=())
    raise of(
        f"{where}: no such kind of source; got {source!r}, {nearest(start, schemes)}. Correct the "
        "part before the colon, or name a file or a folder."
    )


def load(source: str, *, kind: Kind, where: str, built_in: Mapping[str, Any] | None = None) -> Any:
    """Returns the object that a name stands for; a process imports each file once.

    Args:
        source: The name.
        kind: Kind of code; entry points are searched in the group `fd_large.KIND`.
        built_in: The built-in objects by name, which need no import.

    Raises: ConfigError: if the object does not exist, its import fails, or its file is not allowed.
    """
    known = built_in or {}
    if source in known:
        return known[source]
    if is_own(source):
        return _own(source, where)
    require_known(source, kind=kind, where=where, built_in=known)
    plugins = installed(kind)
    value = plugins[source].value
    if path := file_of(f"{PREFIX}{value}"):
        alone = path.parent.name.endswith("-packages")
        _plugins.add(str(path) if alone else f"{path.parent}{os.sep}")
    try:
        return plugins[source].load()
    except Exception as error:  # The package's code may raise anything.
        subject = f"{source} = {value} of the entry points fd_large.{kind}"
        raise _failed(where, subject, error) from error


def cause(error: Exception) -> str:
    """Returns an exception of the user's own code as a line, "TYPE: text in FILE line N".

    FILE is the innermost file of the user's in the traceback, even if a library raised the
    exception. Without a file of the user's, the line ends after the text.
    """
    log.debug("code of the user's own failed", exc_info=error)
    text, places = str(error), traceback.extract_tb(error.__traceback__)
    positions = [(place.filename, place.lineno) for place in places if _is_theirs(place.filename)]
    if isinstance(error, SyntaxError) and _is_theirs(error.filename or "<"):
        text, positions = error.msg, [(error.filename or "", error.lineno)]
    first = next(iter(text.splitlines()), "")
    line = "".join(f" in {file} line {number}" for file, number in positions[-1:])
    return f"{type(error).__name__}{': ' if first else ''}{first}{line}"


def installed(kind: Kind) -> dict[str, EntryPoint]:
    """Returns the entry points of the group `fd_large.KIND`, {name: entry point}.

    KIND is `kind`. The packages that define the entry points are not imported.
    """
    points = _entry_points(tuple(sys.path)).select(group=f"fd_large.{kind}")
    return {point.name: point for point in points}


@lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> EntryPoints:
    """Returns all entry points of the packages on Python's path, of every group.

    Args:
        path: Python's path, as the key of the cache; the metadata of all its packages is read.
    """
    from importlib.metadata import entry_points  # Slow to import, and rarely needed.

    return entry_points()


def file_of(source: str) -> Path | None:
    """Returns the file of the `module:` name `source`, without importing it.

    The result is None if no such file or module exists, or if the module is not made from a file.
    """
    where, _ = _split(source)
    if _is_path(where):
        path = _real(where)
    else:
        spec = _spec_of(where)
        if spec is None or not spec.has_location or not spec.origin:
            return None
        path = _real(spec.origin)
    return path if os.path.isfile(path) else None


def hashes(tree: Any) -> dict[str, str]:
    """Returns {name: SHA-256 of its file} for each name of code in a recipe.

    Names are those with `module:` and those of entry points. The hash of an imported file is that
    of the text which was imported; a missing file has the hash "". Nothing is imported.

    Args:
        tree: The recipe in plain form: dicts, lists and values.
    """
    plugins = {name: point for kind in get_args(Kind) for name, point in installed(kind).items()}
    digests: dict[str, str] = {}
    for text in _texts(tree):
        if is_own(text):
            path = file_of(text)
        elif text in plugins:
            path = file_of(f"{PREFIX}{plugins[text].value}")
        else:
            continue
        digests[text] = _hash(path) if path else ""
    return digests


def warn_if_changed(code: str, made_by: str, *, model: str) -> None:
    """Logs a warning if the file of the code that made a model is no longer the same.

    There is one warning for each model and name.

    Args:
        code: The name of the code that made the model; nothing is imported.
        made_by: SHA-256 of the file when it made the model, or "" if unknown.
        model: The model, for the message.
    """
    now = hashes(code).get(code, "")
    if made_by and now and made_by != now and (model, code) not in _warned:
        _warned.add((model, code))
        log.warning(
            "%s: %s is NOT THE FILE that made this model (its hash was %s, now %s)",
            model,
            code,
            made_by[:12],
            now[:12],
        )


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


def _real(path: str) -> Path:
    """Returns `path` as an absolute path, in which `~` and symbolic links are resolved.

    A path with a NUL character is returned unchanged.
    """
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except ValueError:  # A NUL, which a recipe may hold.
        return Path(path)


def _hash(path: Path) -> str:
    """Returns the SHA-256 of the text of the file `path`.

    If this process has imported the file, the text is the imported one; otherwise it is the text
    that the file has now.
    """
    return _imported.get(path) or hashlib.sha256(path.read_bytes()).hexdigest()


def _is_permitted(source: str, path: Path, digest: str = "") -> bool:
    """Whether a name may be imported from a file.

    Args:
        source: The name.
        path: The file.
        digest: SHA-256 of the file; "" to compute it with `_hash`.
    """
    if _is_named(source, path):
        return True
    if path.suffix != ".py":  # Python loads it by itself, perhaps not what was hashed.
        return False
    name, digest = absolute(source), digest or _hash(path)
    listed = allowed_code.read()[0].get(name, {})
    return (name, digest) in _unchanged or listed.get(digest) == str(path)


def _is_named(source: str, path: Path) -> bool:
    """Whether the command line of this process allows the name `source` or the file `path`."""
    return path in _files or absolute(source) in _names


def _not_allowed(refused: Mapping[str, Path]) -> ConfigError:
    files = " ".join(shlex.quote(str(path)) for path in dict.fromkeys(refused.values()))
    reason = allowed_code.read()[1]
    return ConfigError(
        f"{', '.join(refused)}: code without permission to run; got {files}, expected code named "
        "on this command line, or unchanged since an earlier run of yours named it. Read the "
        f"code, then add --allow-code {files}." + (f"\n{reason}" if reason else "")
    )


def _own(source: str, where: str) -> Any:
    module_name, name = _split(source)
    path = file_of(source)
    if path is None or not name.isidentifier():
        raise ConfigError(complaint(source, where))
    try:
        # What is hashed is what runs: the file may change in between.
        text = b"" if path in _modules else path.read_bytes()
    except OSError as error:
        raise _failed(where, str(path), error) from error
    digest = _imported.get(path) or hashlib.sha256(text).hexdigest()
    if not _is_permitted(source, path, digest):
        raise _not_allowed({where: path})
    if path not in _modules:
        importer = _from_file if _is_path(module_name) else _from_path
        try:
            module = importer(module_name, path, text)
        except Exception as error:  # The user's code may raise anything.
            raise _failed(where, str(path), error) from error
        _modules[path], _imported[path] = module, digest
    module = _modules[path]
    if not hasattr(module, name):
        raise ConfigError(_no_name(where, path, name, vars(module)))
    if _remembers and path.suffix == ".py" and _is_named(source, path):
        allowed_code.add(absolute(source), digest, path)
    return getattr(module, name)


def _no_name(where: str, path: Path, name: str, names: Iterable[str]) -> str:
    # A file that only imports is answered by what it imports.
    defined, everything = (
        [known for known in some if not known.startswith("_")]
        for some in (set(_defined_in(_tree(path))), names)
    )
    suggestion = nearest(name, defined or everything)
    return f"{where}: no such name in {path}; got {name!r}, {suggestion}. Correct the name."


def _names_in(path: Path) -> set[str]:
    """Returns the names that the text of the Python file `path` defines, assigns or imports.

    The set is empty if the text cannot be parsed, or can create further names (`exec`, `import *`).
    """
    names: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    # These make names that no text shows.
    return set() if names & {"*", "__getattr__", "globals", "exec", "vars", "setattr"} else names


def _defined_in(node: ast.AST) -> Iterator[str]:
    """Yields the names of a module's top-level functions, classes and assigned variables."""
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
    """Returns the syntax tree of the Python file `path`.

    The tree is empty if the file cannot be read or parsed.
    """
    try:
        if path.suffix == ".py":
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        pass
    return ast.Module([], [])


def _failed(where: str, subject: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{where}: cannot be imported; got {cause(error)}, expected {subject} to be imported "
        "without an error. Correct the file, or install what it needs."
    )


def _is_theirs(file: str) -> bool:
    real = os.path.realpath(file)
    if real.startswith(tuple(_plugins)):
        return True
    return not (file.startswith("<") or real.startswith(_NOT_THEIRS) or _LIBRARIES.search(real))


def _from_file(_: str, path: Path, text: bytes) -> ModuleType:
    # A name of its own, so that two files of the same name do not meet.
    name = f"fd_large_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    return _run(spec, path, text)


def _from_path(name: str, path: Path, text: bytes) -> ModuleType:
    """Imports a module that is on Python's path, after the packages above it; returns the module.

    Args:
        name: Name of the module, such as package.module.
        path: File of the module.
        text: Content of the file, whose hash was checked. If the module is not yet imported and
            `path` ends in .py, this text is run.
    """
    package, _, last = name.rpartition(".")
    above = importlib.import_module(package) if package else None
    spec = None if name in sys.modules or path.suffix != ".py" else _spec_of(name)
    if spec is None:
        return importlib.import_module(name)
    module = _run(spec, path, text)
    if above is not None:
        setattr(above, last, module)
    return module


def _run(spec: ModuleSpec, path: Path, text: bytes) -> ModuleType:
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses and pickle look modules up there.
    try:
        # Not by the loader, which may run a cached compilation of an older text.
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _spec_of(name: str) -> ModuleSpec | None:
    """Returns the spec of the module `name`, without importing the packages above it.

    The result is None if there is no such module, or if the module has no spec (`__main__`).
    """
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
